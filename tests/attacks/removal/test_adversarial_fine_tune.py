import dataclasses

import numpy as np
import pytest
import torch

from sealmark.attacks.removal.adversarial_fine_tune import AdversarialFineTune
from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.blackbox.crafting import ascend
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.task import Batch

EPS = 0.1


@pytest.fixture(scope="module")
def rows(digits):
    return Resources.of(digits)


@pytest.fixture(scope="module")
def hardened(plain, rows):
    return AdversarialFineTune(epochs=10, rate=0.05, eps=EPS).run(plain, rows, rng=np.random.default_rng(0))


def under_attack(task, model):
    """Accuracy on adversarial examples of the test rows, made against this very model."""
    test = task.test
    found = ascend(model, *test, radius=EPS, steps=10, low=0, high=1)
    return task.score(model, Batch(found, test.targets))


def test_the_model_keeps_its_accuracy_and_withstands_adversarial_examples(digits, plain, rows, hardened):
    tuned = FineTune(epochs=10, rate=0.05).run(plain, rows, rng=np.random.default_rng(0)).model
    assert digits.score(hardened.model) > 0.96
    assert under_attack(digits, hardened.model) > under_attack(digits, tuned) + 0.15


def test_every_row_is_trained_on_with_an_adversarial_example_beside(hardened):
    cost = hardened.cost
    assert (cost.rows, cost.rows_seen, cost.queries) == (400, 8_000, 0)


@pytest.mark.parametrize("steps", [1, 4])
def test_examples_raise_the_loss_and_stay_in_reach_and_in_range(digits, plain, steps):
    batch = digits.attacker.take(slice(0, 100))
    attack = AdversarialFineTune(eps=EPS, steps=steps)
    found = attack._examples(plain, batch, digits.loss, (0.0, 1.0), np.random.default_rng(0))
    assert (found - batch.inputs).abs().max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert digits.score(plain, Batch(found, batch.targets)) < digits.score(plain, batch) - 0.1


def test_looking_for_examples_does_not_change_the_model(digits, rows):
    model = digits.model(np.random.default_rng(0)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    AdversarialFineTune()._examples(model, rows.rows, digits.loss, (0.0, 1.0), np.random.default_rng(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.norm1.training


def test_the_same_seed_gives_the_same_model(digits, plain, same):
    few = Resources.of(digits, 0.2)
    one, again, other = (
        AdversarialFineTune(epochs=1).run(plain, few, rng=np.random.default_rng(seed)).model for seed in (0, 0, 1)
    )
    assert same(one, again)
    assert not same(one, other)


def test_a_larger_eps_makes_another_model(digits, plain, same):
    few = Resources.of(digits, 0.2)
    one, other = (
        AdversarialFineTune(epochs=1, eps=eps).run(plain, few, rng=np.random.default_rng(0)).model
        for eps in (0.01, 0.25)
    )
    assert not same(one, other)


def test_a_high_rate_and_a_wide_ball_remove_triggers_that_the_defaults_leave(digits, marked, rows):
    gentle, harsh = (
        attack.run(marked.model, rows, rng=np.random.default_rng(0)).model
        for attack in (AdversarialFineTune(), AdversarialFineTune(epochs=10, rate=0.05, eps=0.25))
    )
    assert marked.known(gentle) > 0.9
    assert marked.known(harsh) < 0.6
    assert digits.score(harsh) > 0.95


def test_scratch_learns_from_the_same_rows_alone(digits):
    few = Resources.of(digits, 0.25)
    assert 0.85 < digits.score(AdversarialFineTune(epochs=30).scratch(few, np.random.default_rng(0))) < 0.97


def test_words_have_no_such_neighborhood(digits):
    tokens = registry.task("tokens")
    model = tokens.model(np.random.default_rng(0))
    with pytest.raises(UnsupportedError, match=r"real numbers.*Use fine_tune"):
        AdversarialFineTune().run(model, Resources.of(tokens), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "parameters",
    [{"epochs": 0}, {"rate": 0.0}, {"eps": 0}, {"eps": float("nan")}, {"eps": float("inf")}, {"steps": 0}],
)
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of adversarial_fine_tune"):
        dataclasses.replace(AdversarialFineTune(), **parameters)
