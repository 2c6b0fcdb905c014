"""Simulated tails beside exact ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from sealmark.core.errors import ParameterError
from sealmark.stats.nulls import IndependentSum
from sealmark.stats.tails import simulated_tail


def coins(count, p=0.5):
    return IndependentSum(np.zeros(count), np.ones(count), np.full(count, p))


@pytest.mark.parametrize(
    ("count", "p", "matches"), [(64, 0.5, 50), (1000, 0.5, 650), (300, 0.02, 30), (256, 0.5, 250)]
)
def test_a_tail_is_the_exact_one_within_its_error(count, p, matches):
    log_p, error = simulated_tail(coins(count, p), matches, 20_000, np.random.default_rng(0))
    assert error < 0.05
    assert math.exp(log_p - binom.logsf(matches - 1, count, p)) == pytest.approx(1, abs=4 * error)


def test_many_small_terms_have_a_normal_tail():
    rng = np.random.default_rng(0)
    height = rng.uniform(0.5, 1.5, 40_000)
    height /= np.linalg.norm(height)
    log_p, error = simulated_tail(IndependentSum(-height, height, np.full(40_000, 0.5)), 5.0, 4000, rng)
    assert math.exp(log_p - norm.logsf(5.0)) == pytest.approx(1, abs=4 * error)


def test_terms_that_are_high_where_they_are_low_count_as_well():
    mirrored = IndependentSum(np.ones(64), np.zeros(64), np.full(64, 0.5))
    log_p, error = simulated_tail(mirrored, 50, 20_000, np.random.default_rng(0))
    assert math.exp(log_p - binom.logsf(49, 64, 0.5)) == pytest.approx(1, abs=4 * error)


@pytest.mark.parametrize(("statistic", "draws"), [(32, 100), (64, 100), (65, 100), (50, 1)])
def test_where_there_is_no_tail_none_is_simulated(statistic, draws):
    with pytest.raises(ParameterError, match="no tail"):
        simulated_tail(coins(64), statistic, draws, np.random.default_rng(0))
