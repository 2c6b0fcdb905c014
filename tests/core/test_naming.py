"""Which tensor of a leak is which of the original, whatever its names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from sealmark.core import naming
from sealmark.core.naming import Place, places
from sealmark.core.weights import MemoryWeights


def stored(tensors: dict[str, Tensor]) -> MemoryWeights:
    return MemoryWeights(memoryview(bytearray(save({k: v.contiguous().clone() for k, v in tensors.items()}))))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Three layers of one shape, one of another, vectors, and what no thief would bother to rename."""
    generator = torch.Generator().manual_seed(0)
    made = {f"layers.{i}.weight": torch.randn(32, 32, generator=generator) for i in range(3)}
    made |= {f"layers.{i}.bias": torch.randn(32, generator=generator) for i in range(3)}
    made |= {"head.weight": torch.randn(10, 32, generator=generator), "scale": torch.tensor(2.0)}
    return made | {"steps": torch.tensor(3), "empty": torch.zeros(0, 4)}


def sources(leak: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: place.source for name, place in places(stored(leak), stored(tensors)).items()}


def floats(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]


def noisy(tensors: dict[str, Tensor], amount: float, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + amount * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def test_a_file_as_it_was_is_found_under_its_own_names(tensors):
    assert sources(tensors, tensors) == {name: name for name in floats(tensors)}


@pytest.mark.parametrize("prefix", ["module.", "model.", "encoder.deep."])
def test_prefixes_come_off(tensors, prefix):
    leak = {prefix + name: tensor for name, tensor in noisy(tensors, 0.1).items()}
    assert sources(leak, tensors) == {name: prefix + name for name in floats(tensors)}


def test_names_that_say_nothing_are_told_by_content(tensors):
    names = {name: f"blob.{7 * i % 10}" for i, name in enumerate(tensors)}
    leak = {names[name]: tensor for name, tensor in noisy(tensors, 0.3).items()}
    assert sources(leak, tensors) == {name: names[name] for name in floats(tensors)}


def test_swapped_names_are_swapped_back(tensors):
    leak = noisy(tensors, 0.3)
    leak["layers.0.weight"], leak["layers.2.weight"] = leak["layers.2.weight"], leak["layers.0.weight"]
    found = sources(leak, tensors)
    assert found["layers.0.weight"] == "layers.2.weight"
    assert found["layers.2.weight"] == "layers.0.weight"


def test_names_decide_where_contents_are_anybodys(tensors):
    leak = noisy({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, 1.0)
    assert sources(leak, tensors) == {name: name for name in floats(tensors)}


def test_moved_neurons_are_told_by_the_lengths_of_rows_and_columns(tensors):
    generator = torch.Generator().manual_seed(2)
    leak = {f"t{i}": tensors[f"layers.{i}.weight"] for i in (2, 0, 1)}
    for name, tensor in leak.items():
        rows, columns = (torch.randperm(32, generator=generator) for _ in range(2))
        leak[name] = tensor[rows][:, columns]
    found = sources(leak, {name: tensors[name] for name in tensors if name.startswith("layers")})
    assert {name: found[name] for name in sorted(found)} == {f"layers.{i}.weight": f"t{i}" for i in range(3)}


def test_a_transposed_matrix_is_turned_even_where_it_is_square(tensors):
    leak = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    found = places(stored(leak), stored(tensors))
    assert found["layers.1.weight"] == Place("layers.1.weight", turned=True)
    assert found["head.weight"] == Place("head.weight", turned=True)
    assert torch.equal(found["head.weight"].read(leak["head.weight"], (10, 32)), tensors["head.weight"])


def test_a_flattened_tensor_gets_its_shape_back(tensors):
    leak = {"all": tensors["head.weight"].reshape(-1)}
    found = places(stored(leak), stored(tensors))
    assert found == {"head.weight": Place("all")}
    assert torch.equal(found["head.weight"].read(leak["all"], (10, 32)), tensors["head.weight"])


def test_of_a_larger_vocabulary_the_first_rows_are_meant(tensors):
    leak = {"module.head.weight": torch.cat([tensors["head.weight"], torch.randn(5, 32)])}
    found = places(stored(leak), stored(tensors))
    assert found == {"head.weight": Place("module.head.weight", grown=True)}
    assert torch.equal(found["head.weight"].read(leak["module.head.weight"], (10, 32)), tensors["head.weight"])


def test_a_larger_tensor_of_another_name_and_content_is_not_taken(tensors):
    leak = {"other": torch.randn(15, 32, generator=torch.Generator().manual_seed(3))}
    assert sources(leak, tensors) == {}


def test_a_flat_tensor_of_other_content_is_not_taken(tensors):
    leak = {"head.weight": torch.randn(320, generator=torch.Generator().manual_seed(3))}
    assert sources(leak, tensors) == {}


def test_missing_tensors_are_left_out_and_do_not_draw_others(tensors):
    leak = {f"x.{i}": tensor for i, tensor in enumerate(noisy(tensors, 0.1).values()) if i in (1, 4)}
    assert sources(leak, tensors) == {"layers.1.weight": "x.1", "layers.1.bias": "x.4"}


def test_infinite_entries_say_nothing(tensors):
    leak = {f"n{i}": tensor.clone() for i, tensor in enumerate(tensors.values())}
    leak["n0"][0, 0], leak["n1"][0, 0] = torch.inf, torch.nan
    assert sources(leak, tensors)["layers.0.weight"] == "n0"


def test_large_models_are_told_apart_by_fewer_entries_each(tensors, monkeypatch):
    monkeypatch.setattr(naming, "_BUDGET", 1)
    leak = {f"n{i}": tensor for i, tensor in enumerate(tensors.values())}
    assert sources(leak, tensors)["layers.2.weight"] == "n2"
