"""Leaks in the form of their original; and leaks of unlocked copies, locked again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from sealmark.attacks.removal.dummy_neurons import DummyNeurons
from sealmark.attacks.removal.permute import Permute
from sealmark.authorization.chaotic_weights import ChaoticWeights
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.leak import Filled, Named, Recovered, recover, relocked
from sealmark.core.naming import Place
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import MemoryWeights, ModelWeights, weights_of

LOCK = ChaoticWeights()


def stored(tensors):
    return MemoryWeights(memoryview(bytearray(save({k: v.contiguous().clone() for k, v in tensors.items()}))))


def prefixed(model, drop=()):
    return Named(stored({f"module.{k}": v for k, v in ModelWeights(model).items() if not k.startswith(drop)}))


def distance(seen, original) -> float:
    """The largest change of a tensor, relative to its size, over the tensors that were found."""
    own = weights_of(original)
    return max(
        float((seen.weights[name].double() - own[name].double()).norm() / own[name].double().norm().clamp(min=1e-9))
        for name in seen.weights
        if own.info[name].is_float
    )


@pytest.fixture(scope="module")
def permuted(digits, plain) -> nn.Module:
    return Permute().run(plain, Resources.of(digits), rng=np.random.default_rng(0)).model


def test_a_suspect_of_the_same_form_comes_back_itself(plain):
    suspect = WhiteBox(plain)
    assert recover(suspect, weights_of(plain)) == ({}, suspect)


def test_a_renamed_one_is_read_by_the_originals_names_and_the_note_says_so(plain):
    note, seen = recover(prefixed(plain), weights_of(plain))
    floats = [name for name, info in weights_of(plain).info.items() if info.is_float]
    assert note == {"form": {"renamed": len(floats)}}
    assert sorted(seen.weights) == sorted(floats)
    assert distance(seen, plain) == 0


def test_what_is_missing_stands_in_the_note_and_is_not_read(plain):
    note, seen = recover(prefixed(plain, drop=("conv2", "norm2")), weights_of(plain))
    assert [name for name in note["form"]["missing"] if name.endswith("weight")] == ["conv2.weight", "norm2.weight"]
    with pytest.raises(UnknownNameError):
        seen.weights["conv2.weight"]


def test_renamed_and_reordered_neurons_need_a_live_original(plain, permuted):
    assert distance(recover(prefixed(permuted), weights_of(plain))[1], plain) > 1
    note, seen = recover(prefixed(permuted), plain)
    assert note["alignment"]["moved"] > 100
    assert distance(seen, plain) < 1e-5


@pytest.mark.parametrize("gone", ["fc2", "fc1", "conv2"])
def test_neurons_are_put_back_where_a_layer_is_missing(gone, plain, permuted):
    note, seen = recover(prefixed(permuted, drop=(gone,)), plain)
    assert f"{gone}.weight" in note["form"]["missing"]
    assert not any(name.startswith(gone) for name in seen.weights)
    assert distance(seen, plain) < 1e-5


def test_added_neurons_are_dropped_under_other_names_too(digits, plain):
    grown = DummyNeurons().run(plain, Resources.of(digits), rng=np.random.default_rng(0)).model
    note, seen = recover(prefixed(grown), plain)
    assert note["form"]["grown"] > 0
    assert note["alignment"]["dropped"] > 0
    assert distance(seen, plain) < 1e-3


def test_added_classes_are_no_neurons_and_are_cut_off(plain, permuted):
    tensors = dict(ModelWeights(permuted))
    tensors["fc2.weight"] = torch.cat([tensors["fc2.weight"], torch.ones(2, 128)])
    tensors["fc2.bias"] = torch.cat([tensors["fc2.bias"], torch.ones(2)])
    note, seen = recover(Named(stored(tensors)), plain)
    assert note["form"] == {"grown": 2}
    assert distance(seen, plain) < 1e-5


def test_a_stranger_stays_strange(digits, plain):
    stranger = digits.model(np.random.default_rng(5))
    assert distance(recover(prefixed(stranger), plain)[1], plain) > 0.9


def test_where_nothing_fits_nothing_is_left_to_read(plain):
    note, seen = recover(WhiteBox(nn.Linear(3, 5)), weights_of(plain))
    assert len(seen.weights) == 0
    assert len(note["form"]["missing"]) == len([info for info in weights_of(plain).info.values() if info.is_float])


def test_reshaped_and_transposed_tensors_are_counted(plain):
    tensors = dict(ModelWeights(plain))
    tensors["conv2.weight"] = tensors["conv2.weight"].flatten(1)
    tensors["fc1.weight"] = tensors["fc1.weight"].T
    note, seen = recover(Named(stored(tensors)), weights_of(plain))
    assert note == {"form": {"transposed": 1, "reshaped": 1}}
    assert distance(seen, plain) == 0


def test_weights_that_are_not_there_are_refused_by_name(plain):
    own = weights_of(plain)
    part = Recovered(own, {"fc1.weight": Place("fc1.weight")}, {"fc1.weight": (128, 1024)})
    with pytest.raises(UnknownNameError):
        part["fc2.weight"]
    assert torch.equal(Filled(part, own)["fc2.weight"], own["fc2.weight"])


@pytest.fixture(scope="module")
def locked(plain):
    return LOCK.lock(plain, rng=np.random.default_rng(3))


def test_an_unlocked_leak_is_locked_again(plain, locked):
    note, seen = relocked(prefixed(plain), weights_of(locked.model), LOCK, locked.key)
    assert "renamed" in note["form"]
    assert distance(seen, locked.model) == 0


def test_an_unlocked_leak_of_fewer_bits_is_locked_again(plain, locked):
    half = Named(
        stored({name: t.half() if t.is_floating_point() else t for name, t in ModelWeights(plain).items()})
    )
    seen = relocked(half, weights_of(locked.model), LOCK, locked.key)[1]
    assert seen.weights["fc1.weight"].dtype == torch.float16
    assert distance(seen, locked.model) < 1e-3


def test_neurons_of_an_unlocked_leak_are_put_back_before_it_is_locked_again(permuted, locked):
    note, seen = relocked(prefixed(permuted), locked.model, LOCK, locked.key)
    assert note["alignment"]["moved"] > 100
    assert distance(seen, locked.model) < 1e-5


def test_a_key_of_another_model_is_refused(plain, toy, rng, locked):
    other = LOCK.lock(toy.model(rng), rng=rng).key
    with pytest.raises(ModelMismatchError, match="does not open the original"):
        relocked(WhiteBox(plain), locked.model, LOCK, other)


def test_a_key_of_another_lock_is_refused(plain, locked):
    with pytest.raises(ParameterError):
        relocked(WhiteBox(plain), locked.model, ChaoticWeights(granularity="filters"), locked.key)
