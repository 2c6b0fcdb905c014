"""Calibration against closed formulas and published intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ParameterError
from sealmark.stats.calibration import bound_from_silence, clopper_pearson, super_uniformity


def _birnbaum_tingey(p_values: list[float]) -> float:
    """Exact P(D+ >= d) of the one-sided Kolmogorov-Smirnov test (Birnbaum and Tingey 1951)."""
    n, ordered = len(p_values), sorted(p_values)
    d = max(0.0, *((i + 1) / n - p for i, p in enumerate(ordered)))
    if d == 0:
        return 1.0
    return d * sum(
        math.comb(n, j) * (d + j / n) ** (j - 1) * (1 - d - j / n) ** (n - j) for j in range(int(n * (1 - d)) + 1)
    )


@given(st.lists(st.floats(0.01, 1), min_size=10, max_size=20))
def test_super_uniformity_is_the_exact_one_sided_kolmogorov_smirnov_test(p_values: list[float]) -> None:
    assert super_uniformity(p_values) == pytest.approx(min(1, _birnbaum_tingey(p_values)), abs=1e-9)


def test_uniform_p_values_pass_at_the_rate_of_the_level() -> None:
    rng = np.random.default_rng(0)
    found = np.array([super_uniformity(rng.random(30)) for _ in range(300)])
    assert (found <= 0.1).mean() == pytest.approx(0.1, abs=0.06)


def test_p_values_that_are_too_large_are_no_fault_and_too_small_ones_are() -> None:
    uniform = np.random.default_rng(0).random(100)
    assert super_uniformity(np.sqrt(uniform)) > 0.5
    assert super_uniformity(uniform**3) < 1e-6


def test_fewer_than_ten_p_values_say_nothing() -> None:
    with pytest.raises(ParameterError, match="expected 10 or more, found 9"):
        super_uniformity([0.5] * 9)


# attacks card, C.4
@pytest.mark.parametrize(
    ("successes", "interval"), [(83, (0.742, 0.898)), (98, (0.930, 0.998)), (100, (0.964, 1.0)), (0, (0.0, 0.036))]
)
def test_intervals_are_the_published_ones(successes: int, interval: tuple[float, float]) -> None:
    assert clopper_pearson(successes, 100) == pytest.approx(interval, abs=0.0005)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_at_each_end_the_tail_is_half_of_what_is_left(counts: tuple[int, int], confidence: float) -> None:
    successes, trials = counts
    low, high = clopper_pearson(successes, trials, confidence)

    def mass(rate: float, ks: range) -> float:
        return sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in ks)

    tail = (1 - confidence) / 2
    if successes:
        assert mass(low, range(successes, trials + 1)) == pytest.approx(tail, rel=1e-6)
    else:
        assert low == 0
    if successes < trials:
        assert mass(high, range(successes + 1)) == pytest.approx(tail, rel=1e-6)
    else:
        assert high == 1


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (0, 0), (1, 10, 0.0), (1, 10, 1.0), (1, 10, math.nan)])
def test_counts_that_mean_nothing_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ParameterError, match="bad counts"):
        clopper_pearson(*arguments)  # type: ignore[arg-type]


# attacks card, C.3, T3: no match among so many models certifies no more than this
@pytest.mark.parametrize(("models", "bound"), [(28, 0.101), (60, 0.049), (300, 0.010), (3000, 0.0010)])
def test_silence_of_a_population_certifies_the_published_rates(models: int, bound: float) -> None:
    assert bound_from_silence(models) == pytest.approx(bound, abs=0.0006)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_bound_from_silence_is_the_rate_at_which_silence_is_that_unlikely(confidence: float) -> None:
    bound = bound_from_silence(40, confidence)
    assert (1 - bound) ** 40 == pytest.approx(1 - confidence)
