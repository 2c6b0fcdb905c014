"""REEF: representations of the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, ModelMismatchError, ParameterError
from sealmark.core.suspect import WeightFile, WhiteBox
from sealmark.core.task import Recipe
from sealmark.core.training import train_task
from sealmark.core.weights import save_model
from sealmark.ownership.reef import Reef

SCHEME = Reef()


@pytest.fixture(scope="module")
def others(digits):
    recipe = Recipe(epochs=3, batch_size=64, rate=0.05)
    return [train_task(digits, rng=np.random.default_rng(400 + i), recipe=recipe).eval() for i in range(4)]


@pytest.fixture(scope="module")
def secret(plain, digits, others):
    return SCHEME.enroll(plain, digits, references=others[:3], rng=np.random.default_rng(0))


def _similarity(model, secret):
    return SCHEME.score(WhiteBox(model), secret).statistic


def test_a_copy_represents_noise_alike_and_a_stranger_does_not(plain, digits, others, secret):
    resources = Resources.of(digits)
    tuned, permuted = (
        registry.modification(name, **parameters).run(plain, resources, rng=np.random.default_rng(1)).model
        for name, parameters in (("fine_tune", {"epochs": 5, "rate": 0.01}), ("permute", {}))
    )
    assert secret.host["layer"] == "fc1"
    assert _similarity(plain, secret) > 0.999
    assert _similarity(permuted, secret) > 0.999
    assert _similarity(tuned, secret) > 0.8
    assert _similarity(others[3], secret) < 0.75
    assert max(secret.host["null"]) < 0.75  # independent nets of one task are alike: hence the population


def test_it_works_on_sentences_too(tokens, reader, unrelated):
    kept = SCHEME.enroll(reader, tokens, references=unrelated[:2], rng=np.random.default_rng(0))
    assert kept.tensors["noise"].dtype == torch.int64
    assert _similarity(reader, kept) > 0.999
    assert max(kept.host["null"]) < 0.3


def test_convolutions_are_averaged_over_space(plain, digits, others):
    scheme = Reef(layer="conv2")
    kept = scheme.enroll(plain, digits, references=others[:1], rng=np.random.default_rng(0))
    assert kept.tensors["features"].shape == (200, 32)


def test_a_weight_file_cannot_be_listened_to(plain, secret, tmp_path):
    save_model(plain, tmp_path / "a.safetensors")
    with pytest.raises(AccessError):
        SCHEME.verify(WeightFile(tmp_path / "a.safetensors"), secret)


def test_another_network_is_a_mismatch(secret):
    with pytest.raises(ModelMismatchError):
        SCHEME.verify(WhiteBox(nn.Linear(3, 2)), secret)


@pytest.mark.parametrize("model", [nn.Linear(4, 2), "weights.safetensors"])
def test_what_cannot_be_enrolled_is_refused(model, digits, others):
    with pytest.raises(ParameterError):
        SCHEME.enroll(model, digits, references=others)


def test_few_inputs_are_refused():
    with pytest.raises(ParameterError):
        Reef(inputs=4)
