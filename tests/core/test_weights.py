"""Named tensors of live models and safetensors files, and rewriting them; safetensors is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.weights import (
    DTYPES,
    INDEX,
    FileWeights,
    MappedWeights,
    ModelWeights,
    TensorInfo,
    rewrite_file,
    rewrite_model,
    weights_of,
)

TENSORS = {
    "b.weight": torch.arange(12.0).reshape(3, 4),
    "a": torch.tensor([1, 2, 3]),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


def _negate(name: str, tensor: Tensor) -> Tensor:
    return -tensor


def _keep(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _sharded(folder: Path) -> Path:
    """TENSORS as a sharded folder."""
    folder.mkdir()
    homes = {name: f"model-{1 + index % 2}-of-2.safetensors" for index, name in enumerate(TENSORS)}
    for shard in set(homes.values()):
        save_file({n: TENSORS[n] for n in TENSORS if homes[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": homes}))
    return folder


def _single(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors", {"format": "pt", "note": "ü"})
    return folder / "model.safetensors"


def _same(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return (one.dtype, one.shape, raw(one)) == (other.dtype, other.shape, raw(other))


class Tied(nn.Module):
    """A language model's shape: the head is the embedding; a second matrix has the same values only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.twin = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight
        self.twin.weight.data.copy_(self.embed.weight.data)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def get_extra_state(self) -> str:
        return "not a tensor"

    def set_extra_state(self, state: str) -> None:
        return None


def test_a_models_weights_are_its_parameters_and_buffers_in_sorted_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = ModelWeights(model)
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert list(weights) == sorted(tensors)
    assert len(weights) == len(tensors)
    assert all(_same(weights[name], tensors[name]) for name in tensors)
    assert weights.info["0.weight"] == TensorInfo((3, 2), torch.float32)
    assert not weights["0.weight"].requires_grad


def test_tied_tensors_stand_once_under_their_first_name() -> None:
    assert list(ModelWeights(Tied())) == ["embed.weight", "steps", "twin.weight"]


def test_an_empty_tensor_is_never_taken_for_a_tied_one() -> None:
    model = nn.Module()
    model.register_buffer("one", torch.empty(0))
    model.register_buffer("two", torch.empty(0))
    assert list(ModelWeights(model)) == ["one", "two"]


def test_info_tells_the_number_of_entries_and_whether_they_are_floating() -> None:
    assert TensorInfo((2, 3, 4), torch.bfloat16).count == 24
    assert TensorInfo((), torch.int8).count == 1
    assert TensorInfo((0, 5), torch.int8).count == 0
    assert TensorInfo((), torch.bfloat16).is_float
    assert not TensorInfo((), torch.int8).is_float


def test_an_unknown_tensor_is_refused_with_the_known_names(tmp_path: Path) -> None:
    for weights in (ModelWeights(nn.Linear(1, 1)), FileWeights(_single(tmp_path))):
        with pytest.raises(UnknownNameError, match=r"weight.*found nothing"):
            weights["nothing"]


@pytest.mark.parametrize("make", [_single, lambda folder: folder, lambda f: f / "model.safetensors"])
def test_a_single_file_reads_as_safetensors_reads_it(tmp_path: Path, make: object) -> None:
    _single(tmp_path)
    weights = FileWeights(make(tmp_path))  # type: ignore[operator]
    expected = load_file(tmp_path / "model.safetensors")
    assert list(weights) == sorted(expected)
    assert all(_same(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("index", [False, True])
def test_a_sharded_folder_reads_as_one_model(tmp_path: Path, index: bool) -> None:
    folder = _sharded(tmp_path / "m")
    weights = FileWeights(folder / INDEX if index else folder)
    assert list(weights) == sorted(TENSORS)
    assert all(_same(weights[name], TENSORS[name]) for name in TENSORS)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(sorted(DTYPES)), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
        ),
        max_size=4,
    ),
    st.integers(0, 2**32),
)
def test_any_file_that_safetensors_writes_is_read_and_copied_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, forms: dict[str, tuple[str, tuple[int, ...]]], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("any")
    tensors = {}
    for name, (dtype, shape) in forms.items():
        size = int(np.prod(shape)) * DTYPES[dtype].itemsize
        raw = draw.integers(0, 2 if dtype == "BOOL" else 256, max(size, 1)).astype(np.uint8)
        tensors[name] = torch.from_numpy(raw)[:size].view(DTYPES[dtype]).reshape(shape)
    save_file(tensors, folder / "a.safetensors")
    weights = FileWeights(folder / "a.safetensors")
    assert weights.keys() == tensors.keys()
    assert all(_same(weights[name], tensors[name]) for name in tensors)
    rewrite_file(folder / "a.safetensors", folder / "b.safetensors", _keep)
    assert (folder / "b.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()


def test_a_model_and_its_file_have_the_same_digest(tmp_path: Path) -> None:
    model = Tied()
    tensors = {name: tensor.clone() for name, tensor in ModelWeights(model).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    assert FileWeights(tmp_path / "m.safetensors").digest() == ModelWeights(model).digest()


def test_one_changed_bit_or_name_gives_another_digest(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    other.load_state_dict(model.state_dict())
    assert ModelWeights(other).digest() == ModelWeights(model).digest()
    with torch.no_grad():
        other.steps += 1
    assert ModelWeights(other).digest() != ModelWeights(model).digest()
    renamed = nn.Sequential(nn.Linear(1, 1, bias=False))
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = renamed[0].weight
    assert ModelWeights(renamed).digest() != ModelWeights(plain).digest()


def test_weights_of_takes_models_files_folders_and_weights(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    weights = weights_of(model)
    assert isinstance(weights, ModelWeights)
    assert weights_of(weights) is weights
    assert isinstance(weights_of(str(_single(tmp_path))), FileWeights)


def test_asking_whether_a_tensor_is_there_does_not_load_it(tmp_path: Path) -> None:
    weights = FileWeights(_single(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert "scalar" in weights
    assert "nothing" not in weights


def test_mapped_weights_are_the_weights_after_the_change() -> None:
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    mapped = MappedWeights(weights_of(model), lambda name, tensor: tensor.mul_(2))
    assert torch.equal(mapped["weight"], 2 * before["weight"])
    assert torch.equal(model.weight, before["weight"])


def test_mapped_weights_refuse_a_change_of_form() -> None:
    mapped = MappedWeights(weights_of(nn.Linear(2, 2)), lambda name, tensor: tensor.double())
    with pytest.raises(ModelMismatchError, match="changed its form"):
        mapped["weight"]


def test_rewriting_a_model_gives_a_changed_copy_and_leaves_the_original() -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    negated = rewrite_model(model, lambda name, tensor: tensor.neg_())
    assert torch.equal(negated.embed.weight, -model.embed.weight)  # once, though it is tied
    assert negated.head.weight is negated.embed.weight
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items() if isinstance(t, Tensor))


@pytest.mark.parametrize("change", [lambda n, t: t[:1], lambda n, t: t.half()], ids=["shape", "dtype"])
def test_a_change_of_form_is_refused_and_no_file_is_left(tmp_path: Path, change: object) -> None:
    with pytest.raises(ModelMismatchError):
        rewrite_model(nn.Linear(2, 2), change)  # type: ignore[arg-type]
    with pytest.raises(ModelMismatchError):
        rewrite_file(_single(tmp_path), tmp_path / "new.safetensors", change)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_rewritten_file_is_what_safetensors_would_have_written(tmp_path: Path) -> None:
    source, seen = _single(tmp_path), []
    rewrite_file(source, tmp_path / "b", _negate, progress=lambda name, size: seen.append((name, size)))
    for name, tensor in load_file(tmp_path / "b").items():
        assert _same(tensor, -TENSORS[name])
    assert sorted(seen) == sorted((name, t.numel() * t.element_size()) for name, t in TENSORS.items())
    header = source.read_bytes()[: FileWeights(source).shards[source].data_start]
    assert (tmp_path / "b").read_bytes().startswith(header)  # metadata and order are kept


def test_a_change_may_give_strided_tensors(tmp_path: Path) -> None:
    rewrite_file(
        _single(tmp_path), tmp_path / "b", lambda n, t: t.flip(0).t().contiguous().t() if t.ndim == 2 else t
    )
    assert torch.equal(load_file(tmp_path / "b")["b.weight"], TENSORS["b.weight"].flip(0))


def test_a_rewritten_folder_has_the_same_shards_and_index(tmp_path: Path) -> None:
    source = _sharded(tmp_path / "m")
    rewrite_file(source, tmp_path / "new", _negate)
    assert {p.name for p in source.iterdir()} == {p.name for p in (tmp_path / "new").iterdir()}
    assert (tmp_path / "new" / INDEX).read_bytes() == (source / INDEX).read_bytes()
    changed = FileWeights(tmp_path / "new")
    assert all(_same(changed[name], -TENSORS[name]) for name in TENSORS)


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    _single(tmp_path / "m")
    rewrite_file(tmp_path / "m", tmp_path / "new", _negate)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_rewrite_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    calls: list[str] = []

    def fail_late(name: str, tensor: Tensor) -> Tensor:
        calls.append(name)
        if len(calls) == len(TENSORS):
            raise error
        return tensor

    for source, target in ((_single(tmp_path), tmp_path / "b"), (_sharded(tmp_path / "m"), tmp_path / "new")):
        calls.clear()
        with pytest.raises(error):
            rewrite_file(source, target, fail_late)
        assert not target.is_file()
        assert not target.is_dir() or not list(target.iterdir())


def test_a_failed_rewrite_leaves_the_old_target(tmp_path: Path) -> None:
    def fail(name: str, tensor: Tensor) -> NoReturn:
        raise RuntimeError

    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        rewrite_file(_single(tmp_path), tmp_path / "b", fail)
    assert (tmp_path / "b").read_bytes() == b"old"


def test_source_and_target_must_differ_however_they_are_spelled(tmp_path: Path) -> None:
    source = _single(tmp_path)
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "." / "x" / ".." / source.name, tmp_path / "link"):
        with pytest.raises(ParameterError, match="same file"):
            rewrite_file(source, target, _negate)
    assert source.read_bytes() == before


def test_an_index_is_not_rewritten_as_if_it_were_one_file(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "m")
    with pytest.raises(ParameterError, match="expected the folder"):
        rewrite_file(folder / INDEX, tmp_path / "out", _negate)
    assert not (tmp_path / "out").exists()
