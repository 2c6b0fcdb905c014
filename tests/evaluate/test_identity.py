"""The figures of user identity management, for one seed and little training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sealmark.core.errors import ParameterError
from sealmark.evaluate import identity
from sealmark.evaluate.copies import MarkEntry, Pooling, joined
from sealmark.evaluate.credentials import CredentialEntry, Pretense
from sealmark.evaluate.identity import CREDENTIALS, MARKS, main, run

RESULTS = Path(__file__).parents[2] / "docs" / "results"
WAYS = (
    Pooling("as issued", least=1),
    Pooling("average", (("average", {}),)),
    Pooling("average, halved", (("average", {}), ("prune", {"rate": 0.5}))),
)
PRETENSES = (
    Pretense("noise", "fingerprint_forgery", {"strategy": "noise"}),
    Pretense("two spliced", "fingerprint_mixing", {"strategy": "splice"}, 2),
    Pretense("a copied one", "replay", stolen=1),
)
ENTRIES = (
    MarkEntry("spread_spectrum", sizes=(1, 2, 12), repeats=2, ways=WAYS),
    CredentialEntry("backdoor_marks", users=4, pretenses=PRETENSES),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return run(folder, ENTRIES, seeds=(0,), epochs=6)


def test_small_coalitions_lose_members_and_large_ones_go_free(result: dict[str, Any]) -> None:
    [found] = result["copies"]["spread_spectrum"]
    assert list(found["pooled"]["as issued"]) == ["1"]
    assert found["pooled"]["as issued"]["1"]["caught"] == 2
    assert found["pooled"]["average"]["2"]["named"] == 1
    assert found["pooled"]["average"]["12"]["caught"] == 0
    assert found["pooled"]["average, halved"]["2"]["caught"] == 2


def test_nobody_without_a_part_in_it_is_named(result: dict[str, Any]) -> None:
    [found] = result["copies"]["spread_spectrum"]
    cells = [cell for sizes in found["pooled"].values() for cell in sizes.values()]
    assert sum(cell["innocents named"] for cell in cells) == 0
    assert all(cell["innocents"] > 2000 for cell in cells)
    assert found["controls"] == {"the original": 0, "an untrained model": 0, "another owner's copy": 0}


def test_users_pass_and_pretenders_do_not_but_for_a_copied_credential(result: dict[str, Any]) -> None:
    [found] = result["credentials"]["backdoor_marks"]
    assert found["genuine"]["accepted"] == [4, 4]
    assert found["genuine"]["as another"] == [0, 4]
    assert found["unissued"]["accepted"][0] == 0
    assert found["pretenses"]["noise"]["accepted"][0] == 0
    tried = found["pretenses"]["a copied one"]
    assert tried["accepted"] == tried["as the robbed"]
    assert tried["accepted"][0] > 0


def test_a_closed_gate_serves_nobody(result: dict[str, Any]) -> None:
    [found] = result["credentials"]["backdoor_marks"]
    assert found["closed gate"] < 0.2 < found["without a gate"] <= found["authorized"]


def test_the_page_has_every_entry_and_the_plots_that_it_shows(folder: Path, result: dict[str, Any]) -> None:
    page = (folder / "identity.md").read_text("utf-8")
    assert "### spread_spectrum" in page
    assert "| backdoor_marks | users, their own | 4/4 |" in page
    assert "identity-spread_spectrum.svg" in page
    assert (folder / "identity-spread_spectrum.svg").is_file()


def test_one_entry_can_be_measured_again_beside_the_others(
    folder: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = MarkEntry("spread_spectrum", sizes=(1,), repeats=1, ways=WAYS[:1])
    again = run(folder, [short], seeds=(0,), epochs=6, beside=True)
    assert again["credentials"] == result["credentials"]
    assert list(again["copies"]["spread_spectrum"][0]["pooled"]["as issued"]) == ["1"]
    with pytest.raises(ParameterError, match="other seeds"):
        run(folder, [short], seeds=(1,), epochs=6, beside=True)


def test_the_command_measures_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(identity, "run", lambda out, entries, **options: asked.update(options, entries=entries))
    main([str(tmp_path), "--only", "deepmarks", "--seeds", "4"])
    assert [entry.scheme for entry in asked["entries"]] == ["deepmarks"]
    assert (asked["seeds"], asked["beside"]) == ([4], False)
    main([str(tmp_path)])
    assert asked["entries"] == [*MARKS, *CREDENTIALS]


def test_counts_of_seeds_add_up() -> None:
    cell = {"coalitions": 5, "caught": 4, "named": 0.5, "innocents named": 0, "innocents": 100, "log10 p": -7.0}
    both = joined([cell | {"accuracy": 0.9}, cell | {"accuracy": 1.0}])
    assert (both["coalitions"], both["caught"], both["innocents"]) == (10, 8, 200)
    low, high = both["caught interval"]
    assert low < 0.8 < high
    assert 0 < both["innocents bound"] < 0.02


def test_the_committed_figures_are_of_every_entry() -> None:
    found = json.loads((RESULTS / "identity.json").read_text("utf-8"))
    assert list(found["copies"]) == [entry.title for entry in MARKS]
    assert list(found["credentials"]) == [entry.title for entry in CREDENTIALS]
