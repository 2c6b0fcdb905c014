"""How weights carry bits: by sign, by correlation, in their lowest bits (Song et al. 2017)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sealmark.core.evidence import Score
from sealmark.stats.nulls import KeyedProjection, score_of_bits


@dataclass(frozen=True)
class Carrier(ABC):
    """Bits in n weights: values (n,) float32, and bits (n, each) uint8 of 0 and 1, the first the highest.

    Attributes:
        each: bits in one weight.
        most: the most that it can carry.
        pilots: weights at the end whose bits were zero before they were keyed.
    """

    each: int
    most = 1
    pilots = 0

    def pull(self, values: Tensor, bits: Tensor) -> Tensor:
        """A scalar for training to make small; zero where there is nothing to train."""
        return values.new_zeros(())

    @abstractmethod
    def read(self, values: Tensor, bits: Tensor) -> Tensor:
        """What a suspect's values hold, in the form of ``bits``, of which the pilots alone are looked at."""

    def score(self, values: Tensor, bits: Tensor) -> Score:
        """Matching bits against Bin(n each, 1/2), two-sided."""
        matches = int((self.read(values, bits) == bits).sum())
        return score_of_bits(matches, bits.numel())

    def erase(self, tensor: Tensor, places: Tensor) -> Tensor:
        """A tensor without what is read of it; ``places`` (m,) index its flat form."""
        flat = tensor.detach().reshape(-1).clone()
        flat[places] = 0
        return flat.reshape(tensor.shape)


@dataclass(frozen=True)
class Sign(Carrier):
    """Signs s: the pull is ``strength sum_i max(0, margin - s_i theta_i)``.

    The paper's is a mean without a margin: its lambda is ``strength n``.
    """

    strength: float
    margin: float

    def pull(self, values: Tensor, bits: Tensor) -> Tensor:
        """``strength sum_i max(0, margin - s_i theta_i)``."""
        signs = 2 * bits[:, 0].float() - 1
        return self.strength * (self.margin - signs * values).relu().sum()

    def read(self, values: Tensor, bits: Tensor) -> Tensor:
        """One where the weight is not negative."""
        return (values >= 0).to(torch.uint8)[:, None]


@dataclass(frozen=True)
class Correlation(Carrier):
    """Weights that become an affine map of secret levels in [-1, 1], 256 of them for eight bits.

    The pull is ``- strength sqrt(n) r`` with Pearson's r: the paper's lambda is ``strength sqrt(n)``. It
    has ``|r|`` there; without the modulus the map rises, and pilots tell its scale.
    """

    strength: float
    most = 8
    pilots = 64

    def pull(self, values: Tensor, bits: Tensor) -> Tensor:
        """``- strength sqrt(n) r``."""
        scale: float = self.strength * len(values) ** 0.5
        return -scale * _pearson(values, self._levels(bits))

    def read(self, values: Tensor, bits: Tensor) -> Tensor:
        """The nearest level to each weight, on the scale of the pilots."""
        centered = (values - values.mean()).double()
        scale = self._levels(bits[-self.pilots :]).double() @ centered[-self.pilots :] / self.pilots
        shares = ((centered / scale).nan_to_num().clamp(-1, 1) + 1) / 2
        words = (shares * (2**self.each - 1)).round().int()
        found: Tensor = words[:, None] >> _shifts(bits) & 1
        return found.to(torch.uint8)

    def score(self, values: Tensor, bits: Tensor) -> Score:
        """The projection on the levels, whose signs are keyed, two-sided."""
        levels, centered = self._levels(bits).double(), (values - values.mean()).double()
        spread = (levels * centered).norm().item()
        projection = abs((levels @ centered).item())
        details = {
            "bits": bits.numel(),
            "ber": (self.read(values, bits) != bits).double().mean().item(),
            "correlation": _pearson(centered, levels).item(),
        }
        return Score(projection / spread if spread else 0.0, KeyedProjection(two_sided=True), details)

    def _levels(self, bits: Tensor) -> Tensor:
        top: float = 2**self.each - 1
        return _words(bits).float() / top * 2 - 1


@dataclass(frozen=True)
class LowBits(Carrier):
    """The lowest bits of a float32's mantissa, through the integer of the same size: no byte order enters."""

    most = 23

    def write(self, values: Tensor, bits: Tensor) -> Tensor:
        """The values with their low bits replaced."""
        return (self._kept(values) | _words(bits)).view(torch.float32)

    def read(self, values: Tensor, bits: Tensor) -> Tensor:
        """The low bits."""
        return (values.view(torch.int32)[:, None] >> _shifts(bits) & 1).to(torch.uint8)

    def erase(self, tensor: Tensor, places: Tensor) -> Tensor:
        """The low bits of every weight go: what is left does not depend on where the weights stand."""
        return self._kept(tensor.detach().float().contiguous()).view(torch.float32)

    def _kept(self, values: Tensor) -> Tensor:
        return values.view(torch.int32) & -(1 << self.each)


def _shifts(bits: Tensor) -> Tensor:
    return torch.arange(bits.shape[1] - 1, -1, -1, dtype=torch.int32, device=bits.device)


def _words(bits: Tensor) -> Tensor:
    return (bits.int() << _shifts(bits)).sum(1, dtype=torch.int32)


def _pearson(values: Tensor, levels: Tensor) -> Tensor:
    one, other = values - values.mean(), levels - levels.mean()
    result: Tensor = one @ other / (one.norm() * other.norm()).clamp_min(1e-12)
    return result
