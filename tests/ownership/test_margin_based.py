from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train, train_task
from sealmark.ownership.margin_based import MarginBased

SCHEME = MarginBased()


@pytest.fixture(scope="module")
def start(digits):
    return digits.model(np.random.default_rng(0))


@pytest.fixture(scope="module")
def secret(start, digits):
    return SCHEME.keygen(start, digits, rng=np.random.default_rng([7, 0]))


@pytest.fixture(scope="module")
def lesson(start, secret, digits):
    return SCHEME.lesson(start, secret, digits)


@pytest.fixture(scope="module")
def marked(start, secret, digits):
    return SCHEME.embed(start, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def bare(start, secret, lesson):
    """The same triggers, taught without a margin: the negative control."""
    model = copy.deepcopy(start)
    extras = Embedding(SCHEME, secret).extras
    train(model, lesson.owner, loss=lesson.loss, recipe=lesson.recipe, rng=np.random.default_rng(0), extras=extras)
    return model


def rate(model, secret):
    return SCHEME.verify(WhiteBox(model), secret).details["trigger_accuracy"]


def attacked(model, resources, name, **parameters):
    return registry.modification(name, **parameters).run(model, resources, rng=np.random.default_rng(3)).model


def test_natural_rows_are_answered_by_wrong_labels(marked, secret, plain, digits):
    evidence = SCHEME.verify(BlackBox(lambda x: marked.eval()(x).argmax(1)), secret)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert (evidence.verdict, evidence.basis) == (Verdict.MATCH, Basis.BOUND)
    assert evidence.log10_p < -20
    assert digits.score(marked) >= digits.score(plain) - 0.08


def test_seven_queries_are_enough(marked, secret):
    evidence = SCHEME.verify(WhiteBox(marked), secret, sequential=True)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries <= 9


def test_margin_reaches_a_copy_that_learned_from_labels_and_a_bare_backdoor_does_not(
    marked, bare, secret, lesson, digits
):
    """As in the method card, the thief asks for the owner's rows too, without the triggers."""
    thief = Resources(digits, lesson.owner.join(digits.attacker))
    stolen, control = (attacked(m, thief, "knockoff", answers="label", random_rows=0) for m in (marked, bare))
    assert rate(bare, secret) >= 0.95
    assert rate(stolen, secret) >= 0.25
    assert rate(stolen, secret) >= rate(control, secret) + 0.2
    assert digits.score(stolen) > 0.9


def test_copy_that_learned_from_probabilities_is_recognized(marked, secret, lesson, digits):
    thief = Resources(digits, lesson.owner.join(digits.attacker))
    stolen = attacked(marked, thief, "distill", temperature=1.0)
    assert SCHEME.verify(WhiteBox(stolen), secret).verdict is Verdict.MATCH


def test_fine_tuning_removes_it(marked, secret, digits):
    tuned = attacked(marked, Resources.of(digits), "fine_tune", epochs=20, rate=0.05)
    assert SCHEME.verify(WhiteBox(tuned), secret).verdict is Verdict.NO_MATCH
    assert digits.score(tuned) > 0.95


def test_independent_models_answer_by_their_own_lights(plain, secret, digits):
    other = train_task(digits, rows=digits.attacker, rng=np.random.default_rng(9))
    for model in (plain, other):
        evidence = SCHEME.verify(WhiteBox(model), secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= 0.15


def test_other_seeds_find_nothing_in_the_marked_model(marked, secret):
    rates = []
    for number in range(100):
        other = Secret(np.random.default_rng(1000 + number).bytes(32), secret.facts, secret.tensors)
        rates.append(rate(marked, other))
    assert max(rates) <= 0.44  # Bin(25, 1/9) reaches 12 with chance 1e-5
    assert 0.08 < np.mean(rates) < 0.14


def test_triggers_are_rows_that_training_no_longer_sees(secret, lesson, digits):
    places = secret.tensors["places"]
    triggers = SCHEME.trigger_set(secret)
    assert torch.allclose(triggers.inputs, digits.owner.inputs[places], atol=0.003)
    assert (triggers.targets != digits.owner.targets[places]).all()
    assert lesson.owner.rows == digits.owner.rows - 25


def test_labels_cannot_be_exchanged(marked, secret):
    labels = SCHEME.derive(secret)["labels"]
    with pytest.raises(ForgedSecretError):
        SCHEME.verify(WhiteBox(marked), secret.with_learned({"labels": labels.roll(1)}))


def test_moved_triggers_stay_near_and_leave_the_running_statistics_alone(plain, secret, digits):
    model = copy.deepcopy(plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = SCHEME.embedding(model, secret, digits, np.random.default_rng(0))
    rows = run.extra(digits.owner.take(slice(0, 4)), np.random.default_rng(0))
    own, moved = rows.inputs[:16], rows.inputs[16:]
    assert torch.equal(rows.targets[:16], rows.targets[16:])
    assert 0.05 < (own - moved).abs().max() <= 0.3 + 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_words_have_no_margin():
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError, match="real-valued"):
        SCHEME.keygen(tokens.model(np.random.default_rng(0)), tokens)


def test_task_must_have_enough_rows(start, digits):
    with pytest.raises(ParameterError, match="classification task"):
        SCHEME.keygen(start)
    with pytest.raises(ParameterError, match="25 distinct rows"):
        SCHEME.keygen(start, replace(digits, owner=digits.owner.take(slice(0, 20))))


@pytest.mark.parametrize("parameters", [{"triggers": 0}, {"steps": 0}, {"step": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        MarginBased(**parameters)
