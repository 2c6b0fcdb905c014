"""Copies of the digits model for several users, and whom a surrogate names."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.suspect import WhiteBox

USERS = [f"user{number}" for number in range(200)]


def _case(scheme, plain, task, users, size):
    secret = scheme.enroll(plain, task, users=users, rng=np.random.default_rng(0))
    copies = [scheme.issue(plain, secret, user, task=task).model for user in users[:size]]

    def accused(model, original=plain):
        return {entry.user for entry in scheme.trace(WhiteBox(model), secret, users, original=original).accused}

    def after(name, size=3, **parameters):
        """What an attack by the first few users makes of their copies."""
        attack = registry.modification(name, **parameters)
        return attack.run(copies[:size], Resources.of(task), rng=np.random.default_rng(0)).model

    return SimpleNamespace(
        scheme=scheme, secret=secret, users=users, copies=copies, accused=accused, after=after, original=plain
    )


@pytest.fixture(scope="session")
def spread(plain, digits):
    """Ten spread-spectrum copies, for a code against three colluders, among 200 users."""
    return _case(registry.scheme("spread_spectrum"), plain, digits, USERS, 10)


@pytest.fixture(scope="session")
def words_of_a_code(plain, digits):
    """Three DeepMarks copies, for a code against five colluders, among 20 users."""
    return _case(registry.scheme("deepmarks"), plain, digits, USERS[:20], 3)


@pytest.fixture
def holding():
    """A model of one matrix, made of one row of numbers."""

    def make(numbers, dtype=torch.float32):
        model = nn.Linear(len(numbers), 1, bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(torch.as_tensor(numbers, dtype=torch.float64)[None])
        return model

    return make


@pytest.fixture
def made_of(holding, toy):
    """What an attack makes of several rows of numbers: one row."""

    def run(attack, rows, seed=0, dtype=torch.float32):
        models = [holding(row, dtype) for row in rows]
        result = attack.run(models, Resources.of(toy), rng=np.random.default_rng(seed)).model
        return result.weight.detach()[0]

    return run
