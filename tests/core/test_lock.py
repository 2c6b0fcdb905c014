"""Locks on weights: useless without the key, the same bits with it, on models and on files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sealmark.core.errors import ForgedSecretError, ParameterError, WrongKeyError
from sealmark.core.lock import Lock, WeightLock
from sealmark.core.secret import Secret
from sealmark.core.task import Task
from sealmark.core.weights import TensorMap, Weights, weights_of


@dataclass(frozen=True)
class Signs(WeightLock):
    """Flips keyed signs; its own inverse."""

    label: str = "signs"

    def locker(self, key: Secret) -> TensorMap:
        def change(name: str, tensor: Tensor) -> Tensor:
            signs = key.stream(f"{self.label}/{name}").signs(tensor.numel())
            return tensor * torch.from_numpy(signs).to(tensor.dtype).reshape(tensor.shape)

        return change

    unlocker = locker


class Noting(Signs):
    def bind(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"names": list(weights)}, {"first": weights[next(iter(weights))]}


LOCK = Signs()


@pytest.fixture
def model(toy: Task) -> nn.Module:
    return toy.model(np.random.default_rng(0))


@pytest.fixture
def source(model: nn.Module, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def test_the_key_gives_the_model_back_bit_for_bit(model: nn.Module, rng: np.random.Generator) -> None:
    locked = LOCK.lock(model, owner="ab", rng=rng)
    assert weights_of(LOCK.unlock(locked.model, locked.key)).digest() == weights_of(model).digest()
    assert locked.key.facts["owner"] == "ab"


def test_the_shipped_model_is_another_one(model: nn.Module, rng: np.random.Generator) -> None:
    shipped = LOCK.lock(model, rng=rng).model.get_parameter("0.weight")
    flipped = (shipped == -model.get_parameter("0.weight")).double().mean()
    assert 0.2 < flipped < 0.8


def test_locking_leaves_the_given_model_as_it_was(model: nn.Module, rng: np.random.Generator) -> None:
    before = weights_of(model).digest()
    LOCK.lock(model, rng=rng)
    assert weights_of(model).digest() == before


def test_another_key_gives_a_model_that_is_none(model: nn.Module, rng: np.random.Generator) -> None:
    locked, other = LOCK.lock(model, rng=rng), LOCK.lock(model, rng=rng)
    assert weights_of(LOCK.unlock(locked.model, other.key)).digest() != weights_of(model).digest()


def test_keys_are_fresh_unless_a_test_gives_the_generator(model: nn.Module) -> None:
    assert LOCK.keygen(weights_of(model)) != LOCK.keygen(weights_of(model))
    seeded = [LOCK.keygen(weights_of(model), rng=np.random.default_rng(0)) for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_what_the_lock_notes_of_the_model_stands_in_the_key(model: nn.Module, rng: np.random.Generator) -> None:
    key = Noting().lock(model, rng=rng).key
    assert key.host == {"names": ["0.bias", "0.weight", "2.bias", "2.weight"]}
    assert torch.equal(key.tensors["first"], model.get_parameter("0.bias"))


def test_a_key_with_other_parameters_is_refused(model: nn.Module, rng: np.random.Generator) -> None:
    locked = LOCK.lock(model, rng=rng)
    with pytest.raises(ParameterError, match="other parameters"):
        Signs(label="others").unlock(locked.model, locked.key)


def test_a_forged_key_is_refused(model: nn.Module, rng: np.random.Generator) -> None:
    locked = Noting().lock(model, rng=rng)
    forged = Secret(locked.key.reveal_seed(), locked.key.facts, {"first": torch.zeros(1)})
    with pytest.raises(ForgedSecretError):
        Noting().unlock(locked.model, forged)


def test_a_locked_file_opens_with_its_key_to_the_very_same_bytes(
    source: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    names: list[str] = []
    locked, opened = tmp_path / "locked", tmp_path / "opened"
    key = LOCK.lock_file(source, locked, owner="ab", rng=rng, progress=lambda name, _: names.append(name))
    LOCK.unlock_file(locked, opened, key, progress=lambda name, _: names.append(name))
    assert opened.read_bytes() == source.read_bytes() != locked.read_bytes()
    assert sorted(names) == sorted(2 * list(load_file(source)))


def test_a_model_and_its_file_are_locked_alike(model: nn.Module, source: Path, tmp_path: Path) -> None:
    locked = LOCK.lock(model, rng=np.random.default_rng(0))
    key = LOCK.lock_file(source, tmp_path / "locked", rng=np.random.default_rng(0))
    assert key == locked.key
    assert weights_of(tmp_path / "locked").digest() == weights_of(locked.model).digest()


def test_a_wrong_key_writes_no_file(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    LOCK.lock_file(source, tmp_path / "locked", rng=rng)
    with pytest.raises(WrongKeyError, match="does not open this file"):
        LOCK.unlock_file(tmp_path / "locked", tmp_path / "opened", LOCK.keygen(weights_of(source), rng=rng))
    assert not (tmp_path / "opened").exists()


def test_a_changed_file_is_not_opened(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    key = LOCK.lock_file(source, tmp_path / "locked", rng=rng)
    raw = bytearray((tmp_path / "locked").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "locked").write_bytes(raw)
    with pytest.raises(WrongKeyError):
        LOCK.unlock_file(tmp_path / "locked", tmp_path / "opened", key)
    assert not (tmp_path / "opened").exists()


def test_a_key_with_other_parameters_opens_no_file(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    key = LOCK.lock_file(source, tmp_path / "locked", rng=rng)
    with pytest.raises(ParameterError, match="other parameters"):
        Signs(label="others").unlock_file(tmp_path / "locked", tmp_path / "opened", key)


def test_a_lock_must_say_how_to_lock() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Lock()  # type: ignore[abstract]
