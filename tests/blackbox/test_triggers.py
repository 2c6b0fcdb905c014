from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.blackbox.inputs import keyed_inputs, pack
from sealmark.blackbox.triggers import TriggerMark, picked_rows
from sealmark.core.errors import BudgetError, ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.stats.calibration import super_uniformity
from sealmark.stats.populations import population_of


@dataclass(frozen=True)
class Keyed(TriggerMark):
    """Inputs from the seed, labels uniform over all classes."""

    rule: ClassVar[float] = 0.9
    choices = frozenset({"inputs"})

    def draw(self, secret):
        return keyed_inputs(secret.stream("images"), self.triggers, secret.host)


@dataclass(frozen=True)
class Picked(TriggerMark):
    """Rows of the owner's with wrong labels; with ``share`` rows to a trial."""

    rule: ClassVar[float] = 0.9
    share: int = 1

    def bind(self, model, task, chosen, rng):
        form, _ = super().bind(model, task, chosen, rng)
        tensors = picked_rows(task, form, self.triggers, rng)
        if self.share > 1:
            trials = torch.arange(self.triggers) // self.share
            tensors |= {"trials": trials, "natural": tensors["natural"][:: self.share]}
        return form, tensors


class Oracle:
    """Answers triggers as taught up to a share of errors, and everything else with class 0."""

    def __init__(self, scheme, secret, right=1.0, seed=0):
        triggers = scheme.trigger_set(secret)
        rng = np.random.default_rng(seed)
        keep = torch.from_numpy(rng.random(triggers.rows) < right)
        wrong = (triggers.targets + 1) % secret.host["classes"]
        answers = torch.where(keep, triggers.targets, wrong)
        self.known = {row.numpy().tobytes(): int(t) for row, t in zip(triggers.inputs, answers, strict=True)}

    def __call__(self, inputs):
        return torch.tensor([self.known.get(row.numpy().tobytes(), 0) for row in inputs])


def suspect(scheme, secret, right=1.0, **options):
    return BlackBox(Oracle(scheme, secret, right), **options)


@pytest.fixture
def keyed(digits, plain):
    scheme = Keyed(triggers=40)
    return scheme, scheme.keygen(plain, digits, rng=np.random.default_rng(0))


@pytest.fixture
def picked(digits, plain):
    scheme = Picked(triggers=40)
    return scheme, scheme.keygen(plain, digits, rng=np.random.default_rng(0))


def test_matches_of_labels_over_all_classes_have_an_exact_law(keyed):
    scheme, secret = keyed
    evidence = scheme.verify(suspect(scheme, secret), secret)
    assert (evidence.basis, evidence.null) == (Basis.EXACT, "Bin(40, 0.1)")
    assert evidence.log10_p == pytest.approx(-40)
    assert evidence.details["paper_claims"]


def test_labels_are_never_the_natural_class_and_the_law_is_a_bound(picked, digits):
    scheme, secret = picked
    natural = secret.tensors["natural"]
    assert (scheme.trigger_set(secret).targets != natural).all()
    evidence = scheme.verify(suspect(scheme, secret), secret)
    assert (evidence.basis, evidence.null) == (Basis.BOUND, "at most Bin(40, 0.1111)")
    right = BlackBox(lambda x: natural)  # a model that errs nowhere matches nothing
    assert scheme.verify(right, secret).statistic == 0


def test_p_values_hold_for_a_suspect_that_answers_one_class_and_for_one_that_guesses(digits, plain):
    scheme = Keyed(triggers=40)
    rng = np.random.default_rng(0)
    for answer in (lambda x: torch.full((len(x),), 3), lambda x: torch.from_numpy(rng.integers(0, 10, len(x)))):
        found = []
        for seed in range(150):
            secret = scheme.keygen(plain, digits, rng=np.random.default_rng(seed))
            found.append(scheme.verify(BlackBox(answer), secret).p_value)
        assert super_uniformity(found) > 1e-3


def test_rows_of_one_trial_count_once_and_by_majority(digits, plain):
    scheme = Picked(triggers=40, share=5)
    secret = scheme.keygen(plain, digits, rng=np.random.default_rng(0))
    targets = scheme.trigger_set(secret).targets
    assert (targets.reshape(8, 5) == targets.reshape(8, 5)[:, :1]).all()
    answers = targets.clone().reshape(8, 5)
    answers[0, :2], answers[1, :3] = 99, 99  # three of five are a majority, two are not
    evidence = scheme.verify(BlackBox(lambda x: answers.flatten()), secret)
    assert (evidence.statistic, evidence.details["trials"], evidence.details["trigger_accuracy"]) == (7, 8, 0.875)
    assert evidence.null == "at most Bin(8, 0.1111)"


def test_rows_that_became_triggers_are_not_trained_on_as_they_were(picked, digits, plain):
    scheme, secret = picked
    lesson = scheme.lesson(plain, secret, digits)
    assert lesson.owner.rows == digits.owner.rows - 40
    left = {row.numpy().tobytes() for row in pack(lesson.owner.inputs, secret.host)}
    assert not any(row.numpy().tobytes() in left for row in secret.tensors["inputs"])
    small = replace(digits, owner=digits.owner.take(slice(0, 10)))
    with pytest.raises(ParameterError, match="another task"):
        scheme.lesson(plain, secret, small)


def test_picked_rows_are_distinct_and_must_suffice(digits, plain):
    twice = replace(digits, owner=digits.owner.take(slice(0, 30)).join(digits.owner.take(slice(0, 30))))
    secret = Picked(triggers=30).keygen(plain, twice, rng=np.random.default_rng(0))
    assert len(torch.unique(secret.tensors["inputs"], dim=0)) == 30
    with pytest.raises(ParameterError, match="31 distinct rows"):
        Picked(triggers=31).keygen(plain, twice)


def test_asking_in_turn_stops_when_sure_and_says_what_it_saved(keyed):
    scheme, secret = keyed
    marked = suspect(scheme, secret)
    evidence = scheme.verify(marked, secret, sequential=True)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries == marked.queries == 7
    assert evidence.details["queries_saved"] == 33
    assert evidence.details["stopped"] == "the verdict is sure"
    assert evidence.log10_p <= -6
    assert scheme.verify(suspect(scheme, secret), secret, sequential=True, tries=1e6).queries == 13


def test_asking_in_turn_gives_up_when_nothing_can_be_won(keyed):
    scheme, secret = keyed
    evidence = scheme.verify(suspect(scheme, secret, right=0.0), secret, sequential=True)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.details["stopped"] == "nothing can be won any more"
    assert 20 < evidence.queries < 40


def test_asking_in_turn_ends_with_the_budget(keyed):
    scheme, secret = keyed
    weak = suspect(scheme, secret, right=0.5, budget=5)
    evidence = scheme.verify(weak, secret, sequential=True)
    assert (evidence.verdict, evidence.queries) == (Verdict.INCONCLUSIVE, 5)
    assert evidence.details["stopped"] == "the budget is spent"
    with pytest.raises(BudgetError):
        scheme.verify(suspect(scheme, secret, budget=0), secret, sequential=True)


def test_asking_in_turn_can_ask_everything(picked):
    scheme, secret = picked
    evidence = scheme.verify(suspect(scheme, secret, right=0.3), secret, sequential=True, alpha=1e-20)
    assert evidence.verdict is Verdict.NO_MATCH
    few = scheme.verify(suspect(scheme, secret), secret, sequential=True, alpha=1e-36)
    assert (few.details["stopped"], few.details["queries_saved"]) == ("the verdict is sure", 1)


def test_order_of_queries_is_the_secrets(keyed, digits, plain):
    scheme, secret = keyed
    other = scheme.keygen(plain, digits, rng=np.random.default_rng(9))
    asked = []
    for key in (secret, secret, other):
        log = []
        scheme.verify(BlackBox(lambda x, log=log: (log.append(x), torch.zeros(len(x)))[1]), key, sequential=True)
        rows = scheme.trigger_set(key).inputs
        asked.append([int((rows == x).flatten(1).all(1).nonzero()[0]) for x in log[:10]])
    assert asked[0] == asked[1] != asked[2]


def test_stopping_at_will_wins_nothing(digits, plain):
    scheme = Keyed(triggers=40)
    found = [
        scheme.verify(BlackBox(lambda x: torch.zeros(len(x))), secret, sequential=True, alpha=0.05)
        for secret in (scheme.keygen(plain, digits, rng=np.random.default_rng(seed)) for seed in range(200))
    ]
    assert sum(e.verdict is Verdict.MATCH for e in found) <= 18  # 10 are allowed on average


def test_asking_in_turn_has_a_law_of_its_own(keyed, plain):
    scheme, secret = keyed
    law = population_of(scheme, secret, [WhiteBox(plain)])
    with pytest.raises(ParameterError, match="law of its own"):
        scheme.verify(WhiteBox(plain), secret, sequential=True, population=law)


def test_judge_holds_a_suspect_against_models_of_his_own(keyed):
    scheme, secret = keyed
    alike = [suspect(scheme, secret, right=0.9, budget=None) for _ in range(20)]
    law = population_of(scheme, secret, alike)
    evidence = scheme.verify(suspect(scheme, secret, right=0.8), secret, population=law, alpha=0.05)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.basis is Basis.POPULATION
    surely = scheme.verify(suspect(scheme, secret), secret, population=law, alpha=0.05)
    assert surely.p_value == pytest.approx(1 / 21)


def test_scheme_without_triggers_cannot_ask_in_turn(plain):
    from sealmark.ownership.uchida import Uchida

    scheme = Uchida()
    with pytest.raises(UnsupportedError, match="in turn"):
        scheme.verify(WhiteBox(plain), scheme.keygen(plain), sequential=True)


def test_labels_or_inputs_that_a_forger_brings_are_read_and_refused(keyed, plain):
    scheme, secret = keyed
    answers = WhiteBox(plain).labels(scheme.trigger_set(secret).inputs)
    forged = secret.with_learned({"labels": answers, "inputs": scheme.derive(secret)["inputs"]})
    assert scheme.score(WhiteBox(plain), forged).statistic == 40
    with pytest.raises(ForgedSecretError, match="inputs and labels"):
        scheme.verify(WhiteBox(plain), forged)


def test_secret_without_the_inputs_that_the_scheme_picks_is_refused(picked, plain):
    scheme, secret = picked
    empty = scheme.new_secret(WhiteBox(plain).weights, host=secret.host)
    with pytest.raises(ForgedSecretError, match="no inputs"):
        scheme.verify(WhiteBox(plain), empty)


def test_extra_rows_are_triggers_on_the_batch_device(keyed):
    scheme, secret = keyed
    extra = scheme.extra(secret, Batch(torch.zeros(4, 1, 8, 8), torch.zeros(4)), np.random.default_rng(0))
    triggers = scheme.trigger_set(secret)
    assert extra.rows == 16
    assert all(any(torch.equal(row, t) for t in triggers.inputs) for row in extra.inputs)


def test_word_inputs_are_triggers_too():
    from sealmark.core import registry

    tokens = registry.task("tokens")
    scheme = Keyed(triggers=20)
    secret = scheme.keygen(nn.Identity(), tokens, rng=np.random.default_rng(0))
    assert scheme.trigger_set(secret).inputs.dtype == torch.int64
    assert scheme.verify(suspect(scheme, secret), secret).verdict is Verdict.MATCH


def test_meaningless_parameters_are_refused():
    with pytest.raises(ParameterError):
        Keyed(triggers=0)


def test_sequential_floor_is_that_of_all_matches(keyed):
    scheme, secret = keyed
    score = scheme.score_in_turn(suspect(scheme, secret, budget=3), secret, -math.log(1e6))
    assert score.null.floor == pytest.approx(score.null.log_p(score.statistic))


def test_rows_without_a_label_are_refused(keyed, picked, plain):
    for scheme, secret in (keyed, picked):
        rows = scheme.trigger_set(secret).inputs
        tensors = {**secret.tensors, "inputs": pack(torch.cat([rows, rows]), secret.host)}
        longer = scheme.new_secret(WhiteBox(plain).weights, host=secret.host, tensors=tensors)
        with pytest.raises(ForgedSecretError, match="do not fit"):
            scheme.verify(WhiteBox(plain), longer)


def test_wrong_label_needs_three_classes(toy):
    with pytest.raises(ParameterError, match="three classes"):
        Picked(triggers=4).keygen(nn.Linear(4, 2), toy)


def test_label_that_is_offered_twice_is_no_draw(digits, plain):
    @dataclass(frozen=True)
    class Offered(Picked):
        def options(self, secret):
            return secret.tensors["natural"][:, None].repeat(1, 3)

    with pytest.raises(ForgedSecretError, match="no draw"):
        Offered(triggers=10).keygen(plain, digits, rng=np.random.default_rng(0))
