"""From a statistic to a verdict: the border, the correction for tries, and what the null can reach."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import (
    DEFAULT_ALPHA,
    Basis,
    Evidence,
    Null,
    Score,
    Verdict,
    check_alpha,
    corrected_log_p,
    judge,
)


@dataclass(frozen=True)
class Table(Null):
    """P(T >= statistic) is the statistic itself, down to ``least``."""

    least: float = 0.0
    basis = Basis.EXACT

    def log_p(self, statistic: float) -> float:
        return math.log(max(statistic, self.least)) if statistic or self.least else -math.inf

    @property
    def floor(self) -> float:
        return math.log(self.least) if self.least else -math.inf


def _judge(p: float, *, least: float = 0.0, alpha: float = 1e-3, tries: float = 1) -> Evidence:
    return judge(Score(p, Table(least)), alpha=alpha, tries=tries, scheme="toy", commitment="c")


@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-3, 1e-6, 1e-9, 1 / 3, 2.0**-64])
def test_a_p_value_of_exactly_alpha_is_a_match(alpha: float) -> None:
    assert _judge(alpha, alpha=alpha).verdict is Verdict.MATCH


@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-3, 1e-6, 1e-9, 1 / 3, 2.0**-64])
def test_a_p_value_just_above_alpha_is_none(alpha: float) -> None:
    assert _judge(alpha * (1 + 1e-9), alpha=alpha).verdict is Verdict.NO_MATCH


def test_tries_multiply_the_p_value() -> None:
    assert _judge(1e-4, tries=10).p_value == pytest.approx(1e-3)
    assert _judge(1e-4, tries=9).verdict is Verdict.MATCH
    assert _judge(1e-4, tries=11).verdict is Verdict.NO_MATCH


def test_a_corrected_p_value_never_exceeds_one() -> None:
    assert corrected_log_p(Score(0.5, Table()), tries=100) == 0
    assert _judge(0.5, tries=100).p_value == 1


def test_a_null_that_cannot_reach_alpha_is_inconclusive() -> None:
    assert _judge(0.5, least=2e-3).verdict is Verdict.INCONCLUSIVE
    assert _judge(2e-3, least=2e-3).verdict is Verdict.INCONCLUSIVE


def test_a_null_that_just_reaches_alpha_is_conclusive() -> None:
    assert _judge(0.5, least=1e-3).verdict is Verdict.NO_MATCH
    assert _judge(1e-3, least=1e-3).verdict is Verdict.MATCH


def test_tries_can_put_alpha_out_of_reach() -> None:
    assert _judge(0.5, least=1e-4, tries=9).verdict is Verdict.NO_MATCH
    assert _judge(0.5, least=1e-4, tries=11).verdict is Verdict.INCONCLUSIVE


def test_a_p_value_too_small_for_a_double_is_kept_as_a_logarithm() -> None:
    class Deep(Table):
        def log_p(self, statistic: float) -> float:
            return -2048 * math.log(2)

    evidence = judge(Score(1, Deep()), scheme="toy", commitment="c")
    assert evidence.p_value == 0
    assert evidence.log10_p == pytest.approx(-616.5094)


def test_the_default_level_is_one_in_a_million() -> None:
    evidence = judge(Score(1e-6, Table()), scheme="toy", commitment="c")
    assert (evidence.alpha, evidence.verdict) == (DEFAULT_ALPHA, Verdict.MATCH) == (1e-6, Verdict.MATCH)


def test_evidence_records_what_it_rests_on_as_plain_json() -> None:
    score = Score(0.25, Table(), {"ber": 0.5})
    evidence = judge(score, alpha=0.5, tries=2, scheme="toy", commitment="c", queries=7)
    assert json.loads(json.dumps(evidence.as_dict())) == {
        "verdict": "MATCH",
        "p_value": 0.5,
        "log10_p": pytest.approx(math.log10(0.5)),
        "alpha": 0.5,
        "tries": 2,
        "statistic": 0.25,
        "null": "Table(least=0.0)",
        "basis": "exact",
        "scheme": "toy",
        "commitment": "c",
        "queries": 7,
        "details": {"ber": 0.5},
    }


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 2, math.nan])
def test_a_level_that_means_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(ParameterError, match="bad level alpha"):
        _judge(0.5, alpha=alpha)


@pytest.mark.parametrize("tries", [0, 0.5, -1, math.nan])
def test_a_number_of_tries_that_means_nothing_is_refused(tries: float) -> None:
    with pytest.raises(ParameterError, match="bad number of tries"):
        check_alpha(0.5, tries)
