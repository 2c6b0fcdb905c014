"""From a law back to the statistic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from sealmark.codes.bibd import InnocentWord
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import AlignedNull
from sealmark.stats.nulls import Binomial, IndependentSum, KeyedProjection, Population
from sealmark.stats.thresholds import threshold

RNG = np.random.default_rng(0)
NULLS = [
    Binomial(64, 0.5),
    Binomial(100, 0.5, two_sided=True),
    Binomial(40, 0.1),
    KeyedProjection(),
    KeyedProjection(signs=False, two_sided=True),
    IndependentSum(-RNG.uniform(size=80), RNG.uniform(size=80), RNG.uniform(0.1, 0.9, 80)),
    InnocentWord(31, 5),
    Population.of(RNG.normal(-5, 1, 500)),
    AlignedNull(KeyedProjection()),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NULLS), st.floats(-30, -0.1))
def test_a_threshold_suffices_and_less_does_not(null, log_alpha):
    found = threshold(null, log_alpha)
    if math.isinf(found):
        assert null.floor > log_alpha
    else:
        assert null.log_p(found) <= log_alpha
        less = found - 1 if isinstance(null, Binomial) else found - 1e-6 * abs(found)
        assert null.log_p(less) > log_alpha


@pytest.mark.parametrize("alpha", [0.4, 1e-6, 1e-300])
def test_thresholds_of_a_normal_law_are_its_quantiles(alpha):
    assert threshold(KeyedProjection(signs=False), math.log(alpha)) == pytest.approx(norm.isf(alpha), rel=1e-9)


def test_levels_too_small_for_a_double_have_a_threshold():
    found = threshold(KeyedProjection(signs=False), -5000.0)
    assert norm.logsf(found) == pytest.approx(-5000)


@pytest.mark.parametrize(("bits", "alpha"), [(256, 1e-6), (64, 1e-3), (16, 1e-6)])
def test_matches_needed_are_those_that_the_binomial_law_itself_counts(bits, alpha):
    null = Binomial(bits, 0.5, two_sided=True)
    found = threshold(null, math.log(alpha))
    assert found == null.needed(alpha) if found < math.inf else null.needed(alpha) > bits


def test_a_threshold_may_be_negative():
    assert threshold(Population((-9.0, -8.0, -7.0)), math.log(0.3)) == pytest.approx(-7)


def test_a_level_below_the_floor_has_none():
    assert threshold(Population((1.0, 2.0)), math.log(0.3)) == math.inf


def test_where_every_statistic_suffices_there_is_none_either():
    assert threshold(Sure(), -1.0) == -math.inf


class Sure(KeyedProjection):
    def log_p(self, statistic):
        return -2.0


@pytest.mark.parametrize("log_alpha", [0.0, 1.0, math.nan])
def test_levels_of_one_or_more_are_refused(log_alpha):
    with pytest.raises(ParameterError):
        threshold(KeyedProjection(), log_alpha)
