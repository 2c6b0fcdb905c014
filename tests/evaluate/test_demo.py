"""The demo: one run, its claims from the summary, its files, and what happens when a claim fails."""

from __future__ import annotations

import copy
import io
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from sealmark.core.errors import ParameterError, SealmarkError, UntrustedError
from sealmark.core.weights import weights_of
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.evaluate import demo
from sealmark.evaluate.demo import run_demo
from sealmark.evaluate.demo_job import COLLUDERS, LONE, USERS, Job
from sealmark.evaluate.demo_report import demo_report
from sealmark.formats.envelope import open_document
from sealmark.formats.evidence import read_evidence
from sealmark.formats.secret import read_secret


class Run(NamedTuple):
    folder: Path
    summary: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, said = tmp_path_factory.mktemp("demo"), io.StringIO()
    summary = run_demo(folder, console=Console(file=said, width=200))
    return Run(folder, summary, said.getvalue())


def failing(summary: dict[str, Any]) -> list[str]:
    return [claim.text for claim in demo_report(summary).claims if not claim.holds]


def test_every_claim_holds_and_half_of_them_are_negative_controls(run: Run) -> None:
    claims = run.summary["claims"]
    assert [claim["text"] for claim in claims if not claim["holds"]] == []
    assert sum(claim["control"] for claim in claims) >= 12


def test_both_watermarks_survive_in_both_leaks(run: Run) -> None:
    for leak in run.summary["leaks"]:
        assert {name: found["verdict"] for name, found in leak["ownership"].items()} == {
            "uchida": "MATCH",
            "adi": "MATCH",
        }


def test_the_single_leaker_is_named_alone(run: Run) -> None:
    accused = run.summary["leaks"][0]["accusation"]["accused"]
    assert [entry["user"] for entry in accused] == [LONE]


def test_colluders_are_named_and_nobody_else(run: Run) -> None:
    accused = {entry["user"] for entry in run.summary["leaks"][1]["accusation"]["accused"]}
    assert accused
    assert accused <= set(COLLUDERS)


def test_innocent_models_and_wrong_secrets_match_nothing_and_accuse_nobody(run: Run) -> None:
    assert len(run.summary["controls"]) == 3
    for control in run.summary["controls"]:
        assert all(found["verdict"] == "NO_MATCH" for found in control["ownership"].values())
        assert control["accusation"]["accused"] == []


def test_the_folder_holds_every_artifact(run: Run) -> None:
    found = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    copies = {f"copies/{user.lower().replace(' ', '-')}.safetensors" for user in USERS}
    expected = copies | {
        "model.safetensors", "locked.safetensors", "model.sealed", "sealed-against-change.safetensors",
        "leaks/leak-1.safetensors", "leaks/leak-2.safetensors", "report.html", "summary.json",
        *(f"secrets/{n}.secret" for n in ("uchida", "adi", "spread_spectrum", "reversible", "sealed")),
        "secrets/chaotic_weights.secret",
        *(f"evidence/leak-{i}-{n}.json" for i in (1, 2) for n in ("uchida", "adi", "trace")),
        "evidence/verify-key.txt",
    }  # fmt: skip
    assert found == expected


def test_secrets_can_be_read_back_by_their_owner_alone(run: Run) -> None:
    for path in (run.folder / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert read_secret(path).scheme == path.stem


def test_the_signed_verdicts_read_back_and_another_key_does_not_open_them(run: Run) -> None:
    folder = run.folder / "evidence"
    key = VerifyKey.parse((folder / "verify-key.txt").read_text("utf-8"))
    data = (folder / "leak-1-adi.json").read_bytes()
    signed = read_evidence(data, [key])
    assert signed.evidence.verdict == "MATCH"
    assert signed.suspect.digest == weights_of(run.folder / "leaks" / "leak-1.safetensors").digest()
    trace = open_document((folder / "leak-1-trace.json").read_bytes(), "evidence", [key]).body
    assert [entry["user"] for entry in trace["evidence"]["accused"]] == [LONE]
    with pytest.raises(UntrustedError):
        read_evidence(data, [SigningKey.generate().verify_key])


def test_the_summary_on_disk_is_what_was_returned(run: Run) -> None:
    assert json.loads((run.folder / "summary.json").read_text("utf-8")) == run.summary


def test_the_page_is_well_formed_complete_and_self_contained(run: Run, read_page: Callable[[str], Any]) -> None:
    html = (run.folder / "report.html").read_text("utf-8")
    page = read_page(html)
    assert not page.links
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not page.handlers
    assert "http:" not in html
    assert "https:" not in html
    for claim in run.summary["claims"]:
        assert " ".join(claim["text"].split()) in page.text
    assert f"All {len(run.summary['claims'])} claims hold" in page.text


def test_a_hostile_name_stays_text(run: Run, read_page: Callable[[str], Any]) -> None:
    from sealmark.evaluate.report import render

    summary = json.loads(json.dumps(run.summary).replace(LONE, "<script>alert(1)</script>"))
    page = read_page(render(demo_report(summary)))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_each_step_is_one_plain_line_outside_a_terminal(run: Run) -> None:
    assert "\x1b" not in run.said
    heads = [line[:3] for line in run.said.splitlines()[: len(demo.STEPS) + 1]]
    assert heads == [f"{i}/8" for i in range(1, 9)]
    assert str(run.folder / "report.html") in run.said


def broken_match(summary: dict[str, Any]) -> None:
    summary["controls"][1]["ownership"]["uchida"]["verdict"] = "MATCH"


def broken_accusation(summary: dict[str, Any]) -> None:
    entry = summary["leaks"][0]["accusation"]
    entry["accused"].append(entry["ranking"][-1])


def broken_trace(summary: dict[str, Any]) -> None:
    summary["leaks"][1]["accusation"]["accused"] = []


def broken_lock(summary: dict[str, Any]) -> None:
    summary["locks"]["chaotic_weights"]["no_key"] = 0.9


def broken_key(summary: dict[str, Any]) -> None:
    summary["locks"]["chaotic_weights"]["wrong_keys"] = [0.1, 0.1, 0.1, 0.1, 0.4]


def broken_cipher(summary: dict[str, Any]) -> None:
    summary["locks"]["sealed"]["flips_refused"] -= 1


def broken_fidelity(summary: dict[str, Any]) -> None:
    summary["plain"]["accuracy"] = 1.0
    summary["marked"]["accuracy"] = 0.98


def broken_seal(summary: dict[str, Any]) -> None:
    summary["integrity"]["tampered"]["details"]["changed"] = []


@pytest.mark.parametrize(
    ("damage", "claim"),
    [
        (broken_match, "Leak 1 under wrong secrets: no match, white box (uchida)."),
        (broken_accusation, "Leak 1 accuses nobody innocent."),
        (broken_trace, "Leak 2 is traced to a colluder."),
        (broken_lock, "Without the key the locked model is no better than guessing."),
        (broken_key, "With a wrong key it is no better either."),
        (broken_cipher, "The sealed file refuses every other key and every flipped bit, and writes nothing."),
        (broken_fidelity, "The watermarks cost at most one point of accuracy."),
        (broken_seal, "One flipped bit is found, in the tensor where it is."),
    ],
)
def test_a_figure_that_does_not_bear_its_claim_out_fails_that_claim(
    damage: Callable[[dict[str, Any]], None], claim: str, run: Run
) -> None:
    summary = copy.deepcopy(run.summary)
    assert failing(summary) == []
    damage(summary)
    assert claim in failing(summary)


def test_a_demo_with_a_failed_claim_says_so_and_fails_but_leaves_its_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_page: Callable[[str], Any]
) -> None:
    def replay(job: Job, _: object) -> str:
        job.summary = copy.deepcopy(run.summary)
        broken_match(job.summary)
        return "a wrong secret matches"

    monkeypatch.setattr(demo, "STEPS", (("Replay", replay),))
    said = io.StringIO()
    with pytest.raises(SealmarkError, match=r"1 of \d+ claims of the demo do not hold") as caught:
        run_demo(tmp_path, console=Console(file=said, width=200))
    assert caught.value.exit_code != 0
    assert "FAILS" in said.getvalue()
    page = read_page((tmp_path / "report.html").read_text("utf-8"))
    assert "claims do NOT hold" in page.text
    written = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [claim["text"] for claim in written["claims"] if not claim["holds"]]


def test_an_unknown_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ParameterError):
        run_demo(tmp_path / "out", device="abacus", console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_the_same_seed_signs_with_the_same_key_and_another_seed_does_not(tmp_path: Path) -> None:
    import torch

    signers = [Job(tmp_path, seed, torch.device("cpu")).signer for seed in (0, 0, 1)]
    assert signers[0] == signers[1]
    assert signers[0] != signers[2]
