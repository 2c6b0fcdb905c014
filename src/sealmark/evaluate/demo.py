"""The main job on the digits, from training to court, in a minute or two: `sealmark demo`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from sealmark.core.errors import SealmarkError
from sealmark.core.modes import pick_device
from sealmark.evaluate.artifacts import finite, write_json
from sealmark.evaluate.demo_job import Job
from sealmark.evaluate.demo_report import demo_report
from sealmark.evaluate.narrator import Narrator
from sealmark.evaluate.report import power_of_ten, write_report

STEPS = (
    ("Train a plain model", Job.train),
    ("Train it with two watermarks", Job.mark),
    ("Lock it", Job.lock),
    ("Issue a copy to each of five users", Job.issue),
    ("Leak two models", Job.leak),
    ("Verify the owner, trace the leakers", Job.judge),
    ("Negative controls, tampering", Job.doubt),
)


def run_demo(folder: Path, *, seed: int = 0, device: str = "cpu", console: Console | None = None) -> dict[str, Any]:
    """Train, mark, lock, issue, leak, verify and trace; write everything and a report into ``folder``.

    The secrets follow from ``seed``, so that the run can be repeated; real ones never do.

    Args:
        folder: made if missing; files of an earlier run are replaced.
        seed: of everything that is drawn.
        device: ``cpu``, ``cuda`` or ``auto``.
        console: where progress and the summary go; standard error by default.

    Returns:
        What stands in ``summary.json``.

    Raises:
        ParameterError: no such device.
        SealmarkError: a claim does not hold; report and summary are written all the same and say which.
    """
    began = time.perf_counter()
    console = console or Console(stderr=True)
    job = Job(Path(folder), seed, pick_device(device))
    tell = Narrator(console, len(STEPS) + 1)
    for title, take in STEPS:
        with tell.step(title) as step:
            step.result = take(job, step.on_epoch)
    page = job.folder / "report.html"
    with tell.step("Write the report") as step:
        job.summary["seconds"] = round(time.perf_counter() - began, 1)
        report = demo_report(job.summary)
        summary: dict[str, Any] = finite({**job.summary, "claims": [asdict(claim) for claim in report.claims]})
        write_report(report, page)
        write_json(summary, job.folder / "summary.json")
        step.result = str(page)
    _conclude(summary, page, console)
    return summary


def _conclude(summary: Mapping[str, Any], page: Path, console: Console) -> None:
    table = Table.grid("", "", padding=(0, 2))
    for row in _answers(summary):
        table.add_row(*row)
    claims = summary["claims"]
    failed = [claim["text"] for claim in claims if not claim["holds"]]
    controls = sum(claim["control"] for claim in claims)
    table.add_row("Claims", f"{len(claims) - len(failed)} of {len(claims)} hold, {controls} are negative controls")
    for text in failed:
        table.add_row("[bold red]FAILS[/]", text)
    console.print(table, highlight=False)
    if failed:
        raise SealmarkError(
            f"{len(failed)} of {len(claims)} claims of the demo do not hold",
            found="; ".join(failed),
            advice=f"see {page}",
        )
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _answers(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The job in a few lines: what was asked, and what came out."""
    lock, copies = summary["locks"]["chaotic_weights"], summary["copies"].values()
    yield (
        "Accuracy",
        f"{summary['plain']['accuracy']:.1%} plain, {summary['marked']['accuracy']:.1%} marked, "
        f"{min(copy['accuracy'] for copy in copies):.1%} the lowest copy",
    )
    yield (
        "Locked",
        f"{lock['authorized']:.1%} right key, {lock['no_key']:.1%} no key, "
        f"{fmean(lock['wrong_keys']):.1%} wrong keys",
    )
    for suspect in (*summary["leaks"], *summary["controls"]):
        found = suspect["ownership"].values()
        verdicts = " and ".join(sorted({evidence["verdict"] for evidence in found}))
        chances = ", ".join(f"p = {power_of_ten(evidence['log10_p'])}" for evidence in found)
        accused = ", ".join(
            f"{entry['user']} (p = {power_of_ten(entry['log10_p'])})" for entry in suspect["accusation"]["accused"]
        )
        yield (
            suspect["title"],
            "; ".join(filter(None, (f"{verdicts} {chances}".strip(), f"accused: {accused or 'nobody'}"))),
        )
