"""Laws of a statistic on suspects that were made without the secret.

`Binomial`, `Hypergeometric`, `KeyedProjection` and `IndependentSum` hold for ANY suspect, because the
randomness is the owner's: the key was drawn independently of it. `Permutation` ranks among fresh
secrets on the same suspect and holds for the same reason, to the depth of the number drawn.
`Population` ranks among independently trained models and is as good as that population.

All p-values are computed as logarithms and never rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_ndtr, logsumexp
from scipy.stats import binom

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Null, Score, check_alpha

# Bentkus & Dzindzalieta (Bernoulli 21(2), 2015): P(S >= t) <= c P(Z >= t) for every weighted sum S of
# independent signs with unit variance; c = 1 / (4 P(Z >= sqrt 2)) is the best constant.
_LOG_RADEMACHER = -math.log(4) - float(log_ndtr(-math.sqrt(2)))


@dataclass(frozen=True)
class Binomial(Null):
    """Matches of keyed random symbols: exactly Bin(n, p), whatever the suspect answers.

    The symbols, not the answers, are random: conditional on the suspect each match is an independent
    event of probability ``p``.

    Args:
        n: symbols compared.
        p: probability that one matches: 1/2 for bits, 1/K for labels of K classes.
        two_sided: also count n - k matches as k. It costs one bit and defeats a thief who inverts the
            mark; for p = 1/2 alone.
        bound: ``p`` is the largest chance that any suspect can have: 1/(K-1) for a label drawn from the K - 1
            classes that are wrong, which a suspect that answers right never gives.

    Raises:
        ParameterError: n < 1, p not in (0, 1), or two-sided with another p.

    Example:
        >>> round(math.exp(Binomial(10, 0.5).log_p(10)) * 2**10, 6)
        1.0
    """

    n: int
    p: float
    two_sided: bool = False
    bound: bool = False

    @property
    def basis(self) -> Basis:  # type: ignore[override]
        """Exact; a bound where ``p`` is one."""
        return Basis.BOUND if self.bound else Basis.EXACT

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 < self.p < 1 or (self.two_sided and self.p != 0.5):
            raise ParameterError("bad binomial null", expected="n >= 1, 0 < p < 1", found=(self.n, self.p))

    def __str__(self) -> str:
        law = f"Bin({self.n}, {self.p:.4g}){', two-sided' if self.two_sided else ''}"
        return f"at most {law}" if self.bound else law

    def log_p(self, statistic: float) -> float:
        """Log P(M >= statistic); two-sided: log P(max(M, n - M) >= max(statistic, n - statistic))."""
        if not self.two_sided:
            return _log_tail(math.ceil(statistic), self.n, self.p)
        extreme = math.ceil(max(statistic, self.n - statistic))
        return min(0.0, math.log(2) + _log_tail(extreme, self.n, 0.5))

    @property
    def floor(self) -> float:
        """Log P of all n matching."""
        return min(0.0, self.n * math.log(self.p) + (math.log(2) if self.two_sided else 0.0))

    def needed(self, alpha: float) -> int:
        """The fewest matches whose p-value is at most ``alpha``; n + 1 where none is.

        Raises:
            ParameterError: ``alpha`` is not in (0, 1).

        Example:
            >>> Binomial(256, 0.5).needed(1e-6), Binomial(16, 0.5).needed(1e-6)
            (167, 17)
        """
        check_alpha(alpha)
        low = (self.n + 1) // 2 if self.two_sided else 0
        counts = range(low, self.n + 1)
        return next((k for k in counts if self.log_p(k) <= math.log(alpha)), self.n + 1)


def score_of_bits(matches: int, bits: int) -> Score:
    """Keyed bits read from a suspect: how many match, two-sided, since a thief could invert them all.

    Example:
        >>> score_of_bits(60, 64).details
        {'bits': 64, 'ber': 0.0625}
    """
    return Score(matches, Binomial(bits, 0.5, two_sided=True), {"bits": bits, "ber": 1 - matches / bits})


def _log_tail(k: int, n: int, p: float) -> float:
    """Log P(Bin(n, p) >= k), also where the probability is too small for a double."""
    if k > n:
        return -math.inf
    tail = float(binom.sf(k - 1, n, p))
    if tail > 1e-290:
        return min(0.0, math.log(tail))
    return float(logsumexp(binom.logpmf(np.arange(k, n + 1), n, p)))


@dataclass(frozen=True)
class KeyedProjection(Null):
    """Projection of anything the suspect shows on keyed random directions.

    The statistic is <s, v> / |v| for a vector v of the suspect and keyed s that is independent of it.

    Args:
        signs: s has independent fair signs: p is at most c P(Z >= t) with c = 3.178 (Bentkus and
            Dzindzalieta 2015), a proven bound for every v. Otherwise s is standard normal and p is
            exactly P(Z >= t).
        two_sided: the statistic is an absolute value.

    Example:
        >>> round(math.exp(KeyedProjection(signs=False).log_p(1.6449)), 4)
        0.05
        >>> KeyedProjection().log_p(6.0) > KeyedProjection(signs=False).log_p(6.0)
        True
    """

    signs: bool = True
    two_sided: bool = False

    @property
    def basis(self) -> Basis:  # type: ignore[override]
        """A bound for signs, exact for normal directions."""
        return Basis.BOUND if self.signs else Basis.EXACT

    def __str__(self) -> str:
        return f"a projection on keyed {'signs' if self.signs else 'normal directions'}"

    def log_p(self, statistic: float) -> float:
        """See `Null.log_p`; statistics at or below 0 give 0."""
        if statistic <= 0 or math.isnan(statistic):
            return 0.0
        extra = (_LOG_RADEMACHER if self.signs else 0.0) + (math.log(2) if self.two_sided else 0.0)
        return min(0.0, float(log_ndtr(-statistic)) + extra)

    @property
    def floor(self) -> float:
        """No limit."""
        return -math.inf


@dataclass(frozen=True, eq=False)
class IndependentSum(Null):
    """A sum of independent terms, each of which is ``high[i]`` with chance ``p[i]``, else ``low[i]``.

    Chernoff's bound: P(S >= t) <= min over theta of prod E exp(theta S_i) / exp(theta t), a proven bound
    for any terms. It holds for the score of an innocent user of a bias-based code: given the suspect
    and the biases, an innocent's symbols are independent of both.

    Args:
        low: (n,) value of a term otherwise.
        high: (n,) value of a term with chance ``p``.
        p: (n,) in (0, 1).

    Raises:
        ParameterError: the three differ in shape, or a chance is not in (0, 1).
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    basis = Basis.BOUND

    def __post_init__(self) -> None:
        shapes = {np.shape(values) for values in (self.low, self.high, self.p)}
        if len(shapes) > 1 or not ((self.p > 0) & (self.p < 1)).all():
            raise ParameterError("bad terms", expected="three arrays (n,), p in (0, 1)", found=sorted(shapes))

    @cached_property
    def _terms(self) -> tuple[NDArray[np.float64], ...]:
        """Distinct terms and how often each stands: soft decoding repeats few, hard decoding many."""
        table = np.stack([self.low, self.high, self.p])
        table = table[:, np.abs(table[:2]).sum(0) > 0]
        distinct, counts = np.unique(table, axis=1, return_counts=True)
        return (*distinct, counts.astype(np.float64))

    def log_p(self, statistic: float) -> float:
        """See `Null.log_p`."""
        low, high, p, counts = self._terms
        mean = float((counts * (p * high + (1 - p) * low)).sum())
        if not statistic > mean:
            return 0.0
        if statistic >= float((counts * np.maximum(low, high)).sum()):
            return self.floor

        def exponent(theta: float) -> float:
            moments = np.logaddexp(np.log(p) + theta * high, np.log1p(-p) + theta * low)
            return float((counts * moments).sum()) - theta * statistic

        variance = float((counts * p * (1 - p) * (high - low) ** 2).sum())
        guess = (statistic - mean) / variance
        # any theta >= 0 gives a valid bound; the minimiser only makes it tight
        best = minimize_scalar(exponent, bounds=(0, 20 * guess), method="bounded", options={"xatol": 1e-6 * guess})
        return min(0.0, float(best.fun))

    @property
    def floor(self) -> float:
        """Log P that every term takes its larger value."""
        low, high, p, counts = self._terms
        larger = np.where(high > low, np.log(p), np.log1p(-p))
        return float((counts * np.where(high == low, 0.0, larger)).sum())

    def __repr__(self) -> str:
        return f"IndependentSum(terms={len(self.p)})"

    def __str__(self) -> str:
        return f"Chernoff's bound on a sum of {len(self.p)} independent terms"


@dataclass(frozen=True)
class _Ranked(Null):
    """p = (1 + number of null statistics >= observed) / (1 + number of them): valid by exchangeability."""

    statistics: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.statistics:
            raise ParameterError("empty null", expected="at least one statistic", found=0)

    def log_p(self, statistic: float) -> float:
        """See `Null.log_p`."""
        above = sum(not value < statistic for value in self.statistics)
        return math.log((1 + above) / (1 + len(self.statistics)))

    @property
    def floor(self) -> float:
        """1 / (1 + number of null statistics)."""
        return math.log(1 / (1 + len(self.statistics)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={len(self.statistics)})"


@dataclass(frozen=True, repr=False)
class Permutation(_Ranked):
    """Rank among fresh secrets on the same suspect. Exact to depth 1 / (R + 1) for R secrets.

    Example:
        >>> round(math.exp(Permutation((1.0, 2.0, 3.0)).log_p(2.5)), 3)
        0.5
    """

    basis = Basis.PERMUTATION

    def __str__(self) -> str:
        return f"rank among {len(self.statistics)} fresh secrets"

    @classmethod
    def draw(cls, statistic: Callable[[np.random.Generator], float], count: int, rng: np.random.Generator) -> Self:
        """``count`` statistics, each for a secret freshly drawn from ``rng``."""
        return cls(tuple(float(statistic(rng)) for _ in range(count)))


@dataclass(frozen=True, repr=False)
class Population(_Ranked):
    """Rank among models that were trained independently.

    The unit is the model, not the query: M models certify a false-positive rate of 1 / (M + 1) and no
    less, and only for suspects like them.
    """

    basis = Basis.POPULATION

    def __str__(self) -> str:
        return f"rank among {len(self.statistics)} independent models"

    @classmethod
    def of(cls, statistics: Iterable[float]) -> Self:
        """From the statistic of each model."""
        return cls(tuple(float(value) for value in statistics))


@dataclass(frozen=True)
class Hypergeometric(Null):
    """Members of a keyed set among others that were picked without it: exact, whoever picked them and how.

    A uniform set of ``size`` out of ``total`` was drawn, and ``picked`` of the ``total`` were chosen by anybody
    who does not know it.

    Args:
        total: of what there is.
        size: of the keyed set.
        picked: how many were chosen.

    Raises:
        ParameterError: total < 1, or more drawn or picked than there is.

    Example:
        >>> round(math.exp(-Hypergeometric(40, 16, 16).floor))
        62852101650
    """

    total: int
    size: int
    picked: int
    basis = Basis.EXACT

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.size <= self.total or not 0 <= self.picked <= self.total:
            raise ParameterError(
                "bad hypergeometric null", expected="0 <= size, picked <= total, 1 <= total", found=self
            )

    def __str__(self) -> str:
        return f"overlap of {self.picked} picked and {self.size} drawn of {self.total}"

    def log_p(self, statistic: float) -> float:
        """Log P(overlap >= statistic), summed in integers."""
        least = max(0, self.picked + self.size - self.total)
        first, last = max(least, math.ceil(statistic)), min(self.picked, self.size)
        if first <= least:
            return 0.0
        rest = self.total - self.size
        ways = sum(math.comb(self.size, k) * math.comb(rest, self.picked - k) for k in range(first, last + 1))
        return math.log(ways) - math.log(math.comb(self.total, self.picked)) if ways else -math.inf

    @property
    def floor(self) -> float:
        """Log P that the overlap is as large as it can be."""
        return self.log_p(min(self.picked, self.size))
