from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.training import train_task


@pytest.fixture(scope="module")
def noisy():
    return registry.task("noisy_digits")


def test_noise_is_fixed_and_of_the_stated_size(noisy, digits):
    again = registry.task("noisy_digits")
    assert torch.equal(noisy.test.inputs, again.test.inputs)
    noise = noisy.owner.inputs - digits.owner.inputs[:200]
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    assert noise.mean().abs() < 0.02


def test_splits_are_disjoint_and_lose_no_row(noisy, digits):
    rows = torch.cat([noisy.owner.inputs, noisy.attacker.inputs, noisy.test.inputs]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 1797
    assert torch.equal(noisy.owner.targets, digits.owner.targets[:200])


def test_net_knows_its_own_rows_and_few_others(noisy):
    model = train_task(noisy, rng=np.random.default_rng(0))
    assert noisy.score(model, noisy.owner) == 1
    assert 0.4 < noisy.score(model) < 0.8
