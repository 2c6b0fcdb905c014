"""Histogram shifting on the leading bits of floating-point weights, exact to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# floating type: the integer of the same size, and the bits of its mantissa
FORMS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
}


class Peak(NamedTuple):
    """The highest bin of a histogram, the next empty bin above it, and how many values it holds."""

    value: int
    zero: int
    height: int


@dataclass(frozen=True)
class Carrier:
    """Where in one tensor some bits go; plain values, for the record.

    Attributes:
        tensor: its name.
        shape: its shape.
        dtype: its type, such as ``float32``.
        mantissa: bits of the mantissa in the leading part.
        channels: the host channels: indexes of the first dimension, in the order of reading.
        peak: P, the bin that holds the bits.
        zero: Z, the empty bin above it.
        bits: how many.
    """

    tensor: str
    shape: list[int]
    dtype: str
    mantissa: int
    channels: list[int]
    peak: int
    zero: int
    bits: int

    def suits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the form of the host."""
        return list(tensor.shape) == self.shape and str(tensor.dtype) == f"torch.{self.dtype}"

    def embed(self, tensor: Tensor, bits: Tensor) -> Tensor:
        """P < v < Z goes up by one; so does the i-th v = P where bit i is 1. ``bits``: (bits,) bool."""
        values = self._leading(tensor)
        raised = (values > self.peak) & (values < self.zero)
        places = (values == self.peak).nonzero().squeeze(1)[: self.bits]
        raised[places] = bits.to(tensor.device)
        return self._moved(tensor, raised, 1)

    def restore(self, tensor: Tensor) -> Tensor:
        """P < v <= Z goes down by one."""
        values = self._leading(tensor)
        return self._moved(tensor, (values > self.peak) & (values <= self.zero), -1)

    def read(self, tensor: Tensor) -> Tensor:
        """The bits, as (bits,) bool; fewer where a changed tensor holds fewer."""
        values = self._leading(tensor)
        held = values[(values == self.peak) | (values == self.peak + 1)]
        return (held[: self.bits] > self.peak).cpu()

    def _leading(self, tensor: Tensor) -> Tensor:
        return leading_parts(tensor[self._rows(tensor)], self.mantissa)

    def _rows(self, tensor: Tensor) -> Tensor:
        return torch.tensor(self.channels, device=tensor.device)

    def _moved(self, tensor: Tensor, which: Tensor, step: int) -> Tensor:
        result, rows = tensor.clone(), self._rows(tensor)
        host = tensor[rows]
        integers = _ordered(host) + which * (step << _dropped(tensor.dtype, self.mantissa))
        result[rows] = _as_floats(integers, tensor.dtype).reshape(host.shape)
        return result


def leading_parts(tensor: Tensor, mantissa: int) -> Tensor:
    """The leading part v of every entry: sign, exponent ``mantissa`` bits, as (entries,) int64.

    It grows with the entry: zero is 0, and the next float of ``mantissa`` bits is the next integer.

    Example:
        >>> leading_parts(torch.tensor([0.0, -0.0, 1.0, 1.125, 2.0]), mantissa=3).tolist()
        [0, -1, 1016, 1017, 1024]
    """
    return _ordered(tensor) >> _dropped(tensor.dtype, mantissa)


def find_peak(tensor: Tensor, mantissa: int) -> Peak:
    """The highest bin of the leading parts of ``tensor``; height 0 where no finite empty bin is above.

    Example:
        >>> find_peak(torch.tensor([[1.0, 1.0, 1.125]]), mantissa=3)
        Peak(value=1016, zero=1018, height=2)
    """
    values = leading_parts(tensor, mantissa)
    lowest = int(values.min())
    heights = torch.nn.functional.pad(torch.bincount(values - lowest), (0, 1))
    top = int(heights.argmax())
    zero = top + int((heights[top:] == 0).nonzero()[0])
    infinity = int(leading_parts(torch.tensor([torch.inf], dtype=tensor.dtype), mantissa))
    usable = lowest + zero < infinity
    return Peak(lowest + top, lowest + zero, int(heights[top]) if usable else 0)


def _dropped(dtype: torch.dtype, mantissa: int) -> int:
    return FORMS[dtype][1] - mantissa


def _ordered(tensor: Tensor) -> Tensor:
    return _flipped(tensor.contiguous().reshape(-1).view(FORMS[tensor.dtype][0]).long(), tensor.dtype)


def _as_floats(integers: Tensor, dtype: torch.dtype) -> Tensor:
    return _flipped(integers, dtype).to(FORMS[dtype][0]).view(dtype)


def _flipped(integers: Tensor, dtype: torch.dtype) -> Tensor:
    # turns sign and magnitude into two's complement and back; unlike a negation it keeps -0 from +0
    return torch.where(integers < 0, integers ^ torch.iinfo(FORMS[dtype][0]).max, integers)
