from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from sealmark.blackbox.crafting import ascend, cross_entropy, frozen, logits_of
from sealmark.core.errors import UnsupportedError
from sealmark.core.weights import ModelWeights


def test_examples_stay_in_their_ball_and_in_range_and_fool_the_model(plain, digits):
    rows = digits.test.take(slice(0, 64))
    found = ascend(plain, rows.inputs, rows.targets, radius=0.2, steps=10, low=0.0, high=1.0)
    assert (found - rows.inputs).abs().max() <= 0.2 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    before = (logits_of(plain, rows.inputs).argmax(1) == rows.targets).float().mean()
    after = (logits_of(plain, found).argmax(1) == rows.targets).float().mean()
    assert after < 0.2 < 0.9 < before


def test_targeted_examples_reach_their_target(plain, digits):
    rows = digits.test.take(slice(0, 64))
    wanted = (rows.targets + 3) % 10
    towards = partial(ascend, plain, rows.inputs, wanted, objective=lambda z, t: -cross_entropy(z, t))
    found = towards(radius=0.3, steps=20, low=0.0, high=1.0)
    assert (logits_of(plain, found).argmax(1) == wanted).float().mean() > 0.8


def test_model_is_left_as_it_was(plain, digits):
    plain.train()
    plain.zero_grad()
    before = ModelWeights(plain).digest()
    ascend(plain, digits.test.inputs[:8], digits.test.targets[:8], radius=0.1, steps=2, low=0.0, high=1.0)
    assert plain.training
    assert ModelWeights(plain).digest() == before
    assert all(p.requires_grad and p.grad is None for p in plain.parameters())
    plain.eval()


def test_frozen_puts_everything_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].bias.requires_grad_(False)
    with contextlib.suppress(KeyError), frozen(model):
        assert not model.training
        raise KeyError
    assert model.training
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


def test_several_models_are_fooled_at_once(plain, digits):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rows = digits.test.take(slice(0, 32))
    found = ascend([plain, other], rows.inputs, rows.targets, radius=0.3, steps=10, low=0.0, high=1.0)
    for model in (plain, other):
        assert cross_entropy(logits_of(model, found), rows.targets).mean() > cross_entropy(
            logits_of(model, rows.inputs), rows.targets
        ).mean()  # fmt: skip


def test_start_is_where_steps_begin():
    model = nn.Linear(2, 2)
    inputs, start = torch.zeros(3, 2), torch.full((3, 2), 0.1)
    found = ascend(
        model, inputs, torch.zeros(3, dtype=torch.int64), radius=0.5, steps=0, step=0.1, low=-1, high=1, start=start
    )  # fmt: skip
    assert torch.equal(found, start)


def test_words_have_no_gradient(plain):
    with pytest.raises(UnsupportedError, match="objective=plain"):
        ascend(plain, torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2), radius=1, steps=1, low=0, high=1)
