import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from sealmark.core.errors import UnsupportedError
from sealmark.core.symmetry.rewriting import reorder, scale
from sealmark.core.symmetry.structure import Slot, normalized_layers, units_of
from sealmark.core.weights import ModelWeights

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layers(model):
    return [units.layer for units in units_of(model)]


class Net(nn.Module):
    """Any forward function over named layers."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def rewritten(model, *, seed=0):
    """The same function in another form, in float64: everything moved and scaled that may be."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    weights = ModelWeights(twin)
    tensors = {name: weights[name].clone() for name in weights}
    for units in units_of(model):
        reorder(tensors, units, torch.randperm(units.size, generator=generator))
        for stretch in units.stretches:
            factors = torch.randn(units.size, generator=generator, dtype=torch.float64).exp()
            if stretch.signs:
                factors[::2] *= -1
            scale(tensors, stretch, factors)
    with torch.no_grad():
        for name in weights:
            weights[name].copy_(tensors[name])
    return twin


def assert_same_function(small, make, inputs=IMAGES):
    model = small.settled(make).double().eval()
    twin = rewritten(model)
    assert ModelWeights(twin).digest() != ModelWeights(model).digest() or not units_of(model)
    one, two = model(inputs), twin(inputs)
    assert (one - two).abs().max() <= 1e-11 * one.abs().max()


def tied(net, x):
    hidden = net.embed(x)
    return functional.linear(net.norm(hidden + net.narrow(net.wide(hidden).relu()))[:, 0], net.embed.weight)


def attention(net, x):
    x = net.embed(x.squeeze(1))
    y = net.norm(x)
    return net.head((x + net.attend(y, y, y, need_weights=False)[0]).mean(1))


def sdpa(net, x):
    rows, tokens, _ = x.squeeze(1).shape
    x = torch.cat([net.token.expand(rows, -1, -1), net.embed(x.squeeze(1)) + net.place[:, :tokens]], dim=1)
    q, k, v = (part(x).view(rows, tokens + 1, 4, -1).transpose(1, 2) for part in (net.q, net.k, net.v))
    seen = functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)
    return net.head(net.o(seen.flatten(2))[:, 0])


def attending(forward, **extra):
    return lambda: Net(
        forward,
        embed=nn.Linear(8, 16),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, 10),
        **{name: make() for name, make in extra.items()},
    )


def projected():
    parameters = {
        "token": lambda: nn.Parameter(torch.zeros(1, 1, 16)),
        "place": lambda: nn.Parameter(torch.ones(1, 12, 16)),
    }
    return attending(sdpa, **dict.fromkeys("qkvo", lambda: nn.Linear(16, 16)), **parameters)()


def encoder(first, activation):
    layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=first, batch_first=True, activation=activation)
    return attending(
        lambda net, x: net.head(net.body(net.embed(x.squeeze(1))).mean(1)),
        body=lambda: nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False),
    )


def normed_heads(net, x):
    x = x.squeeze(1)
    rows, tokens = x.size(0), x.size(1)
    q, k, v = (net.norm(net.q(x)).view(rows, tokens, -1, 4).permute(0, 2, 1, 3) for _ in range(3))
    seen = torch.matmul((q @ k.transpose(2, 3)).softmax(-1), v).transpose(1, 2)
    return net.head(seen.reshape(rows, tokens, 16).mean(-2))


def gated(net, x):
    y = net.conv(x)
    gate = functional.adaptive_avg_pool2d(y, 1).sigmoid()
    return net.head((y * gate * net.gain).mean((2, 3)))


def patches(net, x):
    return net.head(net.norm(net.conv(x).flatten(2).transpose(1, 2)).amax(1))


CASES = {
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.GroupNorm(1, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20),
        nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3),
    ),
    "other norms": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(8, 8), nn.PReLU(8), nn.ConvTranspose2d(8, 6, 3),
        nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(), nn.Upsample(scale_factor=2), nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 1), nn.LayerNorm((5, 8, 8)),
        nn.Flatten(), nn.BatchNorm1d(320), nn.Dropout(), nn.Linear(320, 3),
    ),
    "statistics of the batch": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 2, 3)
    ),
    "no factor": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ),
    "pooled": lambda: Net(
        lambda net, x: net.last(functional.lp_pool2d(net.conv(x), 2, 2).abs().mean((2, 3), True)).flatten(1),
        conv=nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 8, 3), nn.MaxPool2d(1)), last=nn.Conv2d(8, 2, 1),
    ),
    "flat already": lambda: Net(
        lambda net, x: net.last(net.mid(net.first(x.flatten(1)).flatten(1)).view(x.size(0), -1)),
        first=nn.Linear(64, 8), mid=nn.Linear(8, 6), last=nn.Linear(6, 2),
    ),
    "flat without a known rank": lambda: Net(
        lambda net, x: net.last(net.first(x.mean((1, 2))).flatten(1)), first=nn.Linear(8, 16), last=nn.Linear(16, 2)
    ),
    "view without a known rank": lambda: Net(
        lambda net, x: net.last(net.first(x.mean((1, 2))).view(x.size(0), -1)),
        first=nn.Linear(8, 16), last=nn.Linear(16, 2),
    ),
    "one slope": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.PReLU(), nn.Conv2d(8, 2, 3)),
    "attention": attending(attention, attend=lambda: nn.MultiheadAttention(16, 4, batch_first=True)),
    "projections": projected,
    "normalized heads": lambda: Net(
        normed_heads, q=nn.Linear(8, 16), norm=nn.LayerNorm(16), head=nn.Linear(16, 3)
    ),
    "post-norm encoder": encoder(False, "relu"),
    "pre-norm encoder": encoder(True, nn.GELU()),
    "gate": lambda: Net(
        gated, conv=nn.Conv2d(1, 8, 3), gain=nn.Parameter(torch.ones(8, 1, 1)), head=nn.Linear(8, 3)
    ),
    "patches": lambda: Net(patches, conv=nn.Conv2d(1, 8, 2, 2), norm=nn.LayerNorm(8), head=nn.Linear(8, 3)),
    "old view": lambda: Net(
        lambda net, x: net.head((net.conv(x) * 2 / 3).relu().view(x.size(0), -1)),
        conv=nn.Conv2d(1, 8, 3),
        head=nn.Linear(288, 3),
    ),
    "spelled out view": lambda: Net(
        lambda net, x: net.head(net.conv(x).view(-1, 288)), conv=nn.Conv2d(1, 8, 3), head=nn.Linear(288, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "digits", "residual", "transformer"])
def test_whatever_it_tells_to_be_free_leaves_the_function_as_it_is(small, name):
    assert_same_function(small, small.NETWORKS[name])


@pytest.mark.parametrize("name", CASES)
def test_so_it_is_with_less_usual_parts(small, name):
    assert units_of(CASES[name]())
    assert_same_function(small, CASES[name])


def test_so_it_is_with_tied_embeddings(small):
    def make():
        return Net(
            tied,
            embed=nn.Embedding(11, 16),
            norm=nn.LayerNorm(16),
            wide=nn.Linear(16, 32),
            narrow=nn.Linear(32, 16),
        )

    assert {"embed", "wide"} <= set(layers(make()))
    assert_same_function(small, make, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0)))


def test_a_wrong_order_does_change_the_function(small):
    """The negative control: readers that are left behind."""
    model = small.settled(small.NETWORKS["digits"]).double()
    twin = copy.deepcopy(model)
    twin.conv1.weight.data.copy_(model.conv1.weight.flip(0))
    assert (model(IMAGES) - twin(IMAGES)).abs().max() > 1e-3


def test_the_digits_net_has_four_layers_of_units_in_forward_order(small):
    conv1, _, conv3, linear = units_of(small.NETWORKS["digits"]())
    assert [conv1.layer, conv3.layer, linear.layer] == ["conv1", "conv3", "fc1"]
    assert conv1.makers == (Slot("conv1.weight", 0), Slot("conv1.bias", 0))
    assert [norm.module for norm in conv1.norms] == ["norm1"]
    assert conv3.readers == (Slot("fc1.weight", 1, 16),)
    assert (linear.norms, linear.activations, linear.scalable) == ((), ("relu",), True)


def test_signs_are_free_before_a_batch_normalization_and_not_after(small):
    inner, outer = units_of(small.NETWORKS["digits"]())[0].stretches
    assert (inner.signs, [norm.module for norm in inner.norms], inner.readers) == (True, ["norm1"], ())
    assert (outer.signs, outer.norms, outer.readers) == (False, (), (Slot("conv2.weight", 1),))


def test_a_residual_stream_is_one_group(small):
    stream = units_of(small.NETWORKS["residual"]())[0]
    assert {slot.tensor for slot in stream.makers} == {"stem.weight", "block1.conv2.weight"}
    assert {slot.tensor for slot in stream.readers} == {
        "block1.conv1.weight", "block2.conv1.weight", "block2.short.0.weight",
    }  # fmt: skip


def test_of_a_transformer_the_stream_the_heads_and_the_hidden_units_are_free(small):
    stream, heads, hidden, *_ = units_of(small.NETWORKS["transformer"]())
    assert (stream.layer, stream.size, stream.resizable) == ("embed", 16, False)
    assert (heads.size, heads.makers[0]) == (4, Slot("blocks.0.q.weight", 0, 4))
    assert (hidden.layer, hidden.activations, hidden.scalable) == ("blocks.0.wide", ("gelu",), False)
    assert not any(slot.tensor == "embed.weight" for stretch in stream.stretches for slot in stretch.sources)


def frozen(forward, **parts):
    wide = nn.Parameter(torch.ones(2, 24))
    return Net(forward, first=nn.Linear(8, 16), last=nn.Linear(16, 4), wide=wide, **parts)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.last(net.first(x).flip(-1)),
        lambda net, x: net.last(net.first(x).cumsum(-1)),
        lambda net, x: net.last(net.first(x) * x.sum()),
        lambda net, x: net.last(net.first(x)[..., :16]),
        lambda net, x: net.last(net.first(x) + torch.arange(16)),
        lambda net, x: net.last(torch.cat([net.first(x), net.first(x)], -1)[:, :16]),
        lambda net, x: (net.last(net.first(x)), net.first(x)),
        lambda net, x: net.last(net.first(x).reshape(4, 2, 8).reshape(-1, 16)),
        lambda net, x: net.last(net.first(x).norm(2, -1, keepdim=True) + net.first(x)),
        lambda net, x: net.last(functional.pad(net.first(x), (1, 0))[:, 1:]),
        lambda net, x: net.last(functional.max_pool1d(net.first(x), 1)),
        lambda net, x: net.last(net.first(x).clamp(min=net.last.bias.sum())),
        lambda net, x: net.last(net.first(x).pow(net.first.bias)),
        lambda net, x: net.last(net.first(x).mean(-1, keepdim=True) + net.first(x)),
        lambda net, x: net.last(net.first(x).transpose(0, 1).transpose(0, 1)),
        lambda net, x: net.last(net.first(x) @ net.first(x).T @ net.first(x)),
        lambda net, x: net.last(functional.linear(net.first(x), net.first(x))[:, :16]),
        lambda net, x: net.last(functional.linear(x, weight=net.first.weight)),
        lambda net, x: net.last(net.first(x) + net.first.bias[2]),
        lambda net, x: net.last(2 / net.first(x) + net.wide),
        lambda net, x: net.last(torch.cat([net.first(x), x], 0)),
        lambda net, x: net.last(functional.linear(net.first(x), net.last.weight, x)),
        lambda net, x: net.last(net.first(x).flatten(0, 1)),
        lambda net, x: net.last(net.first(x)[None]),
        lambda net, x: net.last(net.first(x).expand(4, 16)),
        lambda net, x: net.last(net.first(x) + net.wide[:, :8]),
        lambda net, x: net.last(net.first(x) + net.wide[:, x.size()]),
    ],
)  # fmt: skip
def test_what_is_not_understood_freezes_the_units_that_flow_into_it(forward):
    frees = {units.layer for units in units_of(frozen(forward))}
    assert "first" not in frees


def test_the_same_layers_without_that_are_free():
    assert layers(frozen(lambda net, x: net.last(net.first(x).relu()))) == ["first"]


def convolved(forward):
    return Net(forward, conv=nn.Conv2d(1, 8, 3), last=nn.Conv2d(8, 2, 1), wide=nn.Parameter(torch.ones(288)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.last(net.conv(x) + net.conv(x).transpose(1, 3)),
        lambda net, x: net.last(torch.cat([net.conv(x), net.conv(x).transpose(1, 3)], 2)),
        lambda net, x: net.last(functional.max_pool2d(net.conv(x), 2, return_indices=True)[0]),
        lambda net, x: net.last(functional.max_pool1d(net.conv(x), 2)),
        lambda net, x: net.last(functional.interpolate(net.conv(x).transpose(1, 3), scale_factor=2)),
        lambda net, x: net.conv(x).flatten(1) + net.wide,
        lambda net, x: net.last(net.conv(x).flatten(0)),
        lambda net, x: net.last(net.conv(x).flatten(1).flatten(0)),
        lambda net, x: net.last(net.conv(x)[:, :4]),
    ],
)
def test_so_do_channels(forward):
    assert layers(convolved(forward)) == []


def test_the_same_convolutions_without_that_are_free():
    assert layers(convolved(lambda net, x: net.last(net.conv(x)[:, :, 1:, 0:2]))) == ["conv"]


def test_modules_that_are_not_understood_freeze_too():
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.PReLU(4), nn.Conv2d(8, 1, 1))) == []
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(6, 3))) == []
    assert layers(nn.Sequential(nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 3))) == []
    assert layers(nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 4))) == ["0"]
    assert layers(nn.Sequential(nn.Linear(8, 16), nn.Fold((4, 4), 2), nn.Linear(16, 4))) == []
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 1, 1))) == []
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 1, 1))) == []
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1), nn.MaxPool2d(2, return_indices=True))) == [
        "0"
    ]


def test_a_layer_with_a_hook_or_a_parametrization_is_not_understood():
    hooked = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert layers(hooked) == ["0"]
    hooked[1].register_forward_hook(lambda module, inputs, output: output.flip(-1))
    assert layers(hooked) == []
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))
    assert layers(normed) == []


def test_inputs_and_outputs_keep_their_order():
    assert layers(nn.Linear(4, 4)) == []
    assert layers(nn.Sequential(nn.BatchNorm1d(4), nn.PReLU(4), nn.Linear(4, 4))) == []


def test_a_layer_that_runs_twice_moves_its_inputs_and_outputs_together_or_not_at_all():
    def net(forward):
        return Net(forward, first=nn.Linear(8, 16), mid=nn.Linear(16, 16), last=nn.Linear(16, 4))

    [units] = units_of(net(lambda net, x: net.last(net.mid(net.mid(net.first(x)).relu()))))
    assert (units.layer, units.size, units.stretches) == ("first", 16, ())
    looped = Net(lambda net, x: net.last(net.mid(net.mid(x))), mid=nn.Linear(8, 8), last=nn.Linear(8, 4))
    assert layers(looped) == []


def test_heads_that_are_shown_keep_their_order():
    def shown(net, x):
        x = net.embed(x.squeeze(1))
        return net.attend(x, x, x, average_attn_weights=False)

    net = attending(shown, attend=lambda: nn.MultiheadAttention(16, 4, batch_first=True))()
    assert layers(net) == ["embed"]


@pytest.mark.parametrize("options", [{"kdim": 16, "vdim": 8}, {"add_bias_kv": True}])
def test_unusual_attention_is_not_understood(options):
    def attend(net, x):
        x = net.embed(x.squeeze(1))
        return net.head(net.attend(x, x, net.slim(x) if "vdim" in options else x)[0])

    parts = {
        "attend": lambda: nn.MultiheadAttention(16, 4, batch_first=True, **options),
        "slim": lambda: nn.Linear(16, 8),
    }
    assert layers(attending(attend, **parts)()) == []


def test_an_embedding_with_a_bound_on_its_rows_has_an_order_and_no_scale():
    net = nn.Sequential(nn.Embedding(5, 8, max_norm=1.0), nn.Linear(8, 2))
    [units] = units_of(net)
    assert units.stretches == ()


def test_the_model_is_left_as_it_is(small):
    model = small.NETWORKS["digits"]().train()
    before = ModelWeights(model).digest()
    units_of(model)
    assert model.training
    assert ModelWeights(model).digest() == before


def test_a_model_that_decides_on_values_cannot_be_traced():
    net = Net(lambda net, x: net.last(x) if x.sum() > 0 else x, last=nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"cannot be traced.*Take decisions on values out"):
        units_of(net)


def test_normalized_layers_are_those_that_their_norm_reads_alone(small):
    assert normalized_layers(small.NETWORKS["digits"]()) == (
        ("conv1", "norm1"),
        ("conv2", "norm2"),
        ("conv3", "norm3"),
    )
    assert ("block2.short.0", "block2.short.1") in normalized_layers(small.NETWORKS["residual"]())
    assert normalized_layers(small.NETWORKS["transformer"]()) == ()


def test_a_norm_behind_an_activation_or_called_twice_is_not_of_a_layer():
    assert normalized_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))) == ()
    twice = Net(
        lambda net, x: net.norm(net.layer(net.norm(net.layer(x)))), layer=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)
    )
    assert normalized_layers(twice) == ()
    assert normalized_layers(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))) == ()
    added = Net(lambda net, x: net.norm(net.layer(x) + x), layer=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    assert normalized_layers(added) == ()
