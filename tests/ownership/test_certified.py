from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train
from sealmark.ownership.certified import Certified, certified_accuracy

SCHEME = Certified()
SIGMA, RADIUS = 0.03, 0.03


@pytest.fixture(scope="module")
def start(digits):
    return digits.model(np.random.default_rng(0))


@pytest.fixture(scope="module")
def secret(start, digits):
    return SCHEME.keygen(start, digits, rng=np.random.default_rng([1, 0]))


@pytest.fixture(scope="module")
def marked(start, secret, digits):
    return SCHEME.embed(start, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def bare(start, secret, digits):
    """The same triggers, taught without noise: the negative control."""
    model = copy.deepcopy(start)
    extras = Embedding(SCHEME, secret).extras
    train(model, digits.owner, loss=digits.loss, recipe=digits.recipe, rng=np.random.default_rng(0), extras=extras)
    return model


def certificate(model, secret, radius=RADIUS, sigma=SIGMA, draws=300):
    return SCHEME.certify(model, secret, radius=radius, sigma=sigma, draws=draws, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def ours(marked, secret):
    return certificate(marked, secret)


def smoothed(model, secret, draws=41):
    return float(np.median(SCHEME.smoothed(model, secret, sigma=SIGMA, draws=draws, rng=np.random.default_rng(2))))


def moved(model, direction, length):
    """The model after a step of that length along a direction of all its parameters."""
    other = copy.deepcopy(model)
    size = math.sqrt(sum(float(part.square().sum()) for part in direction))
    with torch.no_grad():
        for value, part in zip(other.parameters(), direction, strict=True):
            value += part * (length / size)
    return other


def test_labels_alone_recognize_the_marked_model(marked, secret, digits, plain):
    evidence = SCHEME.verify(BlackBox(lambda x: marked.eval()(x).argmax(1)), secret)
    assert (evidence.verdict, evidence.basis) == (Verdict.MATCH, Basis.EXACT)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert digits.score(marked) >= digits.score(plain) - 0.015  # one seed; the bound is held over three
    assert SCHEME.verify(WhiteBox(plain), secret).verdict is Verdict.NO_MATCH


def test_noise_while_training_buys_the_certificate(ours, bare, secret):
    control = certificate(bare, secret)
    assert ours.accuracy >= 0.75
    assert ours.accuracy >= (control.accuracy or 0) + 0.15
    assert SCHEME.verify(WhiteBox(bare), secret).verdict is Verdict.MATCH


def test_certificate_is_evidence_by_itself(ours, secret, plain):
    assert ours.log10_p < -6
    assert ours.accuracy <= ours.median
    assert certificate(plain, secret).log10_p > -2


def test_no_random_change_within_the_radius_goes_below(marked, secret, ours):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        direction = [torch.randn(value.shape, generator=generator) for value in marked.parameters()]
        assert smoothed(moved(marked, direction, RADIUS), secret, draws=15) >= ours.accuracy


def test_nor_does_the_steepest(marked, secret, ours):
    triggers = SCHEME.trigger_set(secret)
    model = copy.deepcopy(marked).eval()
    loss = nn.functional.cross_entropy(model(triggers.inputs), triggers.targets)
    steepest = torch.autograd.grad(loss, list(model.parameters()))
    assert smoothed(moved(marked, steepest, RADIUS), secret) >= ours.accuracy
    far = moved(marked, steepest, 20 * RADIUS)  # the same direction, outside what is promised
    assert smoothed(far, secret) < ours.accuracy


def test_too_large_a_radius_gets_no_certificate(marked, secret):
    reach = certificate(marked, secret, draws=50).reach
    assert reach == pytest.approx(0.0405, abs=1e-3)  # -0.03 * Phi^-1(1 - 0.01 ** (1 / 50))
    assert certificate(marked, secret, radius=reach * 0.999, draws=50).accuracy is not None
    beyond = certificate(marked, secret, radius=reach * 1.001, draws=50)
    assert (beyond.accuracy, beyond.log10_p) == (None, 0.0)


def test_certified_accuracy_falls_with_the_radius_and_rises_with_the_draws():
    draws = np.random.default_rng(0).uniform(size=300)
    found = [certified_accuracy(draws, radius) for radius in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] <= np.median(draws)
    assert certified_accuracy(np.linspace(0, 1, 1000), 1.0) > certified_accuracy(np.linspace(0, 1, 50), 1.0)


def test_order_statistic_keeps_its_promise():
    """On a law that is known, the claimed quantile lies too high in no more than 1 % of the trials."""
    rng, quantile = np.random.default_rng(0), 0.15865525  # Phi(-1)
    too_high = sum(certified_accuracy(rng.uniform(size=200), 1.0) > quantile for _ in range(4000))
    assert 0 < too_high <= 60


def test_certifying_leaves_the_model_alone(marked, secret):
    before = {name: value.clone() for name, value in marked.state_dict().items()}
    marked.train()
    first, second = (certificate(marked, secret, draws=5) for _ in range(2))
    assert marked.training
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in marked.state_dict().items())


def test_noise_reaches_all_parameters_and_changes_none(plain, secret, digits):
    model = copy.deepcopy(plain).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = SCHEME.embedding(model, secret, None, np.random.default_rng(0))
    run.term(model, digits.owner.take(slice(0, 8))).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fine_tuning_moves_much_further_than_any_certificate(marked, ours, digits):
    attack = registry.modification("fine_tune", epochs=20, rate=0.05)
    tuned = attack.run(marked, Resources.of(digits), rng=np.random.default_rng(3)).model
    pairs = zip(marked.parameters(), tuned.parameters(), strict=True)
    distance = math.sqrt(sum(float((one - other).detach().square().sum()) for one, other in pairs))
    assert distance > 10 * ours.reach


def test_stolen_copy_does_not_carry_it(marked, secret, digits):
    stolen = registry.modification("distill").run(marked, Resources.of(digits), rng=np.random.default_rng(3)).model
    assert SCHEME.verify(WhiteBox(stolen), secret).verdict is Verdict.NO_MATCH


def test_foreign_secret_certifies_nothing(marked, secret, digits):
    with pytest.raises(ForgedSecretError):
        certificate(marked, secret.with_learned({"labels": SCHEME.derive(secret)["labels"]}))
    other = SCHEME.keygen(marked, digits, rng=np.random.default_rng(5))
    assert certificate(marked, other).log10_p > -2


@pytest.mark.parametrize("parameters", [{"triggers": 0}, {"noise": 0.0}, {"levels": 0}, {"copies": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Certified(**parameters)


def test_meaningless_certificates_are_refused(marked, secret):
    for options in ({"sigma": 0.0}, {"draws": 0}, {"radius": -1.0}):
        with pytest.raises(ParameterError):
            certificate(marked, secret, **options)
    with pytest.raises(ParameterError, match="confidence"):
        certified_accuracy(np.ones(5), 1.0, confidence=1.0)
