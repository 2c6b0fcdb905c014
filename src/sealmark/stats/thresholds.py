"""From a law back to the statistic: where accusations begin."""

from __future__ import annotations

import math
from bisect import bisect_left

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import AlignedNull, Null
from sealmark.stats.nulls import Binomial

_LARGEST = 2.0**1000
_STEPS = 200  # halvings; doubles are exhausted long before


def threshold(null: Null, log_alpha: float) -> float:
    """The least statistic whose p-value is at most alpha: for a plot, a verdict needs no threshold.

    By bisection of `Null.log_p`, to a relative 1e-12; the answer itself always suffices. For a `Binomial` it
    is the number of matches that it takes, for a two-sided one counted on the larger side.

    Args:
        null: whose ``log_p`` falls as the statistic grows.
        log_alpha: natural logarithm of alpha, which may be too small for a double; below 0.

    Returns:
        inf where no statistic suffices, -inf where every one does.

    Raises:
        ParameterError: ``log_alpha`` is not below 0.

    Example:
        >>> from sealmark.stats.nulls import KeyedProjection
        >>> round(threshold(KeyedProjection(signs=False), math.log(0.025)), 4)
        1.96
        >>> threshold(Binomial(256, 0.5), math.log(1e-6)), threshold(Binomial(16, 0.5), math.log(1e-6))
        (167.0, inf)
    """
    if not log_alpha < 0:
        raise ParameterError("bad level", expected="log_alpha < 0", found=log_alpha)
    if isinstance(null, AlignedNull):
        return threshold(null.null, log_alpha)
    if isinstance(null, Binomial):
        counts = range((null.n + 1) // 2 if null.two_sided else 0, null.n + 1)
        place = bisect_left(counts, -log_alpha, key=lambda count: -null.log_p(count))
        return float(counts[place]) if place < len(counts) else math.inf

    def enough(statistic: float) -> bool:
        return null.log_p(statistic) <= log_alpha

    high, low = 1.0, -1.0
    while not enough(high):
        if high >= _LARGEST:
            return math.inf
        low, high = high, 2 * high
    while enough(low):
        if low <= -_LARGEST:
            return -math.inf
        low, high = 2 * low, low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if high - low <= 1e-12 * abs(middle):
            break
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
