"""Laws that are learned from models which have nothing to do with the protected one.

The unit is the model, not the query: m models certify 1 / (m + 1) and no less, whatever a fitted curve says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import betabinom

from sealmark.core.errors import ParameterError
from sealmark.core.ownership import Verifiable
from sealmark.core.secret import Secret
from sealmark.core.suspect import Suspect
from sealmark.stats.nulls import Population


def population_of(scheme: Verifiable, secret: Secret, models: Iterable[Suspect]) -> Population:
    """What a judge's own models say under a secret: the law to hold a suspect against.

    A malicious accuser chooses triggers that every model answers alike. Models that he has not chosen show it:
    pass the result as ``verify(..., population=)``.

    Args:
        scheme: of the secret.
        secret: is checked first.
        models: independent of the protected one, and at least as like it as any innocent party's would be:
            same data, same architecture.

    Raises:
        ParameterError: no models.
        ForgedSecretError: the secret does not re-derive.
    """
    scheme.check_secret(secret)
    return Population.of(scheme.score(model, secret).statistic for model in models)


def beta_binomial_log_p(matches: int, n: int, population: Sequence[int]) -> float:
    """An extrapolation beyond what a population can certify: log P(M >= matches) under a fitted beta-binomial.

    Match rates vary between models; a binomial at their mean is wrong by orders of magnitude in the tail, and
    this curve is a guess there too. It goes into details, never into a verdict.

    Args:
        matches: of the suspect.
        n: points asked.
        population: (m,) matches of each independent model.

    Raises:
        ParameterError: fewer than two models, or counts outside 0 .. n.

    Example:
        >>> import math
        >>> round(math.exp(beta_binomial_log_p(28, 100, [4, 16, 9, 7, 20, 12, 3, 9])), 3)
        0.006
    """
    counts = np.asarray([*population, matches], np.int64)
    if len(counts) < 3 or counts.min() < 0 or counts.max() > n:
        raise ParameterError("bad population", expected=f"two counts or more in 0 .. {n}", found=list(population))
    counts = counts[:-1]
    mean = float(np.clip(counts.mean() / n, 0.5 / n, 1 - 0.5 / n))

    def cost(logs: np.ndarray) -> float:
        a, b = np.exp(logs)
        return -float(betabinom.logpmf(counts, n, a, b).sum())

    fit = minimize(
        cost, np.log([10 * mean, 10 * (1 - mean)]), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8}
    )
    a, b = np.exp(np.clip(fit.x, -20, 20))
    tail = betabinom.logpmf(np.arange(matches, n + 1), n, a, b)  # logsf rounds small tails away
    return min(0.0, float(logsumexp(tail)))
