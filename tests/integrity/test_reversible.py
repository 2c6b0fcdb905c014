import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, TamperedError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.training import train, train_task
from sealmark.core.weights import weights_of
from sealmark.integrity._carrier import Carrier, find_peak, leading_parts
from sealmark.integrity.reversible import Reversible

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def model(digits):
    return train_task(digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def sealed(model, digits):
    return Reversible().seal(model, digits, rng=np.random.default_rng(2))


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(as_bytes(a[n]).equal(as_bytes(b[n])) for n in a)


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def found(model, secret):
    evidence = Reversible().check(model, secret)
    return evidence.verdict, evidence.details["changed"]


def test_a_sealed_model_matches_its_record(sealed):
    evidence = Reversible().check(sealed.model, sealed.secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.p_value == pytest.approx(2.0**-256)


def test_sealing_changes_the_host_alone_and_by_an_eighth_at_most(model, sealed):
    (carrier,) = sealed.secret.host["carriers"]
    for name, tensor in sealed.model.state_dict().items():
        plain = model.state_dict()[name]
        assert torch.equal(tensor, plain) is (name != carrier["tensor"])
        assert ((tensor - plain).abs() <= plain.abs() / 8).all()


def test_sealing_costs_at_most_half_a_point(digits, model, sealed):
    assert abs(digits.score(sealed.model) - digits.score(model)) <= 0.005


def test_sealing_leaves_the_original_as_it_was(model):
    before = copy.deepcopy(model)
    Reversible().seal(model)
    assert same_bits(before, model)


def test_restoring_gives_back_every_bit_of_every_parameter_and_buffer(model, sealed):
    assert not same_bits(sealed.model, model)
    assert same_bits(Reversible().restore(sealed.model, sealed.secret), model)


def test_without_a_task_the_smallest_channels_are_the_host(model):
    made = Reversible().seal(model)
    (carrier,) = made.secret.host["carriers"]
    by_size = model.get_parameter(carrier["tensor"]).detach().double().abs().sum(1).argsort()
    assert carrier["channels"] == by_size[: len(carrier["channels"])].tolist()
    assert same_bits(Reversible().restore(made.model, made.secret), model)


def test_with_a_task_the_channels_of_least_entropy_are_the_host(digits, model, sealed):
    (carrier,) = sealed.secret.host["carriers"]
    answers = []
    hook = model.fc1.register_forward_hook(lambda module, inputs, outputs: answers.append(outputs))
    digits.score(model, digits.owner.take(slice(0, 256)))
    hook.remove()
    entropies = []
    for channel in answers[0].double().T.numpy():
        shares = np.histogram(channel, 32)[0] / 256
        entropies.append(-sum(p * np.log2(p) for p in shares if p))
    chosen = np.sort(np.array(entropies)[carrier["channels"]])
    np.testing.assert_allclose(chosen, np.sort(entropies)[: len(chosen)])


def test_the_mean_over_an_image_is_what_a_convolutional_channel_is_judged_by(digits):
    net = nn.Sequential(nn.Conv2d(1, 800, 5, padding=2), nn.Flatten())
    net[0].weight.data[:400] = 0.01  # the same answer at all places of all channels
    net[0].bias.data.zero_()
    quiet = dataclasses.replace(digits, owner=digits.owner.take(slice(0, 1)))
    (carrier,) = Reversible().seal(net, quiet).secret.host["carriers"]
    assert carrier["channels"][:3] == [0, 1, 2]  # one row: all entropies are 0, and the order stays


def test_a_host_that_does_not_run_or_is_no_layer_is_judged_by_size(digits):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(200, 200)
            self.free = nn.Parameter(torch.randn(150, 200))

        def forward(self, images):
            return images.flatten(1)

    made = Reversible().seal(Idle(), digits)
    assert Reversible().check(made.model, made.secret).verdict is Verdict.MATCH
    del (alone := Idle()).idle
    made = Reversible().seal(alone, digits)
    assert made.secret.host["carriers"][0]["tensor"] == "free"


def test_each_of_100_flipped_bits_is_found_in_its_tensor_and_channel(sealed):
    rng = np.random.default_rng(3)
    names = [n for n, tensor in sealed.model.state_dict().items() if tensor.is_floating_point()]
    for _ in range(100):
        suspect = copy.deepcopy(sealed.model)
        name = names[rng.integers(len(names))]
        raw = suspect.state_dict()[name].reshape(-1).view(torch.uint8)
        place = int(rng.integers(len(raw)))
        raw[place] ^= 1 << int(rng.integers(8))
        evidence = Reversible().check(suspect, sealed.secret)
        tensor = suspect.state_dict()[name]
        channels = {name: [place * len(tensor) // len(raw)]} if tensor.dim() >= 2 else {}
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details == {"changed": [name], "channels": channels}


def test_one_step_of_training_at_1e_4_is_found(digits, sealed):
    suspect = copy.deepcopy(sealed.model)
    recipe = dataclasses.replace(digits.recipe, epochs=1, rate=1e-4)
    rows = Resources.of(digits, 64 / 400).rows
    train(suspect, rows, loss=digits.loss, recipe=recipe, rng=np.random.default_rng(0))
    verdict, changed = found(suspect, sealed.secret)
    assert verdict is Verdict.NO_MATCH
    assert set(changed) == set(sealed.model.state_dict())


def test_a_round_trip_through_half_precision_is_found(sealed):
    suspect = copy.deepcopy(sealed.model).half().float()
    assert found(suspect, sealed.secret)[0] is Verdict.NO_MATCH


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.half(),
        lambda net: net.register_buffer("extra", torch.zeros(1)),
        lambda net: setattr(net, "fc1", nn.Linear(4, 4)),
        lambda net: delattr(net, "fc1"),
    ],
    ids=["another type", "a tensor more", "another shape", "a tensor less"],
)
def test_a_change_of_form_is_found(sealed, change):
    suspect = copy.deepcopy(sealed.model)
    change(suspect)
    assert found(suspect, sealed.secret)[0] is Verdict.NO_MATCH


@pytest.mark.parametrize("change", [lambda net: net.half(), lambda net: delattr(net, "fc1")])
def test_a_model_without_the_host_holds_no_code(sealed, change):
    suspect = copy.deepcopy(sealed.model)
    change(suspect)
    assert Reversible().read_code(weights_of(suspect), sealed.secret) == b""


def test_the_unmarked_model_does_not_match(model, sealed):
    assert found(model, sealed.secret)[0] is Verdict.NO_MATCH


def test_a_model_sealed_under_another_record_does_not_match(model, digits, sealed):
    other = Reversible().seal(model, digits, rng=np.random.default_rng(3))
    assert found(other.model, other.secret)[0] is Verdict.MATCH
    assert found(other.model, sealed.secret) == (Verdict.NO_MATCH, ["the code"])


def test_reading_at_the_wrong_channels_gives_another_code(sealed):
    def code(secret):
        return np.unpackbits(np.frombuffer(Reversible().read_code(weights_of(sealed.model), secret), np.uint8))

    facts = sealed.secret.facts
    carrier = facts["host"]["carriers"][0]
    carrier["channels"] = [channel + 1 for channel in carrier["channels"]]
    wrong, right = code(Secret(bytes(32), facts)), code(sealed.secret)
    assert len(right) == 256
    count = min(map(len, (wrong, right)))
    assert 0.3 < np.mean(wrong[:count] == right[:count]) < 0.7


def test_a_changed_model_is_not_restored_and_no_file_is_left(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "plain")
    secret = Reversible().seal_file(tmp_path / "plain", tmp_path / "sealed")
    raw = bytearray((tmp_path / "sealed").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "sealed").write_bytes(raw)
    with pytest.raises(TamperedError, match="changed since it was sealed"):
        Reversible().restore_file(tmp_path / "sealed", tmp_path / "restored", secret)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "sealed"]


def test_a_file_is_sealed_as_the_live_model_is(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "plain")
    live = Reversible().seal(model, rng=np.random.default_rng(4))
    secret = Reversible().seal_file(tmp_path / "plain", tmp_path / "sealed", rng=np.random.default_rng(4))
    assert secret == live.secret
    assert all(
        torch.equal(live.model.state_dict()[name], tensor)
        for name, tensor in load_file(tmp_path / "sealed").items()
    )
    assert Reversible().check(tmp_path / "sealed", secret).verdict is Verdict.MATCH
    Reversible().restore_file(tmp_path / "sealed", tmp_path / "restored", secret)
    assert (tmp_path / "restored").read_bytes() == (tmp_path / "plain").read_bytes()


def test_several_small_tensors_share_the_code():
    small = nn.Sequential(*(nn.Linear(40, 40) for _ in range(10)))
    made = Reversible().seal(small)
    carriers = made.secret.host["carriers"]
    assert len(carriers) > 1
    assert sum(carrier["bits"] for carrier in carriers) == 256
    assert Reversible().check(made.model, made.secret).verdict is Verdict.MATCH
    assert same_bits(Reversible().restore(made.model, made.secret), small)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_type_comes_back(dtype):
    plain = nn.Linear(200, 200).to(dtype)
    made = Reversible().seal(plain)
    assert not same_bits(made.model, plain)
    assert same_bits(Reversible().restore(made.model, made.secret), plain)


def test_a_pruned_model_with_zeros_of_both_signs_comes_back():
    plain = nn.Linear(100, 100)
    plain.weight.data[torch.rand(100, 100) < 0.5] *= 0  # gives 0 and -0
    made = Reversible().seal(plain)
    assert made.secret.host["carriers"][0]["peak"] in (0, -1)
    assert same_bits(Reversible().restore(made.model, made.secret), plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(model, value):
    broken = copy.deepcopy(model)
    broken.conv2.weight.data[0, 0, 0, 0] = value
    with pytest.raises(UnsupportedError, match=r"conv2\.weight holds NaN or an infinity"):
        Reversible().seal(broken)


@pytest.mark.parametrize(
    ("small", "room"), [(nn.Linear(20, 20), r"\d+"), (nn.BatchNorm2d(500), "0")], ids=["small", "none"]
)
def test_a_model_without_room_is_refused_with_the_room_it_has(small, room):
    with pytest.raises(UnsupportedError, match=f"expected 256 bits, found {room} bits.*smaller mantissa"):
        Reversible().seal(small)


def test_capacity_is_the_sum_of_the_peaks_and_that_much_can_be_hidden():
    plain = nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 30))
    peaks = {name: find_peak(plain.get_parameter(name).detach(), 3) for name in ("0.weight", "2.weight")}
    assert Reversible().capacity(plain) == sum(peak.height for peak in peaks.values())
    for name, peak in peaks.items():
        tensor = plain.get_parameter(name).detach()
        carrier = Carrier(name, list(tensor.shape), "float32", 3, list(range(len(tensor))), *peak)
        bits = torch.ones(peak.height, dtype=torch.bool)
        assert carrier.read(carrier.embed(tensor, bits)).sum() == peak.height


def test_capacity_decides_whether_a_model_can_be_sealed(tmp_path):
    small, large = nn.Linear(20, 20), nn.Linear(100, 100)
    assert Reversible().capacity(small) < 256 <= Reversible().capacity(large)
    with pytest.raises(UnsupportedError, match=f"found {Reversible().capacity(small)} bits"):
        Reversible().seal(small)
    Reversible().seal(large)
    save_file(large.state_dict(), tmp_path / "large")
    assert Reversible().capacity(tmp_path / "large") == Reversible().capacity(large)


def test_a_smaller_mantissa_gives_more_room():
    plain = nn.Linear(50, 50)
    heights = [find_peak(plain.weight.detach(), mantissa).height for mantissa in (1, 3, 5)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > 2 * heights[2]


def test_a_peak_under_nothing_but_full_bins_up_to_infinity_has_no_room():
    steps = torch.arange(100)
    top = (torch.full((100,), 0x7F7FFFFF, dtype=torch.int32) - (steps << 20)).int().view(torch.float32)
    assert find_peak(top, 3).height == 0
    assert find_peak(top / 4, 3).height == 1


@pytest.mark.parametrize("parameters", [{"mantissa": 0}, {"mantissa": 8}, {"bins": 1}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of reversible"):
        Reversible(**parameters)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    mantissa=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 0.1, 100.0]),
)
def test_bits_go_into_any_tensor_and_come_out_again(dtype, mantissa, seed, scale):
    rng = torch.Generator().manual_seed(seed)
    plain = (scale * torch.randn(8, 20, generator=rng)).to(dtype)
    channels = torch.randperm(8, generator=rng)[:5].tolist()
    peak = find_peak(plain[channels], mantissa)
    form = [8, 20], str(dtype).removeprefix("torch.")
    carrier = Carrier("w", *form, mantissa, channels, peak.value, peak.zero, peak.height)
    bits = torch.rand(peak.height, generator=rng) < 0.5
    marked = carrier.embed(plain, bits)
    assert torch.equal(carrier.read(marked), bits)
    assert as_bytes(carrier.restore(marked)).equal(as_bytes(plain))


@pytest.mark.parametrize("dtype", FLOATS)
def test_leading_parts_grow_with_the_weight_and_drop_the_rest(dtype):
    weights = torch.tensor([-2.0, -1.125, -1.0, -0.0, 0.0, 1.0, 1.0625, 1.125, 2.0], dtype=dtype)
    values = leading_parts(weights, 3)
    assert (values.diff() >= 0).all()
    steps = (values - values[5]).tolist()
    assert steps[5:] == [0, 0, 1, 8]


@pytest.mark.parametrize("step", [1e-3, 1e-4, 1e-6])
def test_decimal_steps_in_float32_do_not_come_off_again(model, step):
    """Why the scheme works on integers: the paper's decimal shifts, added and subtracted."""
    plain = model.conv3.weight.detach()
    back = (plain + step) - step
    assert (back - plain).abs().max() < 1e-7
    assert 0 < (back != plain).double().mean() < 0.1
