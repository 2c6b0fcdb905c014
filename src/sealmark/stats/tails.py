"""Tails far too thin for counting, simulated where they are: how loose is a bound?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from sealmark.core.errors import ParameterError
from sealmark.stats.nulls import IndependentSum

_CHUNK = 1 << 20  # terms drawn at a time


def simulated_tail(
    null: IndependentSum, statistic: float, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """P(S >= statistic) itself, where `IndependentSum.log_p` bounds it.

    Importance sampling: terms are drawn from the law tilted by ``exp(theta S)``, whose mean is the statistic,
    so that about half the draws lie in the tail, and are weighted back by ``exp(K(theta) - theta S)``. The
    estimate is unbiased at any depth. A simulation is no proof: it measures a bound and replaces none.

    Args:
        null: the law.
        statistic: between the mean of the sum and its maximum.
        draws: how many sums.
        rng: for them.

    Returns:
        The natural logarithm of the probability, and its relative standard error.

    Raises:
        ParameterError: fewer than two draws, or the statistic is not above the mean and below the maximum.

    Example:
        >>> coins = IndependentSum(np.zeros(40), np.ones(40), np.full(40, 0.5))
        >>> log_p, error = simulated_tail(coins, 36, 20_000, np.random.default_rng(0))
        >>> exact = sum(math.comb(40, k) for k in range(36, 41)) / 2**40
        >>> abs(math.exp(log_p) / exact - 1) < 4 * error < 0.1
        True
    """
    low, step = null.low, null.high - null.low
    log_odds = np.log(null.p) - np.log1p(-null.p)
    mean, most = float((low + null.p * step).sum()), float(np.maximum(low, null.high).sum())
    if draws < 2 or not mean < statistic < most:
        raise ParameterError(
            "no tail to simulate",
            expected=f"two draws or more, a statistic in ({mean:.4g}, {most:.4g})",
            found=(draws, statistic),
        )

    def tilted(theta: float) -> NDArray[np.float64]:
        return np.asarray(expit(log_odds + theta * step))

    def short(theta: float) -> float:
        return float((low + tilted(theta) * step).sum()) - statistic

    most_tilted = 1.0
    while short(most_tilted) < 0:
        most_tilted *= 2
    theta = float(brentq(short, 0, most_tilted))
    p = tilted(theta)
    # K(theta) = log E exp(theta S), term by term
    moment = float(np.logaddexp(np.log(null.p) + theta * null.high, np.log1p(-null.p) + theta * low).sum())
    weights, size = np.zeros(draws), max(1, _CHUNK // len(p))
    for start in range(0, draws, size):
        part = weights[start : start + size]
        sums = (rng.random((len(part), len(p))) < p) @ step + low.sum()
        part[:] = np.where(sums >= statistic - 1e-9 * abs(statistic), np.exp(theta * (statistic - sums)), 0)
    average = float(weights.mean())
    return moment - theta * statistic + math.log(average), float(weights.std() / average / math.sqrt(draws))
