"""The e-process against exact sums, Ville's bound and the published table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sealmark.core.errors import ParameterError
from sealmark.stats.sequential import EProcess


def _stopped(p0: float, rate: float, alpha: float, limit: int) -> NDArray[np.float64]:
    """Exact chance that the evidence sufficed by query 1 .. limit, for matches of chance ``rate``."""
    running, stopped, needed = np.array([1.0]), [0.0], 0
    process = EProcess(p0)
    for n in range(1, limit + 1):
        running = np.append(running * (1 - rate), 0) + np.append(0, running * rate)
        while needed <= n:  # the fewest matches that suffice grow with the number of queries
            process.queries, process.matches = n, needed
            if process.log_e >= -math.log(alpha):
                break
            needed += 1
        stopped.append(stopped[-1] + running[needed:].sum())
        running[needed:] = 0
    return np.array(stopped[1:])


def _after(p0: float, matches: int, misses: int) -> EProcess:
    process = EProcess(p0)
    for match in [True] * matches + [False] * misses:
        process.add(match)
    return process


@pytest.mark.parametrize(("p0", "matches", "misses"), [(0.1, 0, 0), (0.1, 3, 0), (0.3, 5, 7), (0.5, 0, 4)])
def test_the_e_value_is_the_mean_of_the_likelihood_ratios(p0: float, matches: int, misses: int) -> None:
    rates = [p0 + (1 - p0) * i / 12 for i in range(1, 13)]
    expected = sum((q / p0) ** matches * ((1 - q) / (1 - p0)) ** misses for q in rates) / 12
    assert math.exp(_after(p0, matches, misses).log_e) == pytest.approx(expected)


@pytest.mark.parametrize("p0", [0.1, 0.5, 0.9])
def test_the_expected_e_value_is_one_under_the_null(p0: float) -> None:
    n = 12
    mean = sum(
        math.comb(n, k) * p0**k * (1 - p0) ** (n - k) * math.exp(_after(p0, k, n - k).log_e) for k in range(n + 1)
    )
    assert mean == pytest.approx(1)


def test_the_expected_e_value_exceeds_one_when_matches_are_more_likely() -> None:
    n, p = 12, 0.4
    mean = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) * math.exp(_after(0.1, k, n - k).log_e) for k in range(n + 1)
    )
    assert mean > 10


@pytest.mark.parametrize(("p0", "alpha"), [(0.1, 1e-6), (0.2, 1e-3), (0.3, 0.05), (0.5, 0.2)])
def test_stopping_at_will_errs_at_most_alpha_of_the_time(p0: float, alpha: float) -> None:
    assert 0 < _stopped(p0, p0, alpha, 300)[-1] <= alpha


def test_a_suspect_that_matches_more_often_is_found_in_the_end() -> None:
    assert _stopped(0.3, 0.5, 1e-6, 600)[-1] > 0.999


def test_a_fixed_sample_test_looked_at_after_every_query_would_err_more_often() -> None:
    rng, runs, alpha = np.random.default_rng(0), 400, 0.05
    draws = rng.random((runs, 120)) < 0.3
    n = np.arange(1, 121)
    z = (draws.cumsum(1) - 0.3 * n) / np.sqrt(0.21 * n)
    assert (z.max(1) > 1.645).mean() > 3 * alpha


# attacks card, C.6: median queries until E >= 1/alpha, for a suspect that matches at rate w
@pytest.mark.parametrize(
    ("p0", "alpha", "medians"),
    [
        (0.1, 1e-3, {1.0: 4, 0.9: 4, 0.7: 8, 0.5: 15}),
        (0.1, 1e-6, {1.0: 7, 0.9: 9, 0.7: 14, 0.5: 29}),
        (0.1, 1e-9, {1.0: 10, 0.9: 13, 0.7: 21, 0.5: 42}),
        (0.2, 1e-6, {1.0: 10, 0.9: 13, 0.7: 25, 0.5: 64}),
        (0.3, 1e-6, {1.0: 14, 0.9: 20, 0.7: 42, 0.5: 169}),
    ],
)
def test_the_verdict_comes_after_as_many_queries_as_published(
    p0: float, alpha: float, medians: dict[float, int]
) -> None:
    for rate, median in medians.items():
        found = 1 + int(np.searchsorted(_stopped(p0, rate, alpha, 2 * median), 0.5))
        assert found == pytest.approx(median, abs=max(1, 0.05 * median)), rate


def test_every_match_counts_until_the_verdict() -> None:
    for p0, queries in ((0.1, 7), (0.2, 10), (0.3, 14)):
        assert not _after(p0, queries - 1, 0).reached(1e-6)
        assert _after(p0, queries, 0).reached(1e-6)


def test_the_p_value_never_rises_again() -> None:
    process = _after(0.1, 5, 0)
    best = process.p_value
    for _ in range(50):
        process.add(False)
    assert process.p_value == best == pytest.approx(math.exp(-_after(0.1, 5, 0).log_e))
    assert process.log_e < 0


def test_a_suspect_that_never_matches_proves_nothing() -> None:
    process = _after(0.1, 0, 100)
    assert process.p_value == 1
    assert not process.reached(0.5)
    assert (process.queries, process.matches) == (100, 0)


@pytest.mark.parametrize("p0", [n / 20 for n in range(1, 20)])
def test_one_miss_rules_certainty_out_and_leaves_the_rest(p0: float) -> None:
    assert math.isfinite(_after(p0, 40, 1).log_e)
    assert _after(p0, 40, 1).log_e < _after(p0, 41, 0).log_e
    assert _after(p0, 200, 1).reached(0.05)


@pytest.mark.parametrize(("p0", "points"), [(0, 12), (1, 12), (math.nan, 12), (0.1, 0)])
def test_a_process_that_means_nothing_is_refused(p0: float, points: int) -> None:
    with pytest.raises(ParameterError, match="bad e-process"):
        EProcess(p0, points)


@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_a_level_that_means_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(ParameterError, match="bad level alpha"):
        EProcess(0.1).reached(alpha)
