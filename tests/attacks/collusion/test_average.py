"""Averaging copies: what it computes, what it keeps, what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.collusion.average import Average
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.training import train_task


def noisy(model: nn.Module, seed: int, size: float = 0.01) -> nn.Module:
    result, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return result


def test_every_float_tensor_is_the_mean_and_integers_are_the_first(plain, digits, rng):
    copies = [noisy(plain, seed) for seed in range(3)]
    copies[1].norm1.running_mean += 3
    copies[1].norm1.num_batches_tracked += 5
    merged = Average().run(copies, Resources.of(digits), rng=rng).model.state_dict()
    for name, value in merged.items():
        states = [model.state_dict()[name] for model in copies]
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack(states).mean(0))
        else:
            assert torch.equal(value, states[0])


def test_the_copies_are_left_as_they_are_and_counted(plain, digits, rng):
    copies = [noisy(plain, seed) for seed in range(2)]
    before = [copy.deepcopy(model.state_dict()) for model in copies]
    result = Average().run(copies, Resources.of(digits), rng=rng)
    for state, model in zip(before, copies, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert (result.cost.copies, result.cost.rows, result.cost.rows_seen) == (2, 0, 0)


def test_accuracy_stays(plain, digits, rng):
    result = Average().run([noisy(plain, seed) for seed in range(3)], Resources.of(digits), rng=rng)
    assert digits.score(result.model) >= digits.score(plain) - 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(dtype, toy, rng):
    models = [toy.model(rng).to(dtype) for _ in range(2)]
    merged = Average().run(models, Resources.of(toy), rng=rng).model
    expected = (models[0][0].weight.double() + models[1][0].weight.double()) / 2
    assert torch.equal(merged[0].weight, expected.to(dtype))


def test_tied_tensors_stay_tied(rng, toy):
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    for model in models:
        model[1].weight = model[0].weight
    merged = Average().run(models, Resources.of(toy), rng=rng).model
    assert merged[0].weight is merged[1].weight
    torch.testing.assert_close(merged[0].weight, (models[0][0].weight + models[1][0].weight) / 2)


def test_recalibration_mends_the_statistics_of_models_trained_apart(plain, digits, rng):
    copies = [plain, noisy(plain, 1)]
    for name in ("norm1", "norm2", "norm3"):
        getattr(copies[1], name).running_var *= 50
    resources = Resources.of(digits)
    stale = digits.score(Average().run(copies, resources, rng=rng).model)
    mended = Average(recalibrate=True).run(copies, resources, rng=rng).model
    assert digits.score(mended) > stale + 0.05
    assert (mended.norm1.momentum, mended.training) == (0.1, False)


def test_recalibrated_statistics_are_those_of_the_attackers_rows(plain, digits, rng):
    resources = Resources.of(digits)
    mended = Average(recalibrate=True).run([plain, plain], resources, rng=rng).model
    with torch.no_grad():
        expected = mended.conv1(resources.rows.inputs).mean((0, 2, 3))
    torch.testing.assert_close(mended.norm1.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_recalibration_without_rows_changes_nothing(plain, digits, rng):
    merged = Average(recalibrate=True).run([plain, plain], Resources.of(digits, 0.0), rng=rng).model
    torch.testing.assert_close(merged.norm1.running_mean, plain.norm1.running_mean)


def test_one_copy_is_refused(plain, digits, rng):
    with pytest.raises(ParameterError, match="copies"):
        Average().run(plain, Resources.of(digits), rng=rng)


def test_copies_of_different_models_are_refused(plain, digits, rng):
    with pytest.raises(ModelMismatchError, match="different models"):
        Average().run([plain, nn.Linear(2, 2)], Resources.of(digits), rng=rng)


def test_averaging_models_trained_apart_ruins_them(plain, digits, rng):
    stranger = train_task(digits, rng=np.random.default_rng(1))
    result = Average(recalibrate=True).run([plain, stranger], Resources.of(digits), rng=rng)
    assert digits.score(result.model) < digits.score(plain) - 0.05
