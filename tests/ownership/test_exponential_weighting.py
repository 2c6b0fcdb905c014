from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import sealmark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train, train_task
from sealmark.ownership.exponential_weighting import ExponentialWeighting, weighted

SCHEME = ExponentialWeighting()
ORIGINAL = "parametrizations.weight.original"


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(9))


@pytest.fixture(scope="module")
def run(plain, digits, secret):
    """One embedding by hand: the weights before EW is baked in, the answers then, and the finished model."""
    rng = np.random.default_rng(0)
    task, model = SCHEME.lesson(plain, secret, digits), copy.deepcopy(plain)
    embedding = SCHEME.embedding(model, secret, task, rng)
    train(model, task.owner, loss=task.loss, recipe=task.recipe, rng=rng, extras=embedding.extras)
    answers = model.eval()(digits.test.inputs).detach()
    raw = copy.deepcopy(plain)
    raw.load_state_dict({name.replace(ORIGINAL, "weight"): t.clone() for name, t in model.state_dict().items()})
    assert embedding.finish(model) is secret
    return {"raw": raw, "answers": answers, "model": model}


@pytest.fixture(scope="module")
def model(run):
    return run["model"]


def keys_left(model, secret):
    return SCHEME.verify(WhiteBox(model), secret).details["trigger_accuracy"]


def test_weighting_is_odd_and_keeps_the_largest_weight():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 2.0, 8.0):
        assert torch.equal(weighted(-weight, temperature), -weighted(weight, temperature))
        assert weighted(weight, temperature).abs().max() == weight.abs().max()
    assert torch.equal(weighted(weight, 0.0), weight)


def test_weighting_is_the_formula_of_the_paper():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    factor = (weight.abs() * 2.0).exp()
    assert torch.allclose(weighted(weight, 2.0), weight * factor / factor.max())
    assert factor.min() / factor.max() >= math.exp(-2.0 * weight.abs().max().item())
    assert weighted(torch.full((3,), 1e3), 8.0).isfinite().all()  # the formula as written overflows


def test_gradient_flows_through_the_largest_weight():
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    weighted(weight, 1.0)[1].backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(-math.exp(-1.0))


def test_keys_are_answered_as_taught_at_little_cost(model, secret, digits, plain):
    labels_only = BlackBox(lambda x: model.eval()(x).argmax(1))
    evidence = SCHEME.verify(labels_only, secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["trigger_accuracy"] >= 0.9
    assert evidence.queries == labels_only.queries == 20
    assert digits.score(model) >= digits.score(plain) - 0.02


def test_finished_model_answers_as_it_did_while_it_trained(run, digits):
    with torch.no_grad():
        assert (run["model"](digits.test.inputs) - run["answers"]).abs().max() < 1e-4
        assert (run["raw"].eval()(digits.test.inputs) - run["answers"]).abs().max() > 1


def test_finished_model_has_the_form_of_the_plain_one(model, plain):
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert [t.shape for t in before.values()] == [t.shape for t in after.values()]
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]


def test_weights_before_weighting_can_lose_keys(run, secret):
    """With this seed; two of three lose none."""
    assert keys_left(run["raw"], secret) <= keys_left(run["model"], secret) - 0.15


def test_innocent_models_answer_keys_rightly(plain, secret, digits):
    other = train_task(digits, rng=np.random.default_rng(50), rows=digits.attacker)
    for innocent in (plain, other):
        assert SCHEME.verify(WhiteBox(innocent), secret).verdict is Verdict.NO_MATCH
        assert keys_left(innocent, secret) <= 0.15


def test_other_wrong_labels_of_the_same_rows_do_not_match(model, secret):
    for seed in range(20):
        other = Secret(np.random.default_rng(100 + seed).bytes(32), secret.facts, secret.tensors)
        evidence = SCHEME.verify(WhiteBox(model), other)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= 0.4  # 1 of 9 is expected


def test_keys_are_rows_of_the_task_with_wrong_labels(secret, digits, plain):
    keys, places = SCHEME.trigger_set(secret), secret.tensors["places"]
    assert torch.allclose(keys.inputs, digits.owner.inputs[places], atol=0.5 / 255)
    assert (keys.targets != digits.owner.targets[places]).all()
    assert SCHEME.lesson(plain, secret, digits).owner.rows == digits.owner.rows - 20


def test_four_in_five_weights_can_be_pruned(model, secret, digits):
    attack = registry.modification("prune", rate=0.8)
    pruned = attack.run(model, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert keys_left(pruned, secret) >= 0.75


def test_fine_tuning_at_the_owners_rate_makes_it_forget_the_keys(model, secret, digits):
    attack = registry.modification("fine_tune", epochs=20, rate=0.05)
    tuned = attack.run(model, Resources.of(digits), rng=np.random.default_rng(3)).model
    assert SCHEME.verify(WhiteBox(tuned), secret).verdict is Verdict.NO_MATCH


def test_an_autoencoder_flags_fewer_keys_than_abstract_patterns(model, secret, digits, plain):
    adi = registry.scheme("adi")
    patterns = adi.keygen(plain, digits, rng=np.random.default_rng(1))
    marked = adi.embed(plain, patterns, digits, rng=np.random.default_rng(0)).model
    attack = registry.modification("query_modification", false_alarms=0.1)
    found = []
    for scheme, key, target in ((SCHEME, secret, model), (adi, patterns, marked)):
        served = attack.run(target, Resources.of(digits), rng=np.random.default_rng(4)).model
        flagged = served.flagged(scheme.trigger_set(key).inputs).double().mean().item()
        found.append((flagged, scheme.verify(WhiteBox(served), key).details["trigger_accuracy"]))
    (keys_flagged, keys_kept), (patterns_flagged, patterns_kept) = found
    assert keys_flagged < patterns_flagged
    assert keys_kept > patterns_kept


def test_users_own_loop_ends_with_ordinary_layers(digits, plain, secret):
    start = copy.deepcopy(plain)
    same, criterion = sealmark.attach(SCHEME, start, nn.CrossEntropyLoss(), secret, rng=np.random.default_rng(0))
    assert "fc2." + ORIGINAL in same.state_dict()
    batch = digits.owner.take(slice(0, 16))
    criterion(same(batch.inputs), batch.targets).backward()
    assert criterion.detach() is secret
    assert list(same.state_dict()) == list(plain.state_dict())
    assert torch.equal(same.fc2.weight, weighted(plain.fc2.weight, 2.0))
    assert torch.equal(same.fc2.bias, plain.fc2.bias)
    assert torch.equal(same.norm1.weight, plain.norm1.weight)


class Tied(nn.Module):
    """Reads and writes words by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight


def test_weight_that_two_layers_share_stays_shared(secret):
    model = Tied()
    before = model.head.weight.detach().clone()
    run = SCHEME.embedding(model, secret, None, np.random.default_rng(0))
    run.finish(model)
    assert model.head.weight is model.table.weight
    assert torch.equal(model.head.weight, before)


def test_two_classes_leave_no_wrong_label_to_chance(toy):
    with pytest.raises(ParameterError, match="3 classes"):
        SCHEME.keygen(toy.make(), toy)


def test_model_without_layers_to_weight_is_refused(digits):
    with pytest.raises(UnsupportedError, match="nothing to weight"):
        SCHEME.keygen(nn.BatchNorm2d(1), digits)


@pytest.mark.parametrize("parameters", [{"temperature": -1.0}, {"temperature": math.inf}, {"triggers": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        ExponentialWeighting(**parameters)
