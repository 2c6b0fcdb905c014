import numpy as np
import pytest
import torch

from sealmark.attacks.removal.permute import Permute
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.symmetry.structure import units_of
from sealmark.core.weights import ModelWeights


def permuted(model, digits, **parameters):
    return Permute(**parameters).run(model, Resources.of(digits, 0.0), rng=np.random.default_rng(0)).model.eval()


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer"])
def test_no_answer_changes(small, digits, name):
    model = small.settled(small.NETWORKS[name])
    one, two = (side(digits.test.inputs) for side in (model, permuted(model, digits)))
    assert (one - two).abs().max() < 5e-6 * one.abs().max()
    assert torch.equal(one.argmax(1), two.argmax(1))


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer"])
def test_every_layer_with_movable_units_looks_otherwise(small, digits, name):
    model = small.settled(small.NETWORKS[name])
    weights, after = ModelWeights(model), ModelWeights(permuted(model, digits))
    for units in units_of(model):
        assert not torch.equal(after[units.makers[0].tensor], weights[units.makers[0].tensor])


def test_the_values_are_the_same_in_another_order(plain, digits):
    after = permuted(plain, digits)
    assert torch.equal(after.conv1.weight.reshape(-1).sort()[0], plain.conv1.weight.reshape(-1).sort()[0])
    assert not torch.equal(after.conv1.weight, plain.conv1.weight)
    assert torch.equal(after.fc2.bias, plain.fc2.bias)


def test_a_share_of_the_layers_is_taken_from_the_input_on(plain, digits):
    after = permuted(plain, digits, share=0.25)
    assert not torch.equal(after.norm1.weight, plain.norm1.weight)
    assert torch.equal(after.norm2.weight, plain.norm2.weight)
    assert ModelWeights(permuted(plain, digits, share=0.0)).digest() == ModelWeights(plain).digest()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_bad_share_is_refused(share):
    with pytest.raises(ParameterError, match="bad share of layers"):
        Permute(share=share)
