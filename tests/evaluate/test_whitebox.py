"""The figures of the white-box marks, for one seed and little training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sealmark.core.errors import ParameterError
from sealmark.core.task import Recipe
from sealmark.evaluate.measure import Effort, ground
from sealmark.evaluate.whitebox import ENTRIES, REWRITES, Entry, main, mark, run
from sealmark.evaluate.whitebox_seals import _trained

pytestmark = pytest.mark.slow

SHORT = (
    Entry("uchida", {"bits": 64}),
    Entry("uchida", {"bits": 64}, trained=True),
    Entry("deepsigns", {"mode": "black-box", "keys": 12, "candidates": 16}, trained=True),
    Entry("spread_spectrum", trained=True),
    Entry("uchida", {"strength": 1e-9}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whitebox")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return run(folder, SHORT, seeds=(0,), wrong=2, epochs=4)


def test_a_mark_is_there_until_it_is_rewritten_and_there_again_when_aligned(result: dict[str, Any]) -> None:
    for title in ("uchida bits=64", "uchida bits=64 into a trained model", "spread_spectrum into a trained model"):
        found = result["rows"][title][0]
        assert found["marked"]["log10_p"] < -6, title
        assert set(found["rewrites"]) == set(REWRITES)
        assert found["rewrites"]["permute"]["as it is"]["log10_p"] > -6
        # a user's copy is read against the original, whose tensors are found in grown ones too
        assert found["rewrites"]["dummy_neurons"]["as it is"]["readable"] is title.startswith("spread_spectrum")
        for name in REWRITES:
            assert found["rewrites"][name]["aligned"]["log10_p"] < -6, (title, name)
            assert found["rewrites"][name]["outputs moved by"] < 1e-4


def test_nothing_is_found_where_nothing_is(result: dict[str, Any]) -> None:
    for runs in result["rows"].values():
        for found in runs:
            for name in ("independent", "independent, aligned", "wrong secrets"):
                assert min(found[name]) > -6


def test_a_mark_that_asks_for_answers_needs_no_alignment(result: dict[str, Any]) -> None:
    [title] = [title for title in result["rows"] if title.startswith("deepsigns")]
    found = result["rows"][title][0]
    assert found["rewrites"]["permute"] == found["rewrites"]["permute"] | {"aligned": None}
    assert found["rewrites"]["dummy_neurons"]["as it is"]["log10_p"] == found["marked"]["log10_p"]
    assert found["bits"] is None


def test_overwriting_is_measured_for_watermarks_alone(result: dict[str, Any]) -> None:
    assert "overwritten" in result["rows"]["uchida bits=64"][0]
    assert "overwritten" not in result["rows"]["spread_spectrum into a trained model"][0]


def test_the_page_names_marks_that_did_not_take_and_marks_that_were_lost(
    folder: Path, result: dict[str, Any]
) -> None:
    page = (folder / "ownership-whitebox.md").read_text("utf-8")
    assert list(result["failed"]) == ["uchida strength=1e-09"]
    assert "**uchida strength=1e-09 did not take**" in page
    assert "cannot be read → -" in page
    assert "| uchida bits=64 | 64 |" in page
    assert json.loads((folder / "ownership-whitebox.json").read_text("utf-8"))["epochs"] == 4


def test_seals_find_every_flip_and_one_of_them_destroys_until_it_is_merged(
    folder: Path, result: dict[str, Any]
) -> None:
    [seals] = result["seals"]
    for name in ("reversible", "mimosanet"):
        assert seals[name]["flipped bits found, share"] == seals[name]["restored bit for bit"] == 1
        assert seals[name]["log10 p, intact"] < -70
    noise = "accuracy, noise of 1.00% of each weight"
    assert seals["mimosanet"][noise] < 0.5 < seals["mimosanet, neurons merged"][noise]
    assert seals["the plain model"][noise] > seals["mimosanet"][noise] + 0.3
    assert "| restored bit for bit | 1 | 1 |" in (folder / "ownership-whitebox.md").read_text("utf-8")


def test_what_is_no_mark_is_refused() -> None:
    with pytest.raises(ParameterError, match="reversible is no mark"):
        mark(ground(0, Effort(epochs=1)), Entry("reversible"))


def test_the_command_measures_the_schemes_that_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    monkeypatch.setattr("sealmark.evaluate.whitebox.run", lambda *given, **named: called.append((given, named)))
    main([str(tmp_path), "--seeds", "5", "--only", "neuralmark", "passports"])
    main([str(tmp_path)])
    (given, named), (everything, _) = called
    assert [entry.scheme for entry in given[1]] == ["neuralmark", "passports"]
    assert named["seeds"] == [5]
    assert everything[1] == list(ENTRIES)


def test_a_model_that_training_blew_up_is_worth_a_guess() -> None:
    base = ground(0, Effort(epochs=1))
    assert _trained(base, base.plain, Recipe(epochs=1, rate=1e9)) == base.task.chance
