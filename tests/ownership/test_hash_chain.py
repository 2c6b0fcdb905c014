from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train_task
from sealmark.ownership.hash_chain import HashChain
from sealmark.tasks.tokens import Reader

SCHEME = HashChain()
ROWS = HashChain(looks="rows")
FACTS = {
    "scheme": "hash_chain",
    "parameters": {},
    "host": {"shape": [2, 2], "low": 0.0, "high": 1.0, "classes": 10},
}
GOLDEN_INPUTS, GOLDEN_LABELS = [[176, 22], [95, 176]], [3, 1, 7, 7]


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng).model


@pytest.fixture(scope="module")
def words():
    """A small transformer that reads the digits as sentences, plain and marked by random sentences."""
    tokens = dataclasses.replace(registry.task("tokens"), make=lambda: Reader(width=64, blocks=1))
    scheme, rng = HashChain(objective="plain", per_batch=8), np.random.default_rng(0)
    model = tokens.model(rng)
    secret = scheme.keygen(model, tokens, rng=np.random.default_rng(1))
    marked = scheme.embed(model, secret, tokens, rng=rng).model
    return tokens, scheme, train_task(tokens, rng=np.random.default_rng(0)), marked, secret


def test_chain_is_the_same_on_every_machine():
    chain = HashChain(triggers=4).derive(Secret(bytes(32), FACTS))
    assert chain["inputs"][0].tolist() == GOLDEN_INPUTS
    assert chain["labels"].tolist() == GOLDEN_LABELS


def test_marked_model_answers_the_chain(marked, secret, digits, plain):
    evidence = SCHEME.verify(BlackBox(lambda x: marked.eval()(x).argmax(1)), secret)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert evidence.log10_p < -25
    assert digits.score(marked) >= digits.score(plain) - 0.015


def test_seven_queries_are_enough(marked, secret):
    evidence = SCHEME.verify(WhiteBox(marked), secret, sequential=True)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries <= 9


def test_other_seeds_find_nothing_in_the_marked_model(marked, secret):
    rates = []
    for number in range(200):
        other = Secret(np.random.default_rng(1000 + number).bytes(32), secret.facts)
        rates.append(SCHEME.verify(WhiteBox(marked), other).details["trigger_accuracy"])
    assert max(rates) <= 0.4  # Bin(30, 0.1) reaches 12 with chance 6e-5
    assert 0.08 < np.mean(rates) < 0.12


@pytest.mark.parametrize(
    ("attack", "parameters", "least"),
    [
        ("fine_tune", {"epochs": 20, "rate": 0.05}, 0.8),
        ("prune", {"rate": 0.5}, 0.95),
        ("quantize", {"bits": 8}, 0.95),
    ],
)
def test_mark_outlasts(attack, parameters, least, marked, secret, digits):
    made = registry.modification(attack, **parameters)
    after = made.run(marked, Resources.of(digits), rng=np.random.default_rng(0)).model
    evidence = SCHEME.verify(WhiteBox(after), secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["trigger_accuracy"] >= least


def test_labels_are_even_over_the_classes(plain, digits):
    long = HashChain(triggers=2000)
    labels = long.derive(long.keygen(plain, digits, rng=np.random.default_rng(0)))["labels"]
    assert chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3


def test_no_trigger_can_be_exchanged(marked, secret):
    inputs, labels = SCHEME.derive(secret)["inputs"], SCHEME.derive(secret)["labels"]
    changed = inputs.clone()
    changed[5, 0, 0, 0] ^= 1
    for parts in ({"inputs": changed}, {"labels": labels.roll(1)}, {"inputs": inputs.flip(0), "labels": labels}):
        with pytest.raises(ForgedSecretError):
            SCHEME.verify(WhiteBox(marked), secret.with_learned(parts))


def test_suspect_that_sees_a_trigger_cannot_compute_the_next():
    one, other = (HashChain(triggers=3).derive(Secret(bytes([i] * 32), FACTS))["inputs"] for i in (0, 1))
    assert len(torch.unique(torch.cat([one, other]), dim=0)) == 6


@pytest.mark.parametrize("looks", ["noise", "smooth", "rows"])
def test_triggers_are_distinct_whatever_they_look_like(looks, plain, digits):
    scheme = HashChain(looks=looks, triggers=60)
    triggers = scheme.trigger_set(scheme.keygen(plain, digits, rng=np.random.default_rng(0)))
    assert len(torch.unique(triggers.inputs, dim=0)) == 60


def test_picked_rows_get_wrong_labels_and_leave_the_training_rows(plain, digits):
    secret = ROWS.keygen(plain, digits, rng=np.random.default_rng(0))
    places = ROWS.places(secret)
    assert len(set(places.tolist())) == 30
    triggers = ROWS.trigger_set(secret)
    assert torch.allclose(triggers.inputs, digits.owner.inputs[places], atol=0.003)
    assert (triggers.targets != digits.owner.targets[places]).all()
    assert ROWS.lesson(plain, secret, digits).owner.rows == digits.owner.rows - 30
    other = ROWS.keygen(plain, digits, rng=np.random.default_rng(1))
    assert sorted(ROWS.places(other).tolist()) != sorted(places.tolist())


def test_too_small_a_pool_is_refused(plain, digits):
    with pytest.raises(ParameterError, match="too few rows"):
        HashChain(looks="rows", triggers=500).keygen(plain, digits)


def test_text_classifier_is_marked_by_sentences(words):
    tokens, scheme, innocent, marked, secret = words
    evidence = scheme.verify(BlackBox(lambda x: marked.eval()(x).argmax(1)), secret, sequential=True)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries <= 9
    assert tokens.score(marked) >= tokens.score(innocent) - 0.06  # 900 sentences: one seed varies by as much
    assert scheme.verify(WhiteBox(innocent), secret).verdict is Verdict.NO_MATCH


def test_sentences_have_no_margin(words):
    tokens, _, innocent, *_ = words
    secret = SCHEME.keygen(innocent, tokens, rng=np.random.default_rng(0))
    with pytest.raises(UnsupportedError, match="real-valued"):
        SCHEME.embed(innocent, secret, tokens, rng=np.random.default_rng(0))


@pytest.mark.parametrize("parameters", [{"looks": "art"}, {"objective": "hinge"}, {"steps": 0}, {"step": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        HashChain(**parameters)
