"""Experiments: the committed results are those that the page shows, and the script runs one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def script(tmp_path, monkeypatch):
    made = runpy.run_path(str(ROOT / "run.py"), run_name="run")
    monkeypatch.setitem(made["main"].__globals__, "FOLDER", tmp_path)
    return made


def test_a_served_model_is_stolen_and_the_thief_found(script, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "params.toml").write_text(
        'task = "digits"\nseeds = [0]\nscheme = "dawn"\nstart = "served"\n[parameters]\nrate = 0.05\n'
        '[recipe]\nepochs = 3\n[[attacks]]\ntitle = "stolen"\nattack = "knockoff"\nanswers = "label"\nepochs = 20\n'
    )
    script["main"]("served")
    [run] = json.loads((folder / "result.json").read_text("utf-8"))["runs"]
    assert run["after_stolen"]["verdict"] == "MATCH"
    assert run["control_independent_model"]["verdict"] == "NO_MATCH"
    assert 0.02 < run["served_wrongly"] < 0.1


def test_a_fingerprint_is_held_against_models_that_were_trained_apart(script, tmp_path):
    folder = tmp_path / "enrolled"
    folder.mkdir()
    (folder / "params.toml").write_text(
        'task = "digits"\nseeds = [0]\nscheme = "ipguard"\n[parameters]\npoints = 20\nsteps = 100\n'
        "[recipe]\nepochs = 5\n[references]\ncount = 3\nepochs = 3\nshare = 0.8\n"
        '[[attacks]]\ntitle = "prune"\nrate = 0.5\n'
    )
    script["main"]("enrolled")
    [run] = json.loads((folder / "result.json").read_text("utf-8"))["runs"]
    assert run["evidence"]["match_rate"] == 1
    assert run["after_prune"]["match_rate"] > max(
        found["match_rate"] for found in run["control_independent_models"]
    )
    assert len(list((tmp_path / ".models").glob("digits-reference-*"))) == 5  # three, and two suspects


def test_the_page_shows_the_committed_results():
    assert runpy.run_path(str(ROOT / "run.py"), run_name="run")["page"]() == (ROOT / "README.md").read_text("utf-8")


def test_every_experiment_has_a_result():
    folders = {path.parent.name for path in ROOT.glob("*/params.toml")}
    assert folders == {path.parent.name for path in ROOT.glob("*/result.json")}


def test_an_experiment_compares_a_marked_model_with_a_plain_one(script, tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "params.toml").write_text(
        'task = "digits"\nseeds = [0]\nscheme = "uchida"\nstart = "trained"\n'
        "[parameters]\nbits = 64\n[recipe]\nepochs = 2\n[paper]\naccuracy_plain = 0.9\n"
    )
    script["main"]("short")
    [run] = json.loads((folder / "result.json").read_text("utf-8"))["runs"]
    assert run["evidence"]["verdict"] == "MATCH"
    assert run["control_independent_model"]["verdict"] == "NO_MATCH"
    assert 0.3 < run["accuracy_plain"] <= 1
    assert (tmp_path / ".models" / "short-0.safetensors").is_file()
    assert f"| short | 0 | {run['accuracy_plain']:.4f} |" in script["page"]()
    script["main"]("short")  # the plain model is taken from its file
    [again] = json.loads((folder / "result.json").read_text("utf-8"))["runs"]
    assert again["accuracy_marked"] == run["accuracy_marked"]
