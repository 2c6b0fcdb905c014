import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.rescale import Rescale
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.weights import ModelWeights


def rescaled(model, digits, **parameters):
    return Rescale(**parameters).run(model, Resources.of(digits, 0.0), rng=np.random.default_rng(0)).model.eval()


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer"])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_no_answer_changes(small, digits, name, spread):
    model = small.settled(small.NETWORKS[name])
    one, two = (side(digits.test.inputs) for side in (model, rescaled(model, digits, spread=spread)))
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    assert torch.equal(one.argmax(1), two.argmax(1))


def test_each_filter_gets_a_positive_factor_of_its_own(plain, digits):
    ratio = rescaled(plain, digits).conv1.weight / plain.conv1.weight
    factors = ratio.reshape(16, -1)
    assert (factors > 0).all()
    assert (factors.std(1) < 1e-5 * factors.mean(1)).all()
    assert factors[:, 0].log().std() > 0.5


def test_a_tiny_variance_beside_eps_costs_nothing(digits):
    """A batch normalization whose variance is below its eps is not invariant to scale by itself."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).eval()
    model[2].running_var.fill_(1e-6)
    one, two = (side(digits.test.inputs) for side in (model, rescaled(model, digits, spread=2.0)))
    assert (one - two).abs().max() < 1e-5 * one.abs().max()


def test_what_a_gelu_reads_keeps_its_scale(small, digits):
    model = small.settled(small.NETWORKS["transformer"])
    after = rescaled(model, digits)
    assert torch.equal(after.blocks[0].wide.bias, model.blocks[0].wide.bias)
    assert not torch.equal(after.blocks[0].norm2.bias, model.blocks[0].norm2.bias)


def test_a_model_without_such_places_is_left_as_it_is(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 10))
    assert ModelWeights(rescaled(model, digits)).digest() == ModelWeights(model).digest()


@pytest.mark.parametrize("spread", [0, -1, 5])
def test_a_bad_spread_is_refused(spread):
    with pytest.raises(ParameterError, match="bad spread of factors"):
        Rescale(spread=spread)
