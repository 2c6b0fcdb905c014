"""Figures of user identity management: ``python -m sealmark.evaluate.identity OUT``.

Over three seeds, on the digits: marks in users' copies, and whom a trace names when users pool theirs;
credentials, and who gets past without one. The page also tells what the experiments on CIFAR-10 and the
sentence transformer's example found, where their results lie beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sealmark.core.errors import ParameterError
from sealmark.core.files import atomic_write
from sealmark.evaluate.artifacts import environment, finite, write_json
from sealmark.evaluate.copies import MARKS, MarkEntry, copy_figures, joined, slug
from sealmark.evaluate.credentials import CredentialEntry, credential_figures
from sealmark.evaluate.identity_text import as_markdown
from sealmark.evaluate.measure import Effort, ground
from sealmark.evaluate.plots import Plot, draw
from sealmark.evaluate.seeds import over_seeds

SEEDS = (0, 1, 2)
CREDENTIALS: tuple[CredentialEntry, ...] = (
    CredentialEntry("backdoor_marks"),
    CredentialEntry("additional_class"),
    CredentialEntry("activeguard"),
    CredentialEntry("sample_specific"),
)
Entry = MarkEntry | CredentialEntry


def measure(entries: Sequence[Entry], seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    """All entries on the plain model of one seed, by title."""
    torch.set_num_threads(1)
    base = ground(seed, Effort(epochs=epochs))
    console, found = Console(stderr=True), {}
    for entry in entries:
        began = time.perf_counter()
        found[entry.title] = (
            copy_figures(base, entry) if isinstance(entry, MarkEntry) else credential_figures(base, entry)
        )
        console.print(f"seed {seed}: {entry.title}: {time.perf_counter() - began:.0f} s")
    return found


def run(
    out: Path,
    entries: Sequence[Entry],
    *,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 15,
    workers: int = 1,
    beside: bool = False,
) -> dict[str, Any]:
    """Measure, and write ``identity.json``, ``.md`` and a plot into ``out``.

    Args:
        out: made if missing.
        entries: what to measure.
        seeds: one independent repetition each.
        epochs: of the owner's training.
        workers: processes, one seed in each at a time.
        beside: keep what ``out`` holds of other entries.
    """
    began = time.perf_counter()
    found = over_seeds(partial(measure, entries, epochs=epochs), seeds, workers)
    kinds = {entry.title: "copies" if isinstance(entry, MarkEntry) else "credentials" for entry in entries}
    result: dict[str, Any] = {
        "environment": environment(),
        "seeds": list(seeds),
        "epochs": epochs,
        **{
            kind: {title: [by[title] for by in found] for title, its in kinds.items() if its == kind}
            for kind in ("copies", "credentials")
        },
        "seconds": round(time.perf_counter() - began),
    }
    out.mkdir(parents=True, exist_ok=True)
    if beside:
        result = _merged(json.loads((out / "identity.json").read_text("utf-8")), result)
    result = finite(result)
    write_json(result, out / "identity.json")
    with atomic_write(out / "identity.md") as file:
        file.write(as_markdown(result).encode())
    for title, plot in plots(result).items():
        draw(plot, out / f"identity-{title}.svg")
    return result


def _merged(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new figures, and the old ones of other entries.

    Raises:
        ParameterError: those were measured from other seeds, or on models trained otherwise.
    """
    for name in ("seeds", "epochs"):
        if new[name] != old[name]:
            raise ParameterError(f"the figures there have other {name}", expected=old[name], found=new[name])
    joint = {kind: old[kind] | new[kind] for kind in ("copies", "credentials")}
    return new | joint | {"seconds": old["seconds"] + new["seconds"]}


def plots(result: Mapping[str, Any]) -> dict[str, Plot]:
    """For each mark, the share of coalitions that lose a member, by their size, a curve each way of pooling."""
    found = {}
    for title, runs in result["copies"].items():
        curves = {}
        for way, sizes in runs[0]["pooled"].items():
            cells = {int(size): joined([run["pooled"][way][size] for run in runs]) for size in sizes}
            curves[way] = [(size, cell["caught"] / cell["coalitions"]) for size, cell in sorted(cells.items())]
        found[slug(title)] = Plot(
            f"{title}: coalitions that lose a member", "users who pool their copies", "share", curves
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sealmark.evaluate.identity OUT [--seeds 0 1 2] [--only NAME ...] [--workers 2]``."""
    parser = argparse.ArgumentParser(description="Measure user marks and credentials.")
    parser.add_argument("out", type=Path, help="folder for identity.json, .md and the plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="repetitions")
    parser.add_argument("--only", nargs="+", default=(), help="schemes; what OUT holds of others is kept")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    chosen = parser.parse_args(arguments)
    entries: list[Entry] = [*MARKS, *CREDENTIALS]
    run(
        chosen.out,
        [entry for entry in entries if not chosen.only or entry.scheme in chosen.only],
        seeds=chosen.seeds,
        workers=chosen.workers,
        beside=bool(chosen.only) and (chosen.out / "identity.json").is_file(),
    )


if __name__ == "__main__":
    main()
