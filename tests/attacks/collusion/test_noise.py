"""Noise: enough of it hides the mark, and costs the model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sealmark.attacks.collusion.noise import Noise
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError


def test_it_is_gaussian_about_the_average_in_units_of_the_tensor(made_of):
    rows = np.random.default_rng(0).normal(scale=3, size=(2, 20000))
    noise = made_of(Noise(0.5), rows).double().numpy() - rows.mean(0)
    assert noise.std() == pytest.approx(0.5 * rows.mean(0).std(), rel=0.03)
    assert abs(noise.mean()) < 0.05
    assert np.mean(abs(noise) < noise.std()) == pytest.approx(0.683, abs=0.02)


def test_vectors_are_the_averages(plain, digits, rng):
    made = Noise(1.0).run([plain, plain], Resources.of(digits), rng=rng).model
    assert torch.equal(made.norm1.running_var, plain.norm1.running_var)
    assert not torch.equal(made.conv1.weight, plain.conv1.weight)


def test_one_copy_will_do(spread, digits):
    assert spread.accused(spread.after("noise", 1, level=0.1)) == {"user0"}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_noise_that_leaves_the_model_usable_leaves_the_mark(size, spread, digits, plain):
    pirate = spread.after("noise", size, level=0.2)
    found = spread.accused(pirate)
    assert found
    assert found <= set(spread.users[:size])
    assert digits.score(pirate) >= digits.score(plain) - 0.02


def test_known_break_noise_hides_three_at_the_price_of_the_model(spread, digits, plain):
    pirate = spread.after("noise", level=1.0)
    assert spread.accused(pirate) == set()
    assert digits.score(pirate) < digits.score(plain) - 0.5


@pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
def test_bad_levels_are_refused(level):
    with pytest.raises(ParameterError, match="level"):
        Noise(level)
