"""Tests that may stop at any time: stop asking as soon as the verdict is sure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Null, check_alpha


@dataclass
class EProcess:
    """Evidence against "each match has chance p0", multiplied query by query.

    A mixture of likelihood ratios over match rates above p0. By Ville's inequality the chance that it
    ever reaches 1/alpha under the null is at most alpha, so the owner may stop whenever he likes. The
    order of queries must be fixed by the commitment, not chosen while asking.

    Args:
        p0: chance of a match under the null: 1/K for keyed labels of K classes.
        points: match rates in the mixture, evenly spaced in (p0, 1].

    Raises:
        ParameterError: p0 is not in (0, 1), or no points.

    Example:
        >>> process = EProcess(0.1)
        >>> for _ in range(7):
        ...     process.add(True)
        >>> process.reached(1e-6), process.queries
        (True, 7)
    """

    p0: float
    points: int = 12
    queries: int = field(default=0, init=False)
    matches: int = field(default=0, init=False)
    _peak: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.p0 < 1 or self.points < 1:
            raise ParameterError("bad e-process", expected="0 < p0 < 1, points >= 1", found=(self.p0, self.points))

    def add(self, match: bool) -> None:
        """One more answer; a refusal counts as no match."""
        self.queries += 1
        self.matches += int(match)
        self._peak = max(self._peak, self.log_e)

    @property
    def log_e(self) -> float:
        """Natural logarithm of the e-value now."""
        rates = np.linspace(self.p0, 1.0, self.points + 1)[1:]
        misses = self.queries - self.matches
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = np.log1p(-rates) - math.log1p(-self.p0)
            ratios = self.matches * (np.log(rates) - math.log(self.p0)) + np.where(misses, misses * lost, 0.0)
        return float(logsumexp(ratios) - math.log(self.points))

    @property
    def log_p(self) -> float:
        """Natural logarithm of a p-value that is valid at any stopping time: 1 / (the largest e-value so far)."""
        return -self._peak

    @property
    def p_value(self) -> float:
        """See `log_p`."""
        return math.exp(-self._peak)

    def best_after(self, more: int) -> float:
        """`log_p` if each of ``more`` further answers were a match: to stop when nothing can be won."""
        ahead = EProcess(self.p0, self.points)
        ahead.queries, ahead.matches, ahead._peak = self.queries + more, self.matches + more, self._peak
        return min(-self._peak, -ahead.log_e)

    def reached(self, alpha: float) -> bool:
        """Whether the evidence suffices at level ``alpha``.

        Raises:
            ParameterError: ``alpha`` is not in (0, 1).
        """
        check_alpha(alpha)
        return self._peak >= -math.log(alpha)


@dataclass(frozen=True)
class Stopped(Null):
    """The law of an `EProcess` that was stopped at will; the statistic is ``-log_p``.

    Args:
        p0: chance of a match under the null.
        queries: how many were asked.
        reach: how many could have been: more than ``queries`` where asking ended because it was of no use.
        bound: ``p0`` is the largest chance that any suspect can have, see `Binomial`.

    Example:
        >>> Stopped(0.1, 7, 30).log_p(14.0), str(Stopped(0.1, 7, 30))
        (-14.0, 'an e-process of 7 answers at 0.1')
    """

    p0: float
    queries: int
    reach: int
    bound: bool = False

    @property
    def basis(self) -> Basis:  # type: ignore[override]
        """Exact; a bound where ``p0`` is one."""
        return Basis.BOUND if self.bound else Basis.EXACT

    def __str__(self) -> str:
        return f"an e-process of {self.queries} answers at {self.p0:.4g}"

    def log_p(self, statistic: float) -> float:
        """Ville's inequality."""
        return min(0.0, -statistic)

    @property
    def floor(self) -> float:
        """That of ``reach`` answers which all match."""
        return EProcess(self.p0).best_after(self.reach)
