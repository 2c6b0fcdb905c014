import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.fine_tune import FineTune, head_of
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.training import train_task

FAMILY = [("all", False), ("last", False), ("all", True), ("last", True)]


@pytest.fixture(scope="module")
def model(digits):
    return train_task(digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def rows(digits):
    return Resources.of(digits, 0.25)


def changed(before, after):
    before, after = before.state_dict(), after.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("layers", "reset_last"), FAMILY)
def test_every_member_of_the_family_keeps_the_accuracy(digits, model, rows, layers, reset_last):
    attack = FineTune(epochs=10, rate=0.02, layers=layers, reset_last=reset_last)
    assert digits.score(attack.run(model, rows, rng=np.random.default_rng(0)).model) > 0.95


def test_all_layers_and_running_statistics_change_when_all_are_trained(model, rows):
    result = FineTune(epochs=1).run(model, rows, rng=np.random.default_rng(0))
    assert changed(model, result.model) == set(model.state_dict())


@pytest.mark.parametrize("reset_last", [False, True])
def test_nothing_but_the_head_changes_when_the_head_is_trained(model, rows, reset_last):
    attack = FineTune(epochs=1, layers="last", reset_last=reset_last)
    result = attack.run(model, rows, rng=np.random.default_rng(0))
    assert changed(model, result.model) == {"fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("layers", ["all", "last"])
def test_a_reset_head_starts_afresh(digits, model, rows, layers):
    kept, reset = (
        FineTune(epochs=1, rate=1e-6, layers=layers, reset_last=flag).run(model, rows, rng=np.random.default_rng(0))
        for flag in (False, True)
    )
    assert digits.score(kept.model) > 0.95
    assert digits.score(reset.model) < 0.5
    similarity = nn.functional.cosine_similarity(kept.model.fc1.weight, reset.model.fc1.weight).min()
    assert similarity > 0.999  # the body is kept


def test_the_target_is_left_as_it_is(model, rows):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FineTune(epochs=1).run(model, rows, rng=np.random.default_rng(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_frozen_model_is_thawed_first(model, rows):
    frozen = train_task(rows.task, rng=np.random.default_rng(1)).requires_grad_(False)
    result = FineTune(epochs=1).run(frozen, rows, rng=np.random.default_rng(0))
    assert "conv1.weight" in changed(frozen, result.model)


def test_the_same_seed_gives_the_same_surrogate(model, rows):
    first, again, other = (
        FineTune(epochs=1, reset_last=True).run(model, rows, rng=np.random.default_rng(seed)).model
        for seed in (0, 0, 1)
    )
    assert not changed(first, again)
    assert changed(first, other)


def test_the_cost_counts_the_rows(model, rows):
    cost = FineTune(epochs=3).run(model, rows, rng=np.random.default_rng(0)).cost
    assert (cost.rows, cost.rows_seen, cost.copies) == (100, 300, 1)


def test_scratch_learns_from_the_same_rows_alone(digits, rows):
    score = digits.score(FineTune(epochs=30).scratch(rows, np.random.default_rng(0)))
    assert 0.85 < score < 0.97


def test_scratch_trains_at_the_rate_of_the_task(digits, rows):
    slow, fast = (FineTune(epochs=2, rate=r).scratch(rows, np.random.default_rng(0)) for r in (1e-9, 0.1))
    assert not changed(slow, fast)


def test_an_attacker_without_rows_is_refused(digits, model):
    with pytest.raises(ParameterError, match="needs data"):
        FineTune().run(model, Resources.of(digits, 0.0), rng=np.random.default_rng(0))


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.body = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(2)

    def forward(self, inputs):
        return self.norm(self.head(self.body(inputs)))


def test_the_head_is_the_last_layer_that_runs_not_the_last_that_was_declared():
    model = HeadFirst()
    assert head_of(model, torch.zeros(3, 4)) is model.head
    assert not model.head._forward_hooks
    assert model.training


@pytest.mark.parametrize(("layers", "reset_last"), FAMILY[1:])
def test_a_model_without_a_head_is_refused_where_one_is_needed(rows, layers, reset_last):
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64))
    with pytest.raises(UnsupportedError, match=r"no head.*layers='all'"):
        FineTune(1, 0.01, layers, reset_last).run(model, rows, rng=np.random.default_rng(0))


@pytest.mark.parametrize("parameters", [{"epochs": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"layers": "first"}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of fine_tune"):
        FineTune(**parameters)
