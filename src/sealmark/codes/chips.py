"""Spreading a code over weights: a keyed +-1 chip a weight, and the code position that each one carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret

_WORD = 32  # chips in a word of the stream
_BLOCK = 8192  # words at a time: what is computed for a block stays in the processor's cache
_SIGN = -(2**31)  # the sign bit of a float32, as an int32
_OUTLIER = 3.0  # deviations count up to so many times the tensor's own scale
_SAMPLE = 65536


@dataclass(frozen=True)
class Chips:
    """Which weight carries which position of a code, and with which sign.

    A block of 32 n weights takes n words of the tensor's own AES stream: bit k of word j is the chip of
    weight k n + j. A word carries 32 positions; all ``bits / 32`` words of the code come by before one comes
    again, each time in another keyed order, and that runs on from tensor to tensor. So every position gets
    about the same number of weights, spread over all tensors, at the cost of one XOR a word.

    The order adds no secrecy and needs none. Two copies differ in the same weights whatever it is; the
    chips hide which of the two has a 1 there; and codes assume that colluders see even that.

    Args:
        secret: the owner's.
        bits: positions of the code, a multiple of 32 of at most 2**18.
        counts: weights of each tensor.

    Raises:
        ParameterError: ``bits`` is none of these.

    Example:
        >>> chips = Chips(Secret(bytes(32), {}), 32, {"layer": 4096})
        >>> word = np.array([1, 0] * 16, np.uint8)
        >>> weights = torch.zeros(4096)
        >>> chips.add("layer", weights, 0.5, chips.mask(word))
        >>> reading = Reading(chips)
        >>> reading.take("layer", torch.zeros(4096), weights, 0.5)
        4096
        >>> reading.symbols()[:4].tolist()
        [1.0, -1.0, 1.0, -1.0]
    """

    secret: Secret
    bits: int
    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.bits % _WORD or not _WORD <= self.bits <= _WORD * _BLOCK:
            raise ParameterError(
                "bad number of bits", expected=f"a multiple of {_WORD} up to {_WORD * _BLOCK}", found=self.bits
            )

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(T,) the code word that each word of a block carries: permutations of ``bits / 32``, end to end."""
        words = self.bits // _WORD
        drawn = self.secret.stream("order").words(_BLOCK // words * words).reshape(-1, words)
        return np.argsort(drawn, axis=1, kind="stable").reshape(-1)

    @cached_property
    def _first(self) -> dict[str, int]:
        """Where in ``order`` each tensor begins."""
        first, used = {}, 0
        for name in sorted(self.counts):
            first[name] = used % len(self.order)
            used += -(-self.counts[name] // _WORD)
        return first

    def mask(self, word: NDArray[np.uint8]) -> Tensor:
        """(2 T,) int32: what turns chips into the signs of a user's mark. ``word``: (bits,) of 0 and 1."""
        packed = np.packbits(1 - word, bitorder="little").view("<i4")[self.order]
        return torch.from_numpy(np.concatenate([packed, packed]))

    def blocks(self, name: str) -> Iterator[tuple[slice, slice, Tensor]]:
        """Weights, their places in a mask, and their chips as words: (n,) int32, block by block."""
        stream, total, size = self.secret.stream(f"chips/{name}"), len(self.order), self.counts[name]
        for start in range(0, size, _WORD * total):
            stop = min(start + _WORD * total, size)
            words = -(-(stop - start) // _WORD)
            raw = stream.raw(4 * words, offset=start // 8)
            place = slice(self._first[name], self._first[name] + words)
            yield slice(start, stop), place, torch.from_numpy(raw.view("<i4"))

    def add(self, name: str, flat: Tensor, amplitude: float, mask: Tensor) -> None:
        """Add ``amplitude * chip * (2 bit - 1)`` to a tensor in place; ``flat``: (N,), of any float type."""
        height = int(np.float32(amplitude).view(np.int32))
        buffer = torch.empty(_WORD * len(self.order), dtype=torch.int32, device=flat.device)
        for weights, place, words in self.blocks(name):
            signs = _planes((words ^ mask[place]).to(flat.device), buffer).bitwise_or_(height)
            flat[weights].add_(signs.view(torch.float32).view(-1)[: weights.stop - weights.start])


class Reading:
    """What the weights of a suspect say about each position, gathered tensor by tensor.

    Args:
        chips: of the owner.
    """

    def __init__(self, chips: Chips) -> None:
        self._chips = chips
        self._sums = torch.zeros(_WORD, 2 * len(chips.order))
        self._power = 0.0

    def take(self, name: str, original: Tensor, suspect: Tensor, amplitude: float) -> int:
        """Correlate what became of a tensor with its chips; (N,) each, on the CPU. Returns how many were read.

        Robust: the tensor's own scale of change s, if above the amplitude a, becomes the unit, changes
        count up to three units, and the tensor counts for (a / s)^2. So neither outliers nor a heavily
        changed tensor drown the others. Weights that became exactly 0 were pruned and say nothing.
        """
        step = max(1, len(original) // _SAMPLE)
        kept = suspect[::step] != 0
        sample = _change(original[::step], suspect[::step])[kept].abs()
        unit = max(amplitude, float(sample.median())) if len(sample) else amplitude
        share = amplitude / unit
        buffer = torch.empty(_WORD * len(self._chips.order), dtype=torch.int32)
        read = 0
        for weights, place, words in self._chips.blocks(name):
            part = suspect[weights]
            change = _change(original[weights], part).div_(unit).clamp_(-_OUTLIER, _OUTLIER)
            change[part == 0] = 0
            read += int(torch.count_nonzero(part))
            padded = torch.nn.functional.pad(change.mul_(share), (0, _WORD * len(words) - len(change)))
            signs = _planes(words, buffer)
            signs.bitwise_xor_(padded.view(torch.int32).view(_WORD, -1))
            self._sums[:, place] += signs.view(torch.float32)
        self._power += read * share**2
        return read

    def symbols(self) -> NDArray[np.float64]:
        """(bits,) mean correlation at each position: +1 for a 1 and -1 for a 0 in an unchanged copy."""
        chips = self._chips
        folded = self._sums.double().numpy().reshape(_WORD, 2, -1).sum(1)
        sums = np.zeros((chips.bits // _WORD, _WORD))
        np.add.at(sums, chips.order, folded.T)
        return sums.reshape(-1) * chips.bits / (self._power or 1.0)


def _planes(words: Tensor, buffer: Tensor) -> Tensor:
    """Bit k of every word as the sign bit of row k: (n,) to (32, n) int32, in ``buffer``."""
    planes = buffer[: _WORD * len(words)].view(_WORD, len(words))
    shifts = torch.arange(_WORD - 1, -1, -1, dtype=torch.int32, device=buffer.device)[:, None]
    torch.bitwise_left_shift(words, shifts, out=planes)
    return planes.bitwise_and_(_SIGN)


def _change(original: Tensor, suspect: Tensor) -> Tensor:
    change = suspect.to(torch.float32) - original.to(torch.float32)
    return change.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
