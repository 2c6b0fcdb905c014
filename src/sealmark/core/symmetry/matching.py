"""Matches the units of a suspect to those of the original, and tells their scales and signs.

Only directions count: the cosine of what makes a unit and of what reads it, which no positive scale
changes. The assignment is optimal for the sum of cosines, as in the weight matching of Ainsworth et al.
2022 (Git Re-Basin), with scales and signs on top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sealmark.core.symmetry.rewriting import rows
from sealmark.core.symmetry.structure import Norm, Slot, Stretch, Units
from sealmark.core.weights import TensorMap

Table = Mapping[str, Tensor]
_TIE = 1e-5  # mean cosine by which another order must beat the one at hand
_GAIN = 2.0  # times that a scale must lower the squared error to be believed
_DRIFT = 0.05  # natural logarithm of a scale that training leaves behind
_SPREAD = 0.5  # natural logarithm of a scale told by variances alone that training does not explain


class Evidence:
    """What may be looked at, and which units are in order already.

    Args:
        units: of the original.
        original: its tensors.
        suspect: its tensors, which may be replaced while this looks at them.
        hidden: tensors that nothing may be seen of.
        view: what may be seen of the others.
    """

    def __init__(
        self, units: tuple[Units, ...], original: Table, suspect: Table, *, hidden: Collection[str], view: TensorMap
    ) -> None:
        self.units, self.suspect, self.hidden = units, suspect, frozenset(hidden)
        self.known: set[int] = set()
        self._view = view
        self._views: dict[str, tuple[Tensor, Tensor]] = {}  # of the suspect: the tensor and the view of it
        self._owners: dict[str, set[tuple[int, int]]] = {}
        for at, group in enumerate(units):
            for slot in group.slots:
                self._owners.setdefault(slot.tensor, set()).add((slot.axis, at))
        self.original = {name: view(name, original[name].clone()) for name in self._owners}

    def usable(self, slot: Slot) -> bool:
        """Not hidden, and whatever else indexes that tensor is in order."""
        others = {at for axis, at in self._owners[slot.tensor] if axis != slot.axis}
        return slot.tensor not in self.hidden and others <= self.known

    def seen(self, name: str) -> Tensor:
        """What may be seen of a tensor of the suspect as it is now."""
        tensor = self.suspect[name]
        if name not in self._views or self._views[name][0] is not tensor:
            self._views[name] = (tensor, self._view(name, tensor.clone()))
        return self._views[name][1]

    def both(self, slots: Sequence[Slot], size: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """What ``size`` units of the original and ``count`` of the suspect own there: (units, entries) each."""
        count = size if count is None else count
        one, two = [torch.zeros((size, 0), dtype=torch.float64)], [torch.zeros((count, 0), dtype=torch.float64)]
        one += [rows(self.original, slot, size) for slot in slots]
        two += [rows({slot.tensor: self.seen(slot.tensor)}, slot, count) for slot in slots]
        return torch.cat(one, 1), torch.cat(two, 1)

    def similarity(self, at: int, size: int) -> Tensor | None:
        """Cosines of the original's units with the suspect's: (original, suspect); None without evidence.

        A mean over all tensors, weighted by the root of their number of entries: a cosine of random
        vectors of d entries strays by 1 / sqrt(d).
        """
        units, total, weight = self.units[at], torch.zeros(()), 0.0
        either = {
            slot for stretch in units.stretches if stretch.signs for slot in (*stretch.sources, *stretch.readers)
        }
        for slot in self._pieces(units):
            one, two = self.both(self._with_bias(units, slot), units.size, size)
            cosine = _directions(one).float() @ _directions(two).float().T  # half the time of float64
            share = one.shape[1] ** 0.5
            total, weight = total + share * (cosine.abs() if slot in either else cosine), weight + share
        return torch.nan_to_num(total / weight) if weight else None

    def agreement(self, at: int) -> Tensor | None:
        """`similarity` of units that stand in the same place: (size,)."""
        units, total, weight = self.units[at], torch.zeros(()), 0.0
        for slot in self._pieces(units):
            one, two = self.both(self._with_bias(units, slot), units.size)
            share = one.shape[1] ** 0.5
            total, weight = total + share * _cosines(one, two).abs(), weight + share
        return torch.nan_to_num(total / weight) if weight else None

    def neighbors(self, at: int) -> set[int]:
        """The units themselves, and those that index the same tensors."""
        return {other for slot in self.units[at].slots for _, other in self._owners[slot.tensor]}

    def _pieces(self, units: Units) -> Iterator[Slot]:
        for slot in dict.fromkeys((*units.makers, *units.readers)):
            tensor = self.original[slot.tensor]
            if tensor.dim() > 1 and self.usable(slot) and bool((tensor != tensor.reshape(-1)[0]).any()):
                yield slot

    def _with_bias(self, units: Units, slot: Slot) -> list[Slot]:
        """A weight, and beside one that nothing normalizes its bias."""
        bias = Slot(slot.tensor.removesuffix("weight") + "bias", 0, slot.block)
        alone = slot.tensor.endswith("weight") and slot in units.makers and bias in units.makers
        return [slot, bias] if alone and not units.norms and self.usable(bias) else [slot]

    def factors(self, units: Units, stretch: Stretch) -> Tensor:
        """By what each unit of the suspect is scaled against the original's; 1 where that tells nothing: (size,).

        The suspect's units are in order already.
        """
        sources = [slot for slot in stretch.sources if self.usable(slot)]
        wide = any(self.original[slot.tensor].dim() > 1 for slot in sources)
        if stretch.norms and not wide:
            return self._told_by_norm(stretch.norms[0], units.size, signs=stretch.signs)
        makes = self.both(sources, units.size)
        reads = self.both([slot for slot in stretch.readers if self.usable(slot)], units.size)
        weights = [len(pair[0].T) * (_norms(pair[0]) > 0) * (_norms(pair[1]) > 0) for pair in (makes, reads)]
        logs = [_growth(*makes), -_growth(*reads)]
        evidence = weights[0] + weights[1]
        sizes = torch.exp((weights[0] * logs[0] + weights[1] * logs[1]) / evidence.clamp(min=1))
        if stretch.signs:
            turned = _cosines(*makes) * makes[0].shape[1] ** 0.5 + _cosines(*reads) * reads[0].shape[1] ** 0.5
            sizes = torch.where(turned < 0, -sizes, sizes)
        ones = torch.ones_like(sizes)
        before, after = (self._error(makes, reads, factor) for factor in (ones, sizes))
        drift = (sizes > 0) & (_log(sizes.abs()).abs() < _DRIFT) & (after > 1e-8)
        return torch.where((evidence > 0) & (before > _GAIN * after + 1e-10) & ~drift, sizes, ones)

    @staticmethod
    def _error(makes: tuple[Tensor, Tensor], reads: tuple[Tensor, Tensor], factors: Tensor) -> Tensor:
        made = (makes[1] / factors[:, None] - makes[0]).square().sum(1) / makes[0].square().sum(1).clamp(min=1e-30)
        read = (reads[1] * factors[:, None] - reads[0]).square().sum(1) / reads[0].square().sum(1).clamp(min=1e-30)
        return made + read

    def _told_by_norm(self, norm: Norm, size: int, *, signs: bool) -> Tensor:
        """Without a weight to look at: running variances grow with the square, the factor has the sign.

        Training moves variances too, so nothing is undone unless some unit moved more than that.
        """
        ones = torch.ones(size, dtype=torch.float64)
        if {norm.var, norm.mean, norm.weight} & self.hidden or norm.block > 1:
            return ones
        (var_o, var_s), (mean_o, mean_s), (gain_o, gain_s) = (
            (self.original[name], self.seen(name)) for name in (norm.var, norm.mean, norm.weight)
        )
        alive = (var_o > 1e-12) & (var_s > 1e-12)
        logs = torch.where(alive, (_log(var_s) - _log(var_o)) / 2, torch.zeros(()))
        sizes = torch.exp(logs) if float(logs.abs().max()) > _SPREAD else ones
        if signs:
            spread = torch.sqrt((var_o * var_s).clamp(min=1e-30))
            turned = mean_o * mean_s / spread + gain_o * gain_s / gain_o.square().mean().clamp(min=1e-30)
            sizes = torch.where(turned < 0, -sizes, sizes)
        return sizes


def assign(similarity: Tensor) -> Tensor:
    """For each unit of the original the one of the suspect: (original,) int64, optimal for the sum.

    The order at hand is kept when no other is better.

    Example:
        >>> assign(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist()
        [1, 0]
        >>> assign(torch.ones(3, 3)).tolist()
        [0, 1, 2]
    """
    count = len(similarity)
    chosen = similarity.argmax(1)
    if len(set(chosen.tolist())) < count:  # else each has the best that it can have, and is done in no time
        chosen = torch.from_numpy(np.asarray(linear_sum_assignment(similarity.numpy(), maximize=True)[1], np.int64))
    best = float(similarity[torch.arange(count), chosen].sum())
    if similarity.shape[1] == count and float(similarity.diagonal().sum()) >= best - _TIE * count:
        return torch.arange(count)
    return chosen


def _norms(matrix: Tensor) -> Tensor:
    return matrix.square().sum(1).sqrt()


def _directions(matrix: Tensor) -> Tensor:
    return matrix / _norms(matrix).clamp(min=1e-30)[:, None]


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    return (_directions(one) * _directions(two)).sum(1)


def _growth(one: Tensor, two: Tensor) -> Tensor:
    """Logarithm of how much longer the second is."""
    return _log(_norms(two)) - _log(_norms(one))


def _log(sizes: Tensor) -> Tensor:
    return torch.log(sizes.clamp(min=1e-30))
