"""What runs leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from sealmark.core.errors import ParameterError
from sealmark.core.weights import save_model, weights_of
from sealmark.evaluate.artifacts import environment, write_json


def test_a_written_model_reads_back_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3))
    save_model(model, tmp_path / "model.safetensors")
    assert weights_of(tmp_path / "model.safetensors").digest() == weights_of(model).digest()


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    save_model(model, tmp_path / "model.safetensors")
    assert sorted(weights_of(tmp_path / "model.safetensors")) == ["a.bias", "a.weight", "b.bias"]


def test_what_is_not_finite_becomes_null_so_that_every_reader_takes_it(tmp_path: Path) -> None:
    write_json({"a": [math.inf, 1.5], "b": {"c": math.nan, "d": "é"}}, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert read == {"a": [None, 1.5], "b": {"c": None, "d": "é"}}


def test_nothing_is_written_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ParameterError):
        write_json({}, tmp_path / "missing" / "a.json")


def test_the_environment_names_versions_and_no_place() -> None:
    found = environment()
    assert found["torch"] == str(torch.__version__)
    assert not any("/" in str(value) for value in found.values())
