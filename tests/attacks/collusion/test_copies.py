"""What all collusions share: integers, ties, precision, parts of large tensors, copies that do not fit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.collusion import _copies
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, ParameterError

ATTACKS = [
    registry.modification(name, **parameters)
    for name, parameters in [
        ("average", {}),
        ("median", {}),
        ("extremes", {"side": "either"}),
        ("extremes", {"side": "middle"}),
        ("majority", {}),
        ("majority", {"minority": True}),
        ("interleave", {"by": "weight"}),
        ("interleave", {"by": "layer"}),
        ("noise", {}),
        ("framing", {"tries": 2}),
    ]
]
CHOOSING = [attack for attack in ATTACKS if attack.name not in ("noise", "framing")]
each = pytest.mark.parametrize("attack", ATTACKS, ids=str)


@each
def test_integers_are_the_first_copys(attack, plain, digits, rng):
    copies = [copy.deepcopy(plain) for _ in range(3)]
    for number, model in enumerate(copies):
        model.norm1.num_batches_tracked.fill_(10 + number)
    assert attack.run(copies, Resources.of(digits), rng=rng).model.norm1.num_batches_tracked == 10


@pytest.mark.parametrize("attack", CHOOSING, ids=str)
def test_what_all_copies_share_stays(attack, plain, digits, rng, same):
    assert same(attack.run([plain] * 3, Resources.of(digits), rng=rng).model, plain)


@each
def test_tied_tensors_stay_tied(attack, toy, rng):
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    for model in models:
        model[1].weight = model[0].weight
    made = attack.run(models, Resources.of(toy), rng=rng).model
    assert made[0].weight is made[1].weight


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(attack, dtype, toy, rng):
    made = attack.run([toy.model(rng).to(dtype) for _ in range(3)], Resources.of(toy), rng=rng).model
    assert {tensor.dtype for tensor in made.state_dict().values()} == {dtype}


@each
def test_copies_of_different_models_are_refused(attack, plain, digits, rng):
    with pytest.raises(ModelMismatchError, match="different models"):
        attack.run([plain, plain, nn.Linear(2, 2)], Resources.of(digits), rng=rng)


@pytest.mark.parametrize("name", ["average", "median", "extremes", "majority", "interleave", "framing"])
def test_a_single_copy_is_refused(name, plain, digits, rng):
    with pytest.raises(ParameterError, match="copies"):
        registry.modification(name).run(plain, Resources.of(digits), rng=rng)


def test_large_tensors_are_worked_on_in_parts(monkeypatch, made_of):
    rows = np.random.default_rng(0).normal(size=(3, 101))
    whole = made_of(registry.modification("median"), rows)
    sizes = []
    monkeypatch.setattr(_copies, "_PART", 10)
    combined = _copies._combined([torch.from_numpy(row) for row in rows], lambda stack: _seen(stack, sizes))
    torch.testing.assert_close(combined.float(), whole)
    assert sizes == [10] * 10 + [1]


def _seen(stack, sizes):
    sizes.append(stack.shape[1])
    return stack.median(0).values
