"""Many hypotheses at once: corrections and combinations of p-values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import combine_pvalues

from sealmark.core.errors import ParameterError


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Adjusted p-values with strong control of the family-wise error (Holm 1979): for a claim in court.

    Args:
        p_values: (m,) in [0, 1].

    Returns:
        (m,) in the order given; those at most alpha may be claimed together.

    Raises:
        ParameterError: a value is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    values = _checked(p_values)
    order = np.argsort(values, kind="stable")
    steps = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def combine(p_values: Sequence[float]) -> float:
    """One p-value for one claim with several independent keys (Fisher's method).

    Raises:
        ParameterError: a value is not in [0, 1], or there is none.

    Example:
        >>> round(combine([1e-4, 1e-3]), 8)
        1.71e-06
    """
    values = _checked(p_values)
    return float(combine_pvalues(values, method="fisher").pvalue) if values.all() else 0.0


def _checked(p_values: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(p_values, np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ParameterError("bad p-values", expected="one or more in [0, 1]", found=list(p_values))
    return values
