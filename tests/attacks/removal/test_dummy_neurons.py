import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sealmark.attacks.removal.dummy_neurons import DummyNeurons
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.weights import ModelWeights

KINDS = ["zero", "clique", "split"]


def padded(model, digits, **parameters):
    return (
        DummyNeurons(**parameters).run(model, Resources.of(digits, 0.0), rng=np.random.default_rng(0)).model.eval()
    )


def with_depthwise():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GELU(), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer", "depthwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_changes(small, digits, name, kind):
    model = small.settled({**small.NETWORKS, "depthwise": with_depthwise}[name])
    one, two = (side(digits.test.inputs) for side in (model, padded(model, digits, kind=kind)))
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    assert torch.equal(one.argmax(1), two.argmax(1))


@pytest.mark.parametrize(("kind", "added"), [("zero", 8), ("clique", 8), ("split", 8)])
def test_the_share_tells_how_many_are_added(plain, digits, kind, added):
    after = padded(plain, digits, kind=kind, share=0.25)
    assert after.conv2.weight.shape == (32 + added, 16 + added // 2, 3, 3)
    assert after.fc1.in_features == 16 * (64 + 2 * added)


def test_modules_know_their_new_width(plain, digits):
    after = padded(plain, digits, share=0.5)
    assert (after.conv1.out_channels, after.norm1.num_features, after.conv2.in_channels) == (24, 24, 24)
    assert (after.fc1.out_features, after.fc2.in_features, after.fc2.out_features) == (192, 192, 10)
    assert "Conv2d(24, 48" in repr(after)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_can_be_trained_on(plain, digits, kind):
    after = padded(plain, digits, kind=kind).train()
    before = ModelWeights(copy.deepcopy(after)).digest()
    optimizer = torch.optim.SGD(after.parameters(), 0.1)
    functional.cross_entropy(after(digits.attacker.inputs), digits.attacker.targets).backward()
    optimizer.step()
    assert ModelWeights(after).digest() != before


def test_of_zero_dummies_nobody_reads_the_outputs(plain, digits):
    columns = padded(plain, digits, kind="zero").fc2.weight.abs().sum(0)
    assert int((columns == 0).sum()) == 32


def test_clique_dummies_stand_in_pairs_that_cancel(plain, digits):
    after = padded(plain, digits, kind="clique")
    alike = (functional.normalize(after.fc1.weight) @ functional.normalize(after.fc1.weight).T).fill_diagonal_(
        0
    ) > 0.99999
    pairs = alike.nonzero()
    assert len(pairs) == 32
    assert all(torch.equal(after.fc2.weight[:, i], -after.fc2.weight[:, j]) for i, j in pairs.tolist())


def test_split_neurons_share_what_is_read_of_them(plain, digits):
    after = padded(plain, digits, kind="split")
    assert torch.allclose(after.fc2.weight.sum(1), plain.fc2.weight.sum(1), atol=1e-5)
    assert not torch.equal(after.fc1.bias.sort()[0][:128], plain.fc1.bias.sort()[0])


def test_of_a_transformer_the_hidden_units_grow_and_the_stream_does_not(small, digits):
    after = padded(small.settled(small.NETWORKS["transformer"]), digits, share=0.5)
    assert after.blocks[0].wide.weight.shape == (48, 16)
    assert after.embed.weight.shape == (16, 8)


def test_a_width_that_the_forward_function_spells_out_stays(digits):
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

        def forward(self, x):
            return self.head(self.conv(x).relu().view(-1, 144))

    model = Spelled()
    assert ModelWeights(padded(model, digits)).digest() == ModelWeights(model).digest()


@pytest.mark.parametrize("parameters", [{"kind": "none"}, {"share": 0}, {"share": 5}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of dummy_neurons"):
        DummyNeurons(**parameters)
