"""Holm and Fisher against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ParameterError
from sealmark.stats.calibration import super_uniformity
from sealmark.stats.multiplicity import combine, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def _closed(p_values: list[float]) -> list[float]:
    """Holm's by its definition: the closure of Bonferroni's test over all intersections."""
    adjusted = [0.0] * len(p_values)
    for size in range(1, len(p_values) + 1):
        for subset in itertools.combinations(range(len(p_values)), size):
            p = min(1.0, size * min(p_values[i] for i in subset))
            for i in subset:
                adjusted[i] = max(adjusted[i], p)
    return adjusted


@given(P_VALUES)
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    assert holm(p_values).tolist() == pytest.approx(_closed(p_values))


def test_holm_keeps_the_order_that_it_was_given() -> None:
    assert holm([0.5, 0.001, 0.02]).tolist() == pytest.approx([0.5, 0.003, 0.04])


def test_holm_bounds_the_chance_of_any_false_claim_and_no_correction_does_not() -> None:
    p_values = np.random.default_rng(0).random((2000, 10))
    corrected = np.mean([holm(row).min() <= 0.05 for row in p_values])
    assert corrected <= 0.05 + 3 * math.sqrt(0.05 / 2000)
    assert (p_values.min(1) <= 0.05).mean() > 0.3


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=6))
def test_the_combination_is_fishers(p_values: list[float]) -> None:
    half = -sum(math.log(p) for p in p_values)  # half a chi-square with 2 m degrees of freedom
    expected = math.exp(-half) * sum(half**i / math.factorial(i) for i in range(len(p_values)))
    assert combine(p_values) == pytest.approx(expected, rel=1e-9)


def test_one_certain_claim_makes_the_combination_certain() -> None:
    assert combine([0.0, 1.0]) == 0


def test_a_combination_of_uniform_p_values_is_uniform_and_of_small_ones_is_small() -> None:
    p_values = np.random.default_rng(0).random((300, 4))
    assert super_uniformity([combine(row) for row in p_values]) > 1e-3
    assert super_uniformity([combine(row / 2) for row in p_values]) < 1e-9


@pytest.mark.parametrize("p_values", [[], [0.5, -0.1], [1.1], [math.nan]])
def test_what_are_no_p_values_are_refused(p_values: list[float]) -> None:
    for function in (holm, combine):
        with pytest.raises(ParameterError, match="bad p-values"):
            function(p_values)
