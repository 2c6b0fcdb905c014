"""Who leaked, from a file that was altered; and nobody, where the same was done to a model without a mark."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sealmark.core.attack import Resources
from sealmark.core.evidence import Verdict
from sealmark.core.registry import attack
from sealmark.core.secret import Secret
from sealmark.core.suspect import WeightFile
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights, weights_of
from sealmark.identity import spread_spectrum
from sealmark.identity.deepmarks import Deepmarks
from sealmark.identity.spread_spectrum import SpreadSpectrum

SCHEME = SpreadSpectrum()
USERS = [f"user{i}" for i in range(20)]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def secret(plain) -> Secret:
    return SCHEME.enroll(plain, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def leaked(plain, secret) -> nn.Module:
    return SCHEME.issue(plain, secret, "user3").model


@pytest.fixture(scope="module")
def stranger(digits) -> nn.Module:
    return train_task(digits, rng=np.random.default_rng(90))


@pytest.fixture(scope="module")
def others(digits, plain, stranger) -> dict[str, Tensors]:
    """What a thief merges with: an independent model, and one that was fine-tuned from the unmarked original."""
    sibling = attack("fine_tune").run(plain, Resources.of(digits), rng=np.random.default_rng(50)).model
    return {"stranger": dict(ModelWeights(stranger)), "sibling": dict(ModelWeights(sibling))}


@pytest.fixture
def change(digits, others) -> Callable[[nn.Module, str], Tensors]:
    """``change(model, "prune 0.9, rename")``: what is left after one alteration and then the next."""

    def attacked(tensors: Tensors, name: str, **parameters) -> Tensors:
        model = digits.make()
        model.load_state_dict(tensors)
        made = attack(name, **parameters).run(model, Resources.of(digits), rng=np.random.default_rng(7)).model
        return dict(ModelWeights(made))

    def merged(tensors: Tensors, other: str, share: str) -> Tensors:
        mixed = {
            name: torch.lerp(t.float(), others[other][name].float(), float(share)) for name, t in tensors.items()
        }
        return {name: mixed[name].to(tensors[name].dtype) for name in tensors}

    steps: dict[str, Callable[..., Tensors]] = {
        "prefix": lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
        "rename": lambda t: {f"{7 * i % len(t)}": tensor for i, tensor in enumerate(t.values())},
        "prune": lambda t, rate: attacked(t, "prune", rate=float(rate)),
        "tune": lambda t: attacked(t, "fine_tune"),
        "bits": lambda t, scheme, bits: attacked(t, "quantize", scheme=scheme, bits=int(bits)),
        "cast": lambda t, dtype: {
            k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in t.items()
        },
        "merge": merged,
        "drop": lambda t, *layers: {name: tensor for name, tensor in t.items() if not name.startswith(layers)},
        "permute": lambda t: attacked(t, "permute"),
        "rescale": lambda t: attacked(t, "rescale"),
        "flip": lambda t: attacked(t, "sign_flip"),
        "dummies": lambda t: attacked(t, "dummy_neurons"),
        "turn": lambda t: {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in t.items()},
        "flatten": lambda t: {name: tensor.flatten() for name, tensor in t.items()},
        "extend": lambda t: (
            t | {name: torch.cat([t[name], 0 * t[name][:3]]) for name in ("fc2.weight", "fc2.bias")}
        ),
    }

    def run(model: nn.Module, recipe: str) -> Tensors:
        tensors = dict(ModelWeights(model))
        for step in recipe.split(", "):
            name, *arguments = step.split()
            tensors = steps[name](tensors, *arguments)
        return tensors

    return run


NAMES_ALONE = [
    "prefix",
    "rename",
    "tune",
    "prune 0.5",
    "prune 0.9",
    "bits channel 8",
    "bits tensor 4",
    "bits channel 4",
    "cast bfloat16",
    "cast float16",
    "merge sibling 0.7",
    "merge stranger 0.1",
    "merge stranger 0.3",
    "merge stranger 0.5",
    "drop conv3 fc1",
    "turn",
    "flatten",
    "extend",
    "merge stranger 0.3, rename",
    "tune, prune 0.5, bits tensor 4, rename",
    "turn, drop conv2, cast bfloat16, rename",
]
WITH_THE_NETWORK = [
    "permute",
    "permute, rename",
    "permute, drop fc2, prefix",
    "permute, tune, bits tensor 4, prefix",
    "permute, extend, cast bfloat16",
    "rescale, dummies",
    "permute, rescale, flip, dummies",
    "permute, rescale, flip, dummies, prefix",
]


def found(tensors, secret, original, folder):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "leak.safetensors")
    return SCHEME.trace(WeightFile(folder / "leak.safetensors"), secret, USERS, original=original)


def accused(*arguments) -> list[str]:
    return [entry.user for entry in found(*arguments).accused]


@pytest.mark.parametrize("recipe", NAMES_ALONE)
def test_the_leaker_is_named_from_the_file_and_nobody_without_a_mark(
    recipe, change, plain, leaked, secret, tmp_path
):
    original = weights_of(plain)
    assert accused(change(leaked, recipe), secret, original, tmp_path) == ["user3"]
    assert accused(change(plain, recipe), secret, original, tmp_path) == []


@pytest.mark.parametrize("recipe", WITH_THE_NETWORK)
def test_the_leaker_is_named_with_the_network_and_nobody_without_a_mark(
    recipe, change, plain, leaked, secret, tmp_path
):
    assert accused(change(leaked, recipe), secret, weights_of(plain), tmp_path) == [], (
        "the file alone does not tell"
    )
    assert accused(change(leaked, recipe), secret, plain, tmp_path) == ["user3"]
    assert accused(change(plain, recipe), secret, plain, tmp_path) == []


@pytest.mark.parametrize("recipe", ["rename", "turn, prefix", "permute, rename", "merge stranger 0.3, drop fc1"])
def test_an_independent_model_accuses_nobody(recipe, change, plain, stranger, secret, tmp_path):
    assert accused(change(stranger, recipe), secret, plain, tmp_path) == []


@pytest.mark.parametrize("recipe", ["merge stranger 0.3, rename", "permute, tune, prefix"])
def test_p_values_of_innocents_are_no_smaller_than_they_say(recipe, change, plain, leaked, secret, tmp_path):
    save_file({k: t.contiguous() for k, t in change(leaked, recipe).items()}, tmp_path / "leak.safetensors")
    innocent = [f"other{i}" for i in range(4000)]
    result = SCHEME.trace(WeightFile(tmp_path / "leak.safetensors"), secret, innocent, original=plain)
    levels = np.array([result.suspicion.null.log_p(score) for score in np.sort(result.suspicion.statistics)[-200:]])
    for alpha in (0.05, 0.01, 0.001):
        count = int((levels <= np.log(alpha)).sum())
        assert count <= 4000 * alpha + 4 * (4000 * alpha) ** 0.5


def test_what_was_undone_stands_in_the_accusation(change, plain, leaked, secret, tmp_path):
    told = found(change(leaked, "permute, drop fc2, rename"), secret, plain, tmp_path).details
    assert told["original"] == weights_of(plain).digest()
    assert told["form"]["missing"] == ["fc2.bias", "fc2.weight"]
    assert told["form"]["renamed"] > 10
    assert told["alignment"]["moved"] > 100
    assert told["tensors_skipped"] == ["fc2.weight"]
    json.dumps(told)


def test_a_leak_that_is_mostly_another_model_is_no_ground_for_an_accusation(
    change, plain, leaked, secret, tmp_path
):
    result = found(change(leaked, "merge stranger 0.9"), secret, weights_of(plain), tmp_path)
    assert (result.verdict, result.accused) == (Verdict.NO_MATCH, ())


def test_what_is_left_of_the_original_is_subtracted_and_not_the_original(
    change, plain, leaked, secret, tmp_path, monkeypatch
):
    tensors = change(leaked, "merge stranger 0.5")
    ours = found(tensors, secret, weights_of(plain), tmp_path).ranking[0]
    monkeypatch.setattr(spread_spectrum, "_explained", lambda before, after: before)
    plainly = found(tensors, secret, weights_of(plain), tmp_path).ranking[0]
    assert ours.log10_p < 1.5 * plainly.log10_p < 0, "the noise has half the power"


def test_a_rescaled_leak_is_read_at_its_own_scale(plain, leaked, secret, tmp_path):
    tensors = {name: 2 * t if t.is_floating_point() else t for name, t in ModelWeights(leaked).items()}
    assert accused(tensors, secret, weights_of(plain), tmp_path) == ["user3"]


@pytest.mark.slow
def test_a_blind_mark_is_found_under_other_names_where_there_is_an_original(digits, plain, change, tmp_path):
    scheme = Deepmarks()
    secret = scheme.enroll(plain, users=["ada", "bob"], rng=np.random.default_rng(0))
    copy = scheme.issue(plain, secret, "bob", task=digits).model
    save_file(change(copy, "rename"), tmp_path / "leak.safetensors")
    seen = WeightFile(tmp_path / "leak.safetensors")
    result = scheme.trace(seen, secret, ["ada", "bob"], original=weights_of(plain))
    assert [entry.user for entry in result.accused] == ["bob"]
