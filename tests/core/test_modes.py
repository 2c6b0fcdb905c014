"""Devices, evaluation mode, and randomness that leaves torch's global generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.errors import ParameterError
from sealmark.core.modes import chunks, device_of, evaluating, pick_device, seeded, torch_generator


def test_auto_takes_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")


def test_a_device_that_is_there_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_an_accelerator_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ParameterError, match="no such device here"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta"])
def test_a_device_that_we_do_not_know_is_refused(name: str) -> None:
    with pytest.raises(ParameterError, match="unknown device"):
        pick_device(name)


def test_the_device_of_a_model_is_that_of_its_first_tensor() -> None:
    with torch.device("meta"):
        model = nn.Linear(1, 1)
    assert device_of(model) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_evaluation_gives_every_submodule_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model.train()
    model[0].eval()
    with evaluating(model) as device:
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 2)).requires_grad
        assert device == torch.device("cpu")
    assert [module.training for module in model.modules()] == [True, False, True]


def test_evaluation_gives_the_modes_back_after_an_error_too() -> None:
    model = nn.Dropout()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training
    assert torch.is_grad_enabled()


def test_seeded_code_draws_from_the_generator_that_it_is_given() -> None:
    draws = []
    for seed in (0, 0, 1):
        with seeded(np.random.default_rng(seed)):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeded_code_leaves_the_global_generator_as_it_was(rng: np.random.Generator) -> None:
    before = torch.get_rng_state()
    with seeded(rng):
        torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_torch_generator_follows_the_numpy_generator() -> None:
    draws = [torch.rand(4, generator=torch_generator(np.random.default_rng(s))) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("rows", "sizes"), [(0, [0]), (1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
def test_chunks_cover_all_rows_in_order(rows: int, sizes: list[int]) -> None:
    found = list(chunks(torch.arange(rows), 2))
    assert [len(chunk) for chunk in found] == sizes
    assert torch.cat(found).tolist() == list(range(rows))
