"""Do p-values hold? And intervals for rates that were counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import beta, kstest

from sealmark.core.errors import ParameterError


def super_uniformity(p_values: Sequence[float]) -> float:
    """P-value of the hypothesis that P(p <= u) <= u for all u: small means the null does NOT hold.

    One-sided Kolmogorov-Smirnov: p-values that are too large are no fault.

    Args:
        p_values: (m,) from suspects that were made without the secret.

    Raises:
        ParameterError: fewer than 10 values say nothing.

    Example:
        >>> super_uniformity(np.linspace(0, 1, 50)) > 0.5, super_uniformity(np.linspace(0, 0.1, 50)) < 1e-9
        (True, True)
    """
    if len(p_values) < 10:
        raise ParameterError("too few p-values", expected="10 or more", found=len(p_values))
    return float(kstest(np.asarray(p_values, np.float64), "uniform", alternative="greater").pvalue)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval for a rate (Clopper and Pearson 1934).

    Raises:
        ParameterError: not 0 <= successes <= trials with trials >= 1, or confidence not in (0, 1).

    Example:
        >>> [round(x, 3) for x in clopper_pearson(83, 100)]
        [0.742, 0.898]
    """
    if not (0 <= successes <= trials and trials >= 1 and 0 < confidence < 1):
        raise ParameterError(
            "bad counts", expected="0 <= successes <= trials", found=(successes, trials, confidence)
        )
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.isf(tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def bound_from_silence(models: int, confidence: float = 0.95) -> float:
    """Upper bound on a false-positive rate when none of ``models`` independent models matched.

    Example:
        >>> round(bound_from_silence(30), 3)
        0.095
    """
    return clopper_pearson(0, models, 2 * confidence - 1)[1]
