import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.quantize import Quantize
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.training import train_task


@pytest.fixture(scope="module")
def model(digits):
    return train_task(digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def rows(digits):
    return Resources.of(digits, 0.0)


def quantized(model, rows, **parameters):
    return Quantize(**parameters).run(model, rows, rng=np.random.default_rng(0)).model


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tensor_holds_no_more_levels_than_its_bits_allow(model, rows, bits):
    weight = quantized(model, rows, bits=bits).fc1.weight
    assert len(weight.unique()) <= 2**bits - 1
    assert weight.abs().max() == model.fc1.weight.abs().max()


def test_no_weight_moves_by_more_than_half_a_step(model, rows):
    plain, after = model.fc1.weight, quantized(model, rows, bits=8).fc1.weight
    step = plain.abs().max() / 127
    assert 0.4 * step < (after - plain).abs().max() <= 0.5001 * step


def test_each_channel_has_a_step_of_its_own(rows):
    plain = nn.Linear(64, 2)
    plain.weight.data[1].mul_(1e-3)
    coarse = (quantized(plain, rows, bits=4).weight - plain.weight)[1].abs().max()
    fine = (quantized(plain, rows, bits=4, scheme="channel").weight - plain.weight)[1].abs().max()
    assert fine < coarse / 2


def test_the_integers_agree_with_those_of_torch(model, rows):
    plain = model.fc1.weight.detach()
    step = float(plain.abs().max()) / 127
    theirs = torch.fake_quantize_per_tensor_affine(plain, step, 0, -127, 127)
    apart = (quantized(model, rows).fc1.weight - theirs).abs() > step / 100
    assert apart.sum() <= 3  # halves of a step, which float32 and float64 round apart


def test_biases_norms_and_running_statistics_stay(model, rows):
    after = quantized(model, rows, bits=4).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor) is (tensor.dim() < 2)


def test_a_tensor_of_zeros_stays_zero(rows):
    plain = nn.Linear(4, 4)
    plain.weight.data.zero_()
    assert not quantized(plain, rows, scheme="channel").weight.any()


@pytest.mark.parametrize(("scheme", "cast"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_rounds_every_float_and_keeps_the_type(model, rows, scheme, cast):
    after = quantized(model, rows, scheme=scheme).state_dict()
    for name, tensor in model.state_dict().items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor.to(cast).to(tensor.dtype) if tensor.is_floating_point() else tensor)
    assert not torch.equal(after["fc1.weight"], model.fc1.weight)


def test_eight_bits_cost_no_accuracy_and_two_cost_much(digits, model, rows):
    assert digits.score(quantized(model, rows, bits=8)) >= digits.score(model) - 0.01
    assert digits.score(quantized(model, rows, bits=2)) < 0.7


@pytest.mark.parametrize("parameters", [{"bits": 1}, {"bits": 17}, {"scheme": "nf4"}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of quantize"):
        Quantize(**parameters)
