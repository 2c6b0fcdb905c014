"""Spread-spectrum user marks on the digits: who leaked, after which attack, at what cost in accuracy."""

from __future__ import annotations

import copy
import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sealmark.attacks.collusion.average import Average
from sealmark.codes.chips import Chips, Reading
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, ParameterError, UnsupportedError
from sealmark.core.registry import attack
from sealmark.core.secret import Secret
from sealmark.core.suspect import WeightFile, WhiteBox
from sealmark.core.training import train_task
from sealmark.core.weights import INDEX, FileWeights, ModelWeights, rewrite_model, weights_of
from sealmark.identity.spread_spectrum import SpreadSpectrum

SCHEME = SpreadSpectrum()
USERS = [f"user{i}" for i in range(20)]


@pytest.fixture(scope="module")
def secret(plain) -> Secret:
    return SCHEME.enroll(plain, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def copies(plain, secret) -> list[nn.Module]:
    return [SCHEME.issue(plain, secret, user).model for user in USERS[:6]]


def accused(suspect, secret, plain, users=USERS):
    found = SCHEME.trace(WhiteBox(suspect), secret, users, original=plain)
    return {entry.user for entry in found.accused}


def changed(model, **tensors):
    """A copy with some tensors passed through a function."""
    return rewrite_model(model, lambda name, t: tensors.get(name.replace(".", "_"), lambda t: t)(t))


def test_a_copy_costs_less_than_a_point_of_accuracy(digits, plain, copies):
    drops = [digits.score(plain) - digits.score(model) for model in copies]
    assert max(drops) <= 0.01


def test_weights_move_by_the_strength_and_vectors_do_not(plain, copies):
    before, after = ModelWeights(plain), ModelWeights(copies[0])
    for name in before:
        change = (after[name] - before[name]).abs()
        if before[name].ndim >= 2:
            expected = SCHEME.strength * before[name].double().std(correction=0).item()
            torch.testing.assert_close(change, torch.full_like(change, expected), rtol=1e-3, atol=1e-7)
        else:
            assert not change.any()


def test_a_leak_is_traced(plain, secret, copies):
    assert accused(copies[3], secret, plain) == {"user3"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("prune", {"rate": 0.5}),
        ("prune", {"rate": 0.9}),
        ("fine_tune", {}),
        ("quantize", {"bits": 8}),
        ("quantize", {"bits": 4}),
    ],
)
def test_a_leak_is_traced_after_an_attack(name, parameters, digits, plain, secret, copies, rng):
    result = attack(name, **parameters).run(copies[3], Resources.of(digits), rng=rng)
    assert accused(result.model, secret, plain) == {"user3"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_leak_is_traced_in_another_precision(dtype, plain, secret, copies):
    assert accused(copy.deepcopy(copies[3]).to(dtype), secret, plain) == {"user3"}


@pytest.mark.parametrize("size", [2, 3])
def test_an_average_names_colluders_and_nobody_else(size, digits, plain, secret, copies, rng):
    result = Average().run(copies[:size], Resources.of(digits), rng=rng)
    found = accused(result.model, secret, plain, [f"user{i}" for i in range(500)])
    assert found
    assert found <= set(USERS[:size])


@pytest.mark.parametrize("choose", [torch.amin, torch.amax], ids=["min", "max"])
def test_the_extremes_of_three_copies_name_colluders_and_nobody_else(choose, plain, secret, copies):
    sources = [ModelWeights(model) for model in copies[:3]]
    pirate = rewrite_model(plain, lambda name, t: choose(torch.stack([s[name] for s in sources]), 0).to(t.dtype))
    found = accused(pirate, secret, plain)
    assert found
    assert found <= set(USERS[:3])


def test_the_original_and_a_model_trained_apart_accuse_nobody(digits, plain, secret):
    stranger = train_task(digits, rng=np.random.default_rng(9))
    assert accused(stranger, secret, plain) == set()
    assert accused(plain, secret, plain) == set()


def test_another_owners_secret_accuses_nobody(plain, copies):
    other = SCHEME.enroll(plain, rng=np.random.default_rng(1))
    assert accused(copies[3], other, plain) == set()


def reorder(model, orders):
    """The same function with the channels of the four hidden layers in another order."""
    channels = {
        layer: orders[number]
        for number, layers in enumerate((("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3"), ("fc1",)))
        for layer in layers
    }
    inputs = {"conv2": orders[0], "conv3": orders[1], "fc2": orders[3]}
    inputs["fc1"] = (16 * orders[2][:, None] + torch.arange(16)).reshape(-1)

    def change(name, tensor):
        layer = name.split(".")[0]
        if tensor.ndim and layer in channels:
            tensor = tensor[channels[layer]]
        return tensor[:, inputs[layer]] if tensor.ndim >= 2 and layer in inputs else tensor

    return rewrite_model(model, change)


def test_reordered_neurons_hide_the_mark_until_they_are_put_back(digits, plain, secret, copies):
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(size, generator=generator) for size in (16, 32, 64, 128)]
    hidden = reorder(copies[3], orders)
    assert digits.score(hidden) == digits.score(copies[3])
    assert accused(hidden, secret, weights_of(plain)) == set()
    assert accused(hidden, secret, plain) == {"user3"}  # a live original is aligned to
    aligned = reorder(hidden, [order.argsort() for order in orders])
    assert accused(aligned, secret, plain) == {"user3"}


def test_one_ruined_tensor_does_not_drown_the_others(plain, secret, copies):
    noise = torch.Generator().manual_seed(0)
    ruined = changed(copies[3], fc1_weight=lambda t: 100 * torch.randn(t.shape, generator=noise))
    assert accused(ruined, secret, plain) == {"user3"}


def test_infinite_weights_say_nothing(plain, secret, copies):
    broken = changed(
        copies[3], conv2_weight=lambda t: t.fill_(torch.inf), conv3_weight=lambda t: t.fill_(torch.nan)
    )
    assert accused(broken, secret, plain) == {"user3"}


def test_missing_and_reshaped_tensors_are_skipped_and_named(tmp_path, plain, secret, copies):
    tensors = dict(ModelWeights(copies[3]))
    del tensors["conv3.weight"]
    tensors["fc2.weight"] = torch.zeros(7, 128)
    save_file(tensors, tmp_path / "partial.safetensors")
    found = SCHEME.trace(WeightFile(tmp_path / "partial.safetensors"), secret, USERS, original=plain)
    assert [entry.user for entry in found.accused] == ["user3"]
    assert found.details["tensors_skipped"] == ["conv3.weight", "fc2.weight"]
    assert found.details["tensors_read"] == 3


def test_a_suspect_of_another_form_is_refused(secret, plain, toy, rng):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.trace(WhiteBox(toy.model(rng)), secret, USERS, original=plain)


def test_tracing_without_the_original_is_refused(secret, copies):
    with pytest.raises(ParameterError, match="original"):
        SCHEME.trace(WhiteBox(copies[0]), secret, USERS)


def test_a_model_with_too_few_weights_is_refused_with_advice(toy, rng):
    with pytest.raises(UnsupportedError, match="bits="):
        SCHEME.enroll(toy.model(rng))


def test_fewer_bits_fit_a_smaller_model_and_still_trace(rng):
    scheme, model = SpreadSpectrum(bits=128, colluders=1), nn.Linear(32, 64)
    secret = scheme.enroll(model, rng=rng)
    leaked = scheme.issue(model, secret, "alice").model
    found = scheme.trace(WhiteBox(leaked), secret, ["alice", "bob"], original=model)
    assert [entry.user for entry in found.accused] == ["alice"]


@pytest.mark.parametrize("bad", [{"strength": 0.0}, {"bits": 1000}, {"bits": 0}, {"colluders": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError):
        SpreadSpectrum(**bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_form_is_kept_and_a_leak_is_traced_in_every_float_type(dtype, rng):
    model = nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 128)).to(dtype)
    model.register_buffer("table", torch.arange(600).reshape(20, 30))
    scheme = SpreadSpectrum(bits=256, colluders=2)
    secret = scheme.enroll(model, rng=rng)
    leaked = scheme.issue(model, secret, "alice").model
    assert {k: (v.dtype, v.shape) for k, v in leaked.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    assert torch.equal(leaked.table, model.table)
    found = scheme.trace(WhiteBox(leaked), secret, ["alice", "bob"], original=model)
    assert [entry.user for entry in found.accused] == ["alice"]


def test_tensors_without_spread_and_empty_ones_carry_nothing(rng):
    model = nn.Linear(64, 64)
    model.register_buffer("mask", torch.ones(64, 64))
    model.register_buffer("empty", torch.zeros(0, 64))
    scheme = SpreadSpectrum(bits=128)
    secret = scheme.enroll(model, rng=rng)
    assert list(secret.host["carriers"]) == ["weight"]


def test_channels_last_weights_get_the_same_mark(rng):
    model = nn.Conv2d(32, 64, 3)
    scheme = SpreadSpectrum(bits=128)
    secret = scheme.enroll(model, rng=rng)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.equal(scheme.issue(other, secret, "a").model.weight, scheme.issue(model, secret, "a").model.weight)


def test_a_file_gets_the_same_bits_as_the_live_model(tmp_path, plain, secret, copies):
    save_file(dict(ModelWeights(plain)), tmp_path / "plain.safetensors", metadata={"kept": "yes"})
    SCHEME.issue_file(tmp_path / "plain.safetensors", tmp_path / "copy.safetensors", secret, "user3")
    assert FileWeights(tmp_path / "copy.safetensors").digest() == weights_of(copies[3]).digest()
    found = SCHEME.trace(
        WeightFile(tmp_path / "copy.safetensors"), secret, USERS, original=tmp_path / "plain.safetensors"
    )
    assert [entry.user for entry in found.accused] == ["user3"]


def test_a_sharded_folder_gets_the_same_bits_as_the_live_model(tmp_path, plain, secret, copies):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tensors, home = dict(ModelWeights(plain)), {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, source / shard)
        home |= dict.fromkeys(names, shard)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
    SCHEME.issue_file(source, target, secret, "user3")
    assert FileWeights(target).digest() == weights_of(copies[3]).digest()


def test_issuing_a_file_needs_memory_for_two_tensors_and_no_more(tmp_path, rng):
    size = 2**20
    save_file({f"layer{i}": torch.randn(1024, size // 1024) for i in range(12)}, tmp_path / "plain")
    secret = SCHEME.enroll(tmp_path / "plain", rng=rng)
    tracemalloc.start()
    SCHEME.issue_file(tmp_path / "plain", tmp_path / "copy", secret, "alice")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(load_file(tmp_path / "copy")) == 12
    assert peak < 3 * 4 * size


def test_many_users_are_told_apart_in_one_pass(plain, secret, copies):
    users = [f"user{i}" for i in range(20_000)]
    assert accused(copies[3], secret, plain, users) == {"user3"}


def test_chips_agree_with_the_layout_written_out():
    secret, counts = Secret(bytes(32), {}), {"a": 700, "b": 300_000}
    chips, amplitude = Chips(secret, 64, counts), 0.5
    word = np.random.default_rng(0).integers(0, 2, 64).astype(np.uint8)
    weights = {name: torch.zeros(count) for name, count in counts.items()}
    for name, flat in weights.items():
        chips.add(name, flat, amplitude, chips.mask(word))
    place, slots = 0, []
    for name, count in counts.items():
        stream, expected, offset = secret.stream(f"chips/{name}"), np.empty(count), 0
        for start in range(0, count, 32 * 8192):
            size = min(32 * 8192, count - start)
            words = -(-size // 32)
            keyed = stream.bits(32 * words, offset=32 * offset).reshape(words, 4, 8)[:, :, ::-1].reshape(words, 32)
            for i in range(0, size, 97):  # a sample: Python is slow
                k, j = divmod(i, words)
                slots.append(32 * chips.order[(place + j) % len(chips.order)] + k)
                sign = (1 - 2 * int(keyed[j, k])) * (2 * int(word[slots[-1]]) - 1)
                expected[start + i] = amplitude * sign
                assert weights[name][start + i] == expected[start + i]
            offset, place = offset + words, place + words
    assert len(set(slots)) == 64


def test_every_position_gets_the_same_number_of_weights():
    chips = Chips(Secret(bytes(32), {}), 1024, {"a": 32 * 50, "b": 32 * 974})
    reading = Reading(chips)
    for name, count in chips.counts.items():
        marked = torch.zeros(count)
        chips.add(name, marked, 1.0, chips.mask(np.ones(1024, np.uint8)))
        assert reading.take(name, torch.zeros(count), marked, 1.0) == count
    np.testing.assert_array_equal(reading.symbols(), np.ones(1024))


def test_a_tensor_that_is_no_multiple_of_a_word_is_read_to_its_last_weight():
    chips = Chips(Secret(bytes(32), {}), 32, {"a": 65})
    marked = torch.full((65,), 3.0)
    chips.add("a", marked, 1.0, chips.mask(np.ones(32, np.uint8)))
    assert set(marked.tolist()) == {2.0, 4.0}
    assert Reading(chips).take("a", torch.full((65,), 3.0), marked, 1.0) == 65


def test_a_bad_number_of_bits_is_refused():
    with pytest.raises(ParameterError, match="multiple of 32"):
        Chips(Secret(bytes(32), {}), 100, {})
