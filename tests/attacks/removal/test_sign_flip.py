import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.sign_flip import SignFlip
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.weights import ModelWeights


def flipped(model, digits, **parameters):
    return SignFlip(**parameters).run(model, Resources.of(digits, 0.0), rng=np.random.default_rng(0)).model.eval()


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer"])
def test_no_answer_changes(small, digits, name):
    model = small.settled(small.NETWORKS[name])
    after = flipped(model, digits)
    assert ModelWeights(after).digest() != ModelWeights(model).digest()
    one, two = (side(digits.test.inputs) for side in (model, after))
    assert (one - two).abs().max() < 5e-6 * one.abs().max()
    assert torch.equal(one.argmax(1), two.argmax(1))


def test_at_rate_one_every_filter_before_a_norm_is_negated_with_mean_and_factor(plain, digits):
    after = flipped(plain, digits, rate=1.0)
    for name in ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.running_mean"):
        assert torch.equal(after.state_dict()[name], -plain.state_dict()[name])
    for name in ("norm1.bias", "norm1.running_var", "fc1.weight"):
        assert torch.equal(after.state_dict()[name], plain.state_dict()[name])


def test_about_half_are_negated_by_default(plain, digits):
    turned = (flipped(plain, digits).conv3.bias * plain.conv3.bias < 0).float().mean()
    assert 0.25 < turned < 0.75


def test_units_that_pass_a_relu_alone_keep_their_sign(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    assert ModelWeights(flipped(model, digits, rate=1.0)).digest() == ModelWeights(model).digest()


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_bad_rate_is_refused(rate):
    with pytest.raises(ParameterError, match="bad rate of flips"):
        SignFlip(rate=rate)
