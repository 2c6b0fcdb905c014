import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.prune import Prune
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.training import train_task


@pytest.fixture(scope="module")
def model(digits):
    return train_task(digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def rows(digits):
    return Resources.of(digits, 0.0)


def pruned(model, rows, **parameters):
    return Prune(**parameters).run(model, rows, rng=np.random.default_rng(0)).model


def zeros(tensor):
    return int((tensor == 0).sum())


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_the_share_of_zeros_is_the_rate_over_all_weights(model, rows, rate):
    weights = [p for p in pruned(model, rows, rate=rate).parameters() if p.dim() >= 2]
    assert sum(map(zeros, weights)) == round(rate * sum(p.numel() for p in weights))


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_the_share_of_zeros_is_the_rate_in_each_tensor(model, rows, rate):
    for weight in pruned(model, rows, rate=rate, scope="tensor").parameters():
        if weight.dim() >= 2:
            assert zeros(weight) == round(rate * weight.numel())


def test_the_smallest_go_and_the_others_stay(rows):
    plain = nn.Linear(4, 1)
    plain.weight.data = torch.tensor([[0.5, -0.1, 0.2, -3.0]])
    assert pruned(plain, rows, rate=0.5).weight.tolist() == [[0.5, 0.0, 0.0, -3.0]]


def test_among_equal_weights_no_more_than_the_share_goes(rows):
    plain = nn.Linear(10, 1)
    plain.weight.data.fill_(0.25)
    assert zeros(pruned(plain, rows, rate=0.3).weight) == 3


def test_a_small_layer_goes_first_under_the_global_scope_alone(rows):
    plain = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    plain[0].weight.data.mul_(1e-9)  # so that none of the other layer is as small by chance
    assert [zeros(layer.weight) for layer in pruned(plain, rows, rate=0.5)] == [100, 0]
    assert [zeros(layer.weight) for layer in pruned(plain, rows, rate=0.5, scope="tensor")] == [50, 50]


def test_biases_norms_and_running_statistics_stay(model, rows):
    after = pruned(model, rows, rate=1.0).state_dict()
    for name, tensor in model.state_dict().items():
        kept = tensor.dim() < 2
        assert torch.equal(after[name], tensor) is kept


def test_half_of_the_weights_cost_no_accuracy_and_all_cost_everything(digits, model, rows):
    assert digits.score(pruned(model, rows, rate=0.5)) >= digits.score(model) - 0.01
    assert digits.score(pruned(model, rows, rate=1.0)) < 0.2


def test_it_needs_no_data_and_says_so(model, rows):
    cost = Prune().run(model, rows, rng=np.random.default_rng(0)).cost
    assert (cost.rows, cost.rows_seen) == (0, 0)


def test_a_model_without_weight_tensors_is_left_as_it_is(rows):
    plain = nn.BatchNorm1d(4)
    assert torch.equal(pruned(plain, rows, rate=1.0).weight, plain.weight)


@pytest.mark.parametrize("parameters", [{"rate": -0.1}, {"rate": 1.1}, {"scope": "layer"}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of prune"):
        Prune(**parameters)
