"""Which tensor of a leak is which of the original: by content, form and name.

Names are the first thing that a thief changes, and loaders change them too (``module.``, ``model.``).
The leak is read against the original alone and never against a mark. Whoever did not get the copy that
leaked has a mark that is independent of both, so that no choice made here, good or bad, makes him look
more suspicious than chance: the law of an innocent user's score holds as it did before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from sealmark.core.weights import Weights

_SAMPLE = 1 << 14  # entries that are looked at of a tensor, at most
_BUDGET = 1 << 24  # and of all tensors of one size together
# What speaks for a pair. A copy's entries agree by 1, a stranger's by 0. Where they moved with their
# neurons, the lengths of rows and columns are left, which tell up to 0.4, and the names.
_BY_NAME, _FULL_NAME, _BY_LENGTHS, _OTHER_FORM = 0.2, 0.3, 0.4, -0.3
_LIKE = 0.02  # relative difference of lengths: under it after moving, over it between tensors
_DEVIATIONS = 3.0  # agreement under so many is chance

Figures = NDArray[np.float64]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the original is in a leak.

    Attributes:
        source: its name there.
        turned: whether it lies there transposed.
        grown: whether it has more rows or columns there, as a larger vocabulary gives; the first are meant.
    """

    source: str
    turned: bool = False
    grown: bool = False

    def read(self, tensor: Tensor, shape: Shape) -> Tensor:
        """The tensor as the original has it: ``shape``."""
        if self.grown:
            return tensor[tuple(slice(size) for size in shape)]
        return (tensor.T if self.turned else tensor).reshape(shape)


def places(suspect: Weights, original: Weights) -> dict[str, Place]:
    """Where each floating-point tensor of the original is in a leak; those that are not there are left out.

    Tensors of as many entries are told apart by `_scores`, one to one and optimal for the sum; then those
    that grew. One tensor at a time is in memory, and samples of at most 64 MiB a side.

    Args:
        suspect: the leak's tensors.
        original: the owner's.

    Example:
        >>> from sealmark.core.weights import ModelWeights
        >>> model = torch.nn.Linear(4, 3)
        >>> renamed = ModelWeights(torch.nn.ModuleDict({"module": model}))
        >>> places(renamed, ModelWeights(model))["weight"].source
        'module.weight'
    """
    free = {name for name in suspect if suspect.info[name].is_float and suspect.info[name].count}
    left = {name for name in original if original.info[name].is_float and original.info[name].count}
    # what bears a name of the original and may have grown is that tensor's first of all: neurons that were added
    # give it the size of another by chance
    grown = {name for name in free & left if _grew(suspect.info[name].shape, original.info[name].shape)}
    found: dict[str, Place] = {}
    for shape, names in _by_shape(left, original, count_only=True):
        rivals = sorted(name for name in free - grown if suspect.info[name].count == int(np.prod(shape)))
        found |= _paired(names, rivals, suspect, original, None)
    free -= {place.source for place in found.values()}
    for shape, names in _by_shape(left - found.keys(), original):
        rivals = sorted(name for name in free if _holds(suspect.info[name].shape, shape))
        taken = _paired(names, rivals, suspect, original, shape)
        free -= {place.source for place in taken.values()}
        found |= taken
    return found


def _by_shape(names: Iterable[str], weights: Weights, *, count_only: bool = False) -> list[tuple[Shape, list[str]]]:
    """Names by the shape of their tensors; with ``count_only`` by the number of entries alone."""

    def key(name: str) -> Shape:
        info = weights.info[name]
        return (info.count,) if count_only else info.shape

    return [(shape, [*group]) for shape, group in groupby(sorted(names, key=lambda n: (key(n), n)), key)]


def _grew(larger: Shape, smaller: Shape) -> bool:
    return larger != smaller and _holds(larger, smaller)


def _holds(larger: Shape, smaller: Shape) -> bool:
    return len(larger) == len(smaller) and all(a >= b for a, b in zip(larger, smaller, strict=True))


def _paired(
    names: list[str], rivals: list[str], suspect: Weights, original: Weights, cut: Shape | None
) -> dict[str, Place]:
    """The best one-to-one pairs; ``cut`` is the shape in which grown tensors are compared."""
    if names == rivals and len(names) == 1 and suspect.info[names[0]].shape == original.info[names[0]].shape:
        return {names[0]: Place(names[0])}  # nothing else to choose from: spares reading both
    if not rivals:
        return {}
    scores, turned, likely = _scores(names, rivals, suspect, original, cut)
    pairs = zip(*linear_sum_assignment(scores, maximize=True), strict=True)
    return {
        names[i]: Place(rivals[j], turned=bool(turned[i, j]), grown=cut is not None)
        for i, j in pairs
        if likely[i, j]
    }


def _scores(
    names: list[str], rivals: list[str], suspect: Weights, original: Weights, cut: Shape | None
) -> tuple[Figures, NDArray[np.bool_], NDArray[np.bool_]]:
    """What speaks for each pair, (names, rivals); whether it is turned; whether it may be at all."""
    size = min(_SAMPLE, max(64, _BUDGET // max(len(names), len(rivals))))
    own = _Looks(names, original, size, None)
    theirs = _Looks(rivals, suspect, size, cut)
    straight, across = _agreement(own.entries, theirs.entries), _agreement(own.entries, theirs.across)
    shapes = [cut or suspect.info[name].shape for name in rivals]
    same = np.array([[original.info[name].shape == shape for shape in shapes] for name in names])
    turned = across > straight
    floor = _DEVIATIONS / min(size, int(np.prod(original.info[names[0]].shape))) ** 0.5
    agreed = np.maximum(straight, across)
    sure = agreed > floor
    named = np.array([[_same_ending(name, rival) for rival in rivals] for name in names])
    lengths = np.where(same, _alike(own.lengths, theirs.lengths), 0.0)
    scores = np.where(sure, agreed, 0.0) + _BY_NAME * named + _BY_LENGTHS * lengths + _OTHER_FORM * ~same
    if cut is not None:  # neurons that were added move and scale others: what is left is the name
        scores += _FULL_NAME * np.array([[name == rival for rival in rivals] for name in names])
    likely = sure | (same & (cut is None)) | (same & (named == 1))
    return scores, turned & sure, likely


class _Looks:
    """What is kept of some tensors of as many entries each.

    Room is made before any of them is loaded: small pieces between large ones would keep those from being
    given back.

    Attributes:
        entries: (N, S) float32, of each tensor the same ones.
        across: (N, S) those of its transpose; zeros where it is no matrix.
        lengths: for each tensor the lengths of its rows and of its columns, sorted; of a vector its entries.
    """

    def __init__(self, names: Sequence[str], weights: Weights, size: int, cut: Shape | None) -> None:
        shapes = [cut or weights.info[name].shape for name in names]
        count = int(np.prod(shapes[0]))
        step = max(1, count // size) | 1  # odd: or the sample might be a few columns alone
        self.entries = torch.zeros(len(names), len(range(0, count, step)))
        self.across = torch.zeros_like(self.entries)
        self.lengths = [torch.zeros(sum(shape[:2]) or 1) for shape in shapes]
        for row, name in enumerate(names):
            exact = weights[name].detach() if cut is None else Place(name, grown=True).read(weights[name], cut)
            exact = exact.to("cpu", torch.float32, copy=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            self.entries[row] = exact.reshape(-1)[::step]
            if exact.dim() == 2:
                self.across[row] = exact.T.reshape(-1)[::step]
            torch.cat([_lengths(exact, axis) for axis in range(max(1, min(2, exact.dim())))], out=self.lengths[row])


def _lengths(tensor: Tensor, axis: int) -> Tensor:
    """How long each slice along an axis is, sorted."""
    if tensor.dim() < 2:
        return tensor.reshape(-1).sort().values
    others = tuple(other for other in range(tensor.dim()) if other != axis)
    sizes: Tensor = torch.linalg.vector_norm(tensor, dim=others)
    return sizes.sort().values


def _agreement(own: Tensor, theirs: Tensor) -> Figures:
    """2 <a, b> / (|a|^2 + |b|^2) of each pair, freed of their means: 1 for equals only, about 0 for strangers.

    The means are left out because all scales of normalization are near 1, whatever layer they are of.
    """
    own, theirs = (part - part.mean(1, keepdim=True) for part in (own, theirs))
    power = own.square().sum(1)[:, None] + theirs.square().sum(1)
    return torch.where(power > 0, 2 * (own @ theirs.T) / power, torch.ones(())).double().numpy()


def _alike(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Figures:
    """exp(-difference of the lengths): 1 for a tensor whose rows and columns moved; 0 for other forms."""
    result = np.zeros((len(own), len(theirs)))
    for size in {len(lengths) for lengths in own}:
        rows = [i for i, lengths in enumerate(own) if len(lengths) == size]
        columns = [j for j, lengths in enumerate(theirs) if len(lengths) == size]
        if columns:
            one, two = (np.stack([part[i].numpy() for i in at]) for part, at in ((own, rows), (theirs, columns)))
            scale = np.linalg.norm(one, axis=1)[:, None] + np.linalg.norm(two, axis=1)
            difference = 2 * cdist(one, two) / np.maximum(scale, 1e-30)
            result[np.ix_(rows, columns)] = np.exp(-difference / _LIKE)
    return result


def _same_ending(one: str, two: str) -> float:
    """The share of the shorter name, part by part from its end, that both have.

    Example:
        >>> _same_ending("fc.weight", "module.fc.weight"), _same_ending("fc.weight", "head.weight")
        (1.0, 0.5)
    """
    parts = [name.split(".")[::-1] for name in (one, two)]
    shared = 0
    for a, b in zip(*parts, strict=False):
        if a != b:
            break
        shared += 1
    return shared / min(map(len, parts))
