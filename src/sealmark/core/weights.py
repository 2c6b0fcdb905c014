"""Weights as named tensors, from a live model or from safetensors files of any size.

A weight-only scheme is one function, name and tensor in, tensor out. `rewrite_model` runs it over a
live model, `rewrite_file` over a file or a sharded folder with two tensors in memory at a time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.errors import FormatError, ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.files import atomic_write
from sealmark.core.secret import tensor_digest

TensorMap = Callable[[str, Tensor], Tensor]
Progress = Callable[[str, int], None]  # (name of the tensor, its bytes), after each one

_T = TypeVar("_T")
_PIECE = 4 << 20

MAX_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.is_floating_point


class Weights(Mapping[str, Tensor], ABC):
    """Named tensors that are loaded when asked for; ``info`` tells their shapes at no cost.

    Names are in sorted order, so that a pass over them is the same everywhere.
    """

    info: Mapping[str, TensorInfo]

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            UnknownNameError: there is none.
        """

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.info))

    def __len__(self) -> int:
        return len(self.info)

    def digest(self) -> str:
        """SHA-256 over the sorted names and each tensor's dtype, shape and little-endian bytes."""
        lines = zip(self, self._digests(), strict=True)
        return sha256_hex(*(f"{name}\0{digest}\n".encode() for name, digest in lines))

    def _digests(self) -> Iterator[str]:
        return map(tensor_digest, self.values())

    def _missing(self, name: str) -> UnknownNameError:
        near = sorted(self.info)[:8]
        return UnknownNameError("no such tensor", found=name, expected=f"one of {near} ...")


class ModelWeights(Weights):
    """The parameters and buffers of a live model. Tied tensors appear once, under their first name."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = _untied(model)
        self.info = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise self._missing(name)
        return self._tensors[name].detach()


def _untied(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], torch.dtype]] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        storage = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and storage in seen:
            continue
        seen.add(storage)
        tensors[name] = tensor
    return tensors


class FileWeights(Weights):
    """A safetensors file, or a folder of shards with an index, read lazily.

    Args:
        path: a ``.safetensors`` file, an index ``.json``, or a folder that holds either.

    Raises:
        ParameterError: nothing is there.
        FormatError: not safetensors, truncated, with holes, or an index that does not fit its shards.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.shards = {shard: read_header(shard) for shard in _shards(self.path)}
        self._home: dict[str, Path] = {}
        self.info = {}
        for shard, header in self.shards.items():
            for name, entry in header.entries.items():
                if name in self._home:
                    raise FormatError(f"{path}: tensor {name!r} is in two shards")
                self._home[name] = shard
                self.info[name] = entry.info

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._home:
            raise self._missing(name)
        shard = self._home[name]
        entry = self.shards[shard].entries[name]
        raw = bytearray(entry.end - entry.start)
        with shard.open("rb") as file:
            file.seek(self.shards[shard].data_start + entry.start)
            if file.readinto(raw) != len(raw):
                raise FormatError(f"{shard}: truncated while it was read")
        return _as_tensor(raw, entry.info)

    def _digests(self) -> Iterator[str]:
        with ThreadPoolExecutor(2) as pool:  # SHA-256 is slower than the disk
            yield from pool.map(self._digest_of, self)

    def _digest_of(self, name: str) -> str:
        """`tensor_digest` of a tensor that never is in memory as a whole."""
        shard, entry = self._home[name], self.shards[self._home[name]].entries[name]
        form = [str(entry.info.dtype).removeprefix("torch."), list(entry.info.shape)]
        digest, left = hashlib.sha256(canonical_json(form) + b"\0"), entry.end - entry.start
        piece = memoryview(bytearray(min(left, _PIECE)))
        with shard.open("rb", buffering=0) as file:
            file.seek(self.shards[shard].data_start + entry.start)
            while left:
                count = file.readinto(piece[:left])
                if not count:
                    raise FormatError(f"{shard}: truncated while it was read")
                digest.update(piece[:count])
                left -= count
        return digest.hexdigest()


class MappedWeights(Weights):
    """Weights as a change would leave them, computed when asked for; the change must keep their form."""

    def __init__(self, weights: Weights, change: TensorMap) -> None:
        self._weights, self._change = weights, change
        self.info = weights.info

    def __getitem__(self, name: str) -> Tensor:
        changed = self._change(name, self._weights[name].clone())
        _check_kept(name, self.info[name], changed)
        return changed


def weights_of(source: nn.Module | Weights | Path | str) -> Weights:
    """The named tensors of a model, a safetensors file or a folder of shards."""
    if isinstance(source, Weights):
        return source
    return ModelWeights(source) if isinstance(source, nn.Module) else FileWeights(source)


def rewrite_model(model: nn.Module, change: TensorMap) -> nn.Module:
    """A copy of ``model`` whose every tensor went through ``change``; tied tensors once."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in _untied(result).items():
            changed = change(name, tensor.detach().clone())
            _check_kept(name, TensorInfo(tuple(tensor.shape), tensor.dtype), changed)
            tensor.copy_(changed)
    return result


def rewrite_file(
    source: Path | str, target: Path | str, change: TensorMap, *, progress: Progress | None = None
) -> None:
    """Write ``source`` to ``target`` with every tensor passed through ``change``.

    Memory is bounded by twice the largest tensor of a shard, plus what ``change`` makes of one. Headers,
    metadata and the index are kept as they are. A single file is replaced at once; of a sharded folder
    the index, which makes it a model, comes last.

    Args:
        source: a safetensors file or a sharded folder.
        target: a file for a file, a folder (made if missing) for a folder.
        change: must keep shape and dtype; may change the tensor in place; must not hold on to it, for its
            memory is used again. It runs in a second thread, one tensor at a time, in the file's order.
        progress: called after each tensor.

    Raises:
        ParameterError: the source is missing or an index, or source and target are the same.
        FormatError: the source is not sound safetensors.
        ModelMismatchError: ``change`` changed a shape or a dtype.
        ServiceError: the disk is full; nothing is left behind.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ParameterError("source and target are the same file", found=str(target))
    if source.suffix == ".json":
        raise ParameterError("cannot rewrite an index", expected="the folder that it is in", found=str(source))
    if not source.is_dir():
        _rewrite_shard(source, read_header(source), target, change, progress)
        return
    shards = {shard: read_header(shard) for shard in _shards(source)}
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        for shard, header in shards.items():
            _rewrite_shard(shard, header, target / shard.name, change, progress)
            undo.callback((target / shard.name).unlink)
        index = source / INDEX
        if index.exists():
            with atomic_write(target / INDEX) as file:
                file.write(index.read_bytes())
        undo.pop_all()  # all went well: keep them


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file's data area: bytes ``start`` to ``end``."""

    info: TensorInfo
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A safetensors header, and the offset at which the data starts."""

    raw: bytes
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ParameterError: no such file.
        FormatError: anything but a well-formed header that covers the whole file with no holes.
    """
    if not path.is_file():
        raise ParameterError("no such file", found=str(path), expected="a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, size - 8):
            raise FormatError(f"{path}: not a safetensors file", found="no sound header length")
        raw = prefix + file.read(length)
    try:
        parsed = json.loads(raw[8:], object_pairs_hook=_no_duplicates)
        metadata = parsed.pop("__metadata__", {})
        entries = {str(name): _entry(fields) for name, fields in parsed.items()}
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError("metadata must be text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not a safetensors file", found=f"a bad header ({error})") from None
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end - entry.start != entry.info.count * entry.info.dtype.itemsize:
            raise FormatError(f"{path}: tensor {name!r} overlaps, leaves a hole or has a wrong size")
        position = entry.end
    if position != size - len(raw):
        raise FormatError(f"{path}: truncated or oversized", expected=len(raw) + position, found=size)
    return Header(raw, entries, metadata, len(raw))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _entry(fields: Mapping[str, Any]) -> Entry:
    start, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError("sizes must be whole and not negative")
    return Entry(TensorInfo(shape, DTYPES[fields["dtype"]]), start, end)


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        index = path / INDEX
        found = sorted(path.glob("*.safetensors"))
        if not index.exists() and len(found) == 1:
            return found
        path = index
    if path.suffix != ".json":
        return [path]
    if not path.is_file():
        raise ParameterError("no model there", expected=f"a safetensors file or {INDEX}", found=str(path.parent))
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not an index of shards", found=error) from None
    if outside:
        raise FormatError(f"{path}: a shard lies outside the folder", found=outside)
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise FormatError(f"{path}: shards are missing", found=missing)
    return [path.parent / name for name in names]


def _as_tensor(raw: Any, info: TensorInfo) -> Tensor:
    if info.count == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(info.dtype).reshape(info.shape)


def _check_kept(name: str, info: TensorInfo, changed: Tensor) -> None:
    if tuple(changed.shape) != info.shape or changed.dtype != info.dtype:
        raise ModelMismatchError(
            f"tensor {name!r} changed its form", expected=info, found=(tuple(changed.shape), changed.dtype)
        )


def _rewrite_shard(
    source: Path, header: Header, target: Path, change: TensorMap, progress: Progress | None
) -> None:
    """Change one tensor while the one before is written, in two buffers: fresh memory is slow memory."""
    order = sorted(header.entries.items(), key=lambda item: item[1].start)
    room = max((entry.end - entry.start for _, entry in order), default=0)
    buffers = [bytearray(room) for _ in order[:2]]

    def changed(turn: int) -> Tensor:
        name, entry = order[turn]
        raw = memoryview(buffers[turn % 2])[: entry.end - entry.start]
        reader.seek(header.data_start + entry.start)
        if reader.readinto(raw) != len(raw):
            raise FormatError(f"{source}: truncated while it was read")
        result = change(name, _as_tensor(raw, entry.info)).contiguous()
        _check_kept(name, entry.info, result)
        return result

    with source.open("rb") as reader, atomic_write(target) as writer:
        writer.write(header.raw)
        for (name, entry), result in zip(order, _one_ahead(changed, len(order)), strict=True):
            flat = result.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), _PIECE):  # ext4 takes small pieces much faster than large ones
                writer.write(flat[start : start + _PIECE])
            if progress:
                progress(name, entry.end - entry.start)


def _one_ahead(function: Callable[[int], _T], count: int) -> Iterator[_T]:
    """``function(0) ... function(count - 1)``, each computed while the one before is being used."""
    if not count:
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(function, 0)
        for turn in range(1, count):
            result, coming = coming.result(), pool.submit(function, turn)
            yield result
        yield coming.result()
