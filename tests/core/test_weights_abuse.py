"""Hostile safetensors files and indexes: each is refused for one reason, with a typed error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.weights import INDEX, FileWeights, rewrite_file

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _file(folder: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


def test_the_good_file_of_these_tests_is_accepted(tmp_path: Path) -> None:
    assert FileWeights(_file(tmp_path, GOOD))["a"].tolist() == [0, 0]
    assert FileWeights(_file(tmp_path, GOOD | {"__metadata__": {"format": "pt"}})).info.keys() == {"a"}


BAD_HEADERS = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "a list": b"[]",
    "nested too deep": b"[" * 100_000,
    "a name twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a field twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": _entry(dtype="F31"),
    "dtype of another type": _entry(dtype=["F32"]),
    "an entry that is text": {"a": "F32"},
    "three offsets": _entry(data_offsets=[0, 4, 8]),
    "offsets backwards": _entry(data_offsets=[8, 0]),
    "negative offset": _entry(data_offsets=[-8, 0]),
    "fractional offset": _entry(data_offsets=[0, 8.0]),
    "negative sizes": _entry(shape=[-1, -2]),
    "fractional size": _entry(shape=[2.0]),
    "a size that is true": _entry(shape=[True, 2]),
    "a size beyond 64 bits": {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
    "shape larger than its bytes": _entry(shape=[3]),
    "shape smaller than its bytes": _entry(shape=[1]),
    "a hole in front": _entry(data_offsets=[4, 8], shape=[1]),
    "a hole between": GOOD | {"b": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}},
    "an overlap": GOOD | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    "the same bytes twice": GOOD | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "bytes behind the last tensor": _entry(data_offsets=[0, 4], shape=[1]),
    "more tensor than file": _entry(data_offsets=[0, 12], shape=[3]),
    "metadata that is no object": GOOD | {"__metadata__": [1]},
    "metadata that is no text": GOOD | {"__metadata__": {"a": 1}},
}


# so that nothing but the header is wrong
DATA = {"a hole between": 10, "an overlap": 12, "a size beyond 64 bits": 0}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, fault: str) -> None:
    path = _file(tmp_path, BAD_HEADERS[fault], bytes(DATA.get(fault, 8)))
    with pytest.raises(FormatError):
        FileWeights(path)


def test_a_bad_file_is_not_rewritten(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        rewrite_file(_file(tmp_path, b"{"), tmp_path / "out", lambda name, tensor: tensor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 200, 91])
def test_a_header_that_claims_to_be_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = _file(tmp_path, GOOD)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(FormatError, match="header length"):
        FileWeights(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, keep: int) -> None:
    path = _file(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError):
        FileWeights(path)


def test_a_file_with_a_tail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="truncated or oversized"):
        FileWeights(_file(tmp_path, GOOD, bytes(9)))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD)
    weights = FileWeights(path)
    path.write_bytes(path.read_bytes()[:-1])
    for read in (lambda: weights["a"], weights.digest):
        with pytest.raises(FormatError, match="truncated while it was read"):
            read()


def test_a_file_that_shrinks_while_it_is_rewritten_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    large = {"dtype": "U8", "shape": [10**6], "data_offsets": [8, 8 + 10**6]}  # more than is read ahead
    path = _file(tmp_path, GOOD | {"large": large}, bytes(8 + 10**6))

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        path.write_bytes(path.read_bytes()[:-1])
        return tensor

    with pytest.raises(FormatError, match="truncated while it was read"):
        rewrite_file(path, tmp_path / "out", cut)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@given(st.integers(0, 200), st.binary(max_size=3), st.integers(0, 3))
@example(0, b"\xff", 1)
def test_a_damaged_file_reads_or_is_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: int, patch: bytes, cut: int
) -> None:
    good = save({"w": torch.arange(4.0), "v": torch.zeros(2, 2, dtype=torch.int8)}, {"format": "pt"})
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(good[:place] + patch + good[place + cut :])
    try:
        weights = FileWeights(path)
    except FormatError:
        return
    assert all(weights[name].shape == weights.info[name].shape for name in weights)


@pytest.mark.parametrize("name", ["no.safetensors", "", "no.json", "no"])
def test_where_there_is_no_model_the_caller_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ParameterError, match="expected a safetensors file"):
        FileWeights(tmp_path / name)


def test_a_folder_with_several_files_and_no_index_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ParameterError, match=INDEX.replace(".", r"\.")):
        FileWeights(tmp_path)


BAD_INDEXES = {
    "no JSON": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "a map that is a list": b'{"weight_map":["a"]}',
    "a shard that is a number": b'{"weight_map":{"a":5}}',
    "a shard that is a list": b'{"weight_map":{"a":["x"]}}',
    "numbers and names": b'{"weight_map":{"a":5,"b":"x"}}',
    "nested too deep": b'{"weight_map":' + b"[" * 100_000,
    "a shard that is missing": b'{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}',
    "an empty name": b'{"weight_map":{"a":""}}',
    "the folder above": b'{"weight_map":{"a":".."}}',
    "a file above": b'{"weight_map":{"a":"../one.safetensors"}}',
    "a file far away": b'{"weight_map":{"a":"/one.safetensors"}}',
    "a file below": b'{"weight_map":{"a":"below/one.safetensors"}}',
    "a name with a zero byte": b'{"weight_map":{"a":"one\\u0000.safetensors"}}',
}


@pytest.mark.parametrize("fault", BAD_INDEXES)
def test_a_bad_index_is_refused(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "m"
    for place in (tmp_path, folder, folder / "below"):
        place.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(1)}, place / "one.safetensors")
    (folder / INDEX).write_bytes(BAD_INDEXES[fault])
    with pytest.raises(FormatError):
        FileWeights(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{shard}.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}')
    with pytest.raises(FormatError, match="in two shards"):
        FileWeights(tmp_path)


@pytest.mark.parametrize("listed", [{"a": "one", "b": "one"}, {"b": "one", "a": "two"}])
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, listed: dict[str, str]) -> None:
    for name, shard in (("a", "one"), ("b", "two")):
        save_file({name: torch.zeros(1)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {name: f"{shard}.safetensors" for name, shard in listed.items()}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match="does not list"):
        FileWeights(tmp_path)
