"""A model with a mark of triggers, for attacks that never see its weights."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Recipe


@pytest.fixture(scope="session")
def mark():
    """Verifies the mark: how many triggers, of 30, a model still answers as it was taught."""
    return registry.scheme("adi")


@pytest.fixture(scope="session")
def marked(digits, mark):
    """A marked model, its secret, and the share of its triggers that a model knows; do not change it."""
    rng = np.random.default_rng(0)
    start = digits.model(rng)
    secret = mark.keygen(start, digits, rng=np.random.default_rng(1))
    made = mark.embed(start, secret, digits, rng=rng)
    triggers = mark.trigger_set(made.secret)

    def known(model):
        return (WhiteBox(model).labels(triggers.inputs) == triggers.targets).float().mean().item()

    return SimpleNamespace(model=made.model.eval(), secret=made.secret, triggers=triggers, known=known)


@pytest.fixture(scope="session")
def words():
    """Digits as words, and a net that learns to read them within a second."""
    return dataclasses.replace(
        registry.task("tokens"),
        make=lambda: nn.Sequential(
            nn.Embedding(289, 8), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        recipe=Recipe(epochs=20, rate=0.1, clip=1.0),
    )


@pytest.fixture
def same():
    """Whether two models agree in every bit."""

    def compare(one, other):
        one, other = one.state_dict(), other.state_dict()
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare
