"""From a statistic to a verdict: `Score` (a statistic and its `Null`) becomes `Evidence`.

A scheme cannot invent a cut-off. It says what it saw and under which law that would be seen on a
model that was made without the secret; the p-value and the verdict follow here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from sealmark.core.errors import ParameterError

DEFAULT_ALPHA = 1e-6


class Verdict(StrEnum):
    """What a verification says."""

    MATCH = "MATCH"
    NO_MATCH = "NO_MATCH"
    INCONCLUSIVE = "INCONCLUSIVE"


class Basis(StrEnum):
    """Why a null holds, strongest first."""

    EXACT = "exact"  # the randomness is ours: holds for any suspect made without the secret
    ALIGNED = "aligned"  # such a law, after aligning to a marked original by what the mark does not touch
    BOUND = "bound"  # the same, by a proven inequality
    PERMUTATION = "permutation"  # rank among fresh secrets on the same suspect
    POPULATION = "population"  # rank among independently trained models: as good as the population


class Null(ABC):
    """The law of a statistic on a suspect that was made without the secret. Large is suspicious."""

    basis: ClassVar[Basis]

    @abstractmethod
    def log_p(self, statistic: float) -> float:
        """Natural logarithm of (an upper bound of) P(T >= statistic) under the null: at most 0."""

    @property
    @abstractmethod
    def floor(self) -> float:
        """The smallest ``log_p`` that this null can reach at all."""


@dataclass(frozen=True)
class AlignedNull(Null):
    """A law that was exact before the suspect was aligned to an original that carries the mark.

    What the scheme reads took no part in the alignment. That training leaves no trace of the key in the
    rest of the original is an assumption, tested on independent models and not proven.
    """

    null: Null
    basis = Basis.ALIGNED

    def __str__(self) -> str:
        return f"{self.null}, after alignment to the marked original"

    def log_p(self, statistic: float) -> float:
        """That of the law before."""
        return self.null.log_p(statistic)

    @property
    def floor(self) -> float:
        """That of the law before."""
        return self.null.floor


@dataclass(frozen=True)
class Score:
    """What a scheme saw in a suspect.

    Attributes:
        statistic: larger means more like a protected model.
        null: the law of the statistic on a model made without the secret.
        details: figures for the reader, such as the bit error rate; plain JSON.
    """

    statistic: float
    null: Null
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """A verdict and all that it rests on; plain values only, so that it can be signed.

    Attributes:
        verdict: MATCH, NO_MATCH, or INCONCLUSIVE when the null cannot reach alpha at all.
        p_value: corrected for ``tries``; 0.0 where it underflows, then see ``log10_p``.
        log10_p: its decimal logarithm.
        alpha: the bound on false claims that was asked for.
        tries: how many hypotheses (keys, users, layers, ground seeds) the p-value is corrected for.
        statistic: what was seen.
        null: the law that it is held against, in words.
        basis: why that law holds.
        scheme: the scheme's public name.
        commitment: of the secret that was used.
        queries: how many inputs the suspect was sent for this verdict.
        details: further figures of the scheme.
    """

    verdict: Verdict
    p_value: float
    log10_p: float
    alpha: float
    tries: float
    statistic: float
    null: str
    basis: Basis
    scheme: str
    commitment: str
    queries: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for printing and signing."""
        return asdict(self) | {"verdict": self.verdict.value, "basis": self.basis.value}


def check_alpha(alpha: float, tries: float = 1) -> None:
    """Refuse a level or a number of tries that means nothing.

    Raises:
        ParameterError: ``alpha`` is not in (0, 1), or ``tries`` is under 1.
    """
    if not 0 < alpha < 1:
        raise ParameterError("bad level alpha", expected="a number in (0, 1)", found=alpha)
    if not tries >= 1:
        raise ParameterError("bad number of tries", expected="1 or more", found=tries)


def corrected_log_p(score: Score, tries: float = 1) -> float:
    """``log_p`` of a score after Bonferroni's correction for ``tries`` hypotheses, at most 0."""
    return min(0.0, score.null.log_p(score.statistic) + math.log(tries))


def judge(
    score: Score,
    *,
    alpha: float = DEFAULT_ALPHA,
    tries: float = 1,
    scheme: str,
    commitment: str,
    queries: int = 0,
) -> Evidence:
    """Turn a score into evidence at level ``alpha``.

    Args:
        score: a statistic and its null.
        alpha: the largest accepted probability of a MATCH on a model made without the secret.
        tries: the number of hypotheses among which this one was searched: keys, layers, users, or the
            seeds that a claimant could have ground through when no commitment was published before.
        scheme: public name, for the record.
        commitment: of the secret, for the record.
        queries: for the record.

    Raises:
        ParameterError: alpha or tries mean nothing.
    """
    check_alpha(alpha, tries)
    log_p = corrected_log_p(score, tries)
    if log_p <= math.log(alpha):
        verdict = Verdict.MATCH
    elif score.null.floor + math.log(tries) > math.log(alpha):
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.NO_MATCH
    return Evidence(
        verdict=verdict,
        p_value=math.exp(log_p),
        log10_p=log_p / math.log(10),
        alpha=alpha,
        tries=tries,
        statistic=float(score.statistic),
        null=str(score.null),
        basis=score.null.basis,
        scheme=scheme,
        commitment=commitment,
        queries=queries,
        details=dict(score.details),
    )
