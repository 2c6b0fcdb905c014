from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from sealmark.blackbox.crafting import ascend
from sealmark.blackbox.points import PointFingerprint, sources
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.core.training import train_task
from sealmark.stats.populations import beta_binomial_log_p, population_of


@dataclass(frozen=True)
class Edge(PointFingerprint):
    """Untargeted adversarial examples."""

    rule: ClassVar[float] = 0.75
    crafts_with_references: ClassVar[bool] = True
    wrong: bool = False

    def craft(self, model, task, secret, references, rng):
        self.shown.append(len(references))
        rows = sources(task, model, 2 * self.points, rng)
        found = ascend(model, rows.inputs, rows.targets, radius=0.15, steps=5, low=0.0, high=1.0)
        labels = WhiteBox(model).labels(found)
        return Batch(found, (labels + 1) % 10 if self.wrong else labels)

    shown: ClassVar[list[int]] = []


@pytest.fixture(scope="module")
def references(digits):
    from sealmark.core.task import Recipe

    recipe = Recipe(epochs=4, rate=digits.recipe.rate, clip=1.0)
    return [train_task(digits, rng=np.random.default_rng(900 + seed), recipe=recipe) for seed in range(6)]


@pytest.fixture(scope="module")
def secret(plain, digits, references):
    return Edge(points=40).enroll(plain, digits, references=references, rng=np.random.default_rng(0))


def test_model_answers_its_own_points_and_the_law_is_a_rank(plain, secret):
    evidence = Edge(points=40).verify(BlackBox(WhiteBox(plain).labels), secret, alpha=0.3)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.basis is Basis.POPULATION
    assert evidence.details["match_rate"] == 1.0  # after rounding to bytes too
    assert evidence.p_value == pytest.approx(1 / 4)  # three of six references were kept from crafting
    assert Edge.shown[-1] == 3
    assert evidence.details["extrapolated_log10_p"] < np.log10(1 / 4)


def test_few_references_cannot_reach_the_usual_level(plain, secret):
    assert Edge(points=40).verify(WhiteBox(plain), secret).verdict is Verdict.INCONCLUSIVE


def test_judge_brings_models_of_his_own(plain, secret, references):
    law = population_of(Edge(points=40), secret, [WhiteBox(plain), *map(WhiteBox, references)])
    evidence = Edge(points=40).verify(WhiteBox(references[0]), secret, population=law, alpha=0.3)
    assert evidence.verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("kept", [0, 1])
def test_too_few_references_are_refused(kept, plain, digits, references):
    with pytest.raises(ParameterError, match="two live references"):
        Edge().enroll(plain, digits, references=references[:kept])
    with pytest.raises(ParameterError, match="live"):
        Edge().enroll(WhiteBox(plain).weights, digits, references=references)


def test_points_that_the_model_does_not_answer_so_are_not_kept(plain, digits, references):
    with pytest.raises(MarkFailedError, match="too few points"):
        Edge(wrong=True).enroll(plain, digits, references=references, rng=np.random.default_rng(0))


def test_fingerprint_needs_two_points():
    with pytest.raises(ParameterError):
        Edge(points=1)


def test_sources_are_rows_that_the_model_knows(plain, digits):
    rows = sources(digits, plain, 20, np.random.default_rng(0))
    assert rows.rows == 20
    assert torch.equal(WhiteBox(plain).labels(rows.inputs), rows.targets)


def test_beta_binomial_is_wider_than_a_binomial_and_wants_a_population():
    counts = [4, 16, 9, 7, 20, 12, 3, 9]
    from scipy.stats import binom

    assert beta_binomial_log_p(28, 100, counts) > np.log(binom.sf(27, 100, np.mean(counts) / 100)) + 5
    assert beta_binomial_log_p(0, 100, counts) == 0
    for bad in ([5], [5, 101], [-1, 4]):
        with pytest.raises(ParameterError):
            beta_binomial_log_p(5, 100, bad)
    with pytest.raises(ParameterError):
        beta_binomial_log_p(101, 100, counts)


def test_extrapolation_is_finite_however_far_out():
    assert -1000 < beta_binomial_log_p(50, 50, [3, 4, 3, 4]) < -20
    assert -1000 < beta_binomial_log_p(50, 50, [4, 4, 4, 4]) < -20
