"""The layout of safetensors data: which tensor lies where. Headers come from anywhere and are not trusted."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sealmark.core.errors import FormatError, ParameterError

MAX_HEADER = 100_000_000
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
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return parse_header(lambda start, end: os.pread(file.fileno(), end - start, start), size, str(path))


def parse_header(fetch: Callable[[int, int], bytes], size: int, name: str) -> Header:
    """Check the header of safetensors data, wherever it lies.

    Args:
        fetch: the bytes from one offset to another.
        size: of all the data.
        name: what to call it in errors.

    Raises:
        FormatError: see `read_header`.
    """
    prefix = fetch(0, min(8, size))
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(f"{name}: not a safetensors file", found="no sound header length")
    raw = prefix + fetch(8, 8 + length)
    try:
        parsed = json.loads(raw[8:], object_pairs_hook=_no_duplicates)
        metadata = parsed.pop("__metadata__", {})
        entries = {str(tensor): _entry(fields) for tensor, fields in parsed.items()}
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError("metadata must be text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{name}: not a safetensors file", found=f"a bad header ({error})") from None
    position = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end - entry.start != entry.info.count * entry.info.dtype.itemsize:
            raise FormatError(f"{name}: tensor {tensor!r} overlaps, leaves a hole or has a wrong size")
        position = entry.end
    if position != size - len(raw):
        raise FormatError(f"{name}: truncated or oversized", expected=len(raw) + position, found=size)
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
