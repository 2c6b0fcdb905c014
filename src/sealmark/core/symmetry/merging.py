"""Takes out neurons that do nothing: duplicates that were split or cancel, and neurons that nobody reads.

Szentannai et al. 2019 (MimosaNet) and Yan et al. 2023 (neural structural obfuscation) put them in; merging
colinear neurons takes them out and leaves the function as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sealmark.core.symmetry.rewriting import Tensors, keep, positions, rows
from sealmark.core.symmetry.structure import Slot, Units

_ALIKE = 1e-5  # 1 - cosine of the weights of duplicates; float32 gives 1e-12, independent units 0.1 and more
_NOTHING = 1e-4  # outgoing weights that cancel to this share of themselves


def drop_dummies(tensors: Tensors, units: Units, size: int) -> int:
    """Merge duplicates and drop unread units until the original's number is left; how many are left.

    All of the suspect is looked at and nothing of the original but that number, so that a mark in the
    original has no say in it.

    Args:
        tensors: the suspect's, in float64; replaced where they change. Inputs need no order yet.
        units: as the original has them.
        size: how many the suspect has.
    """
    spare = size - units.size
    gone = torch.zeros(size, dtype=torch.bool)
    incoming = _incoming(tensors, units, size)
    gross = _outgoing(tensors, units, size)
    if incoming is not None:
        homogeneous = _homogeneous(units)
        norms = incoming.square().sum(1).sqrt()
        for unit, leader in _duplicates(incoming, norms):
            factor = float(norms[unit] / norms[leader])
            if int(gone.sum()) < spare and (homogeneous or abs(factor - 1) < _ALIKE):
                for slot in units.readers:
                    _pour(tensors, slot, unit, leader, factor)
                gone[unit] = True
                gross[leader] += factor * gross[unit]
    net = _outgoing(tensors, units, size)
    unread = ~gone & (net <= torch.clamp(_NOTHING * gross, min=1e-9 * float(gross.median())))
    if int((gone | unread).sum()) <= spare:
        gone |= unread
    keep(tensors, units, torch.arange(size)[~gone])
    return size - int(gone.sum())


def _incoming(tensors: Tensors, units: Units, size: int) -> Tensor | None:
    """What makes each unit, with batch normalization folded in: (size, entries)."""
    made = [*units.makers, *(slot for norm in units.norms for slot in norm.slots)]
    if any(slot.start for slot in made):
        return None
    norm_of = {slot: stretch.norms for stretch in units.stretches for slot in stretch.sources}
    parts = []
    for slot in units.makers:
        part = rows(tensors, slot, size)
        norms = norm_of.get(slot, ())
        if len(norms) == 1 and norms[0].block == 1:
            norm = norms[0]
            gain = tensors[norm.weight] / torch.sqrt(tensors[norm.var] + norm.eps)
            part = part * gain[:, None]
            if slot.tensor.endswith("bias"):  # the offset: once a layer
                continue
            bias = tensors.get(slot.tensor.removesuffix("weight") + "bias", torch.zeros(()))
            offset = (bias - tensors[norm.mean]) * gain + (tensors[norm.bias] if norm.bias else 0)
            part = torch.cat([part, offset[:, None]], 1)
        parts.append(part)
    folded = {norm for norms in norm_of.values() if len(norms) == 1 for norm in norms if norm.block == 1}
    parts += [rows(tensors, slot, size) for norm in units.norms if norm not in folded for slot in norm.slots]
    return torch.cat(parts, 1)


def _outgoing(tensors: Tensors, units: Units, size: int) -> Tensor:
    """How much each unit is read: (size,)."""
    return torch.cat([rows(tensors, slot, size) for slot in units.readers], 1).square().sum(1).sqrt()


def _homogeneous(units: Units) -> bool:
    """Whether a unit that is twice as strong is read as twice the unit."""
    last = [stretch for stretch in units.stretches if set(stretch.readers) & set(units.readers)]
    return len(last) == 1 and set(last[0].readers) == set(units.readers)


def _duplicates(incoming: Tensor, norms: Tensor) -> list[tuple[int, int]]:
    """Pairs (unit, the first unit that it is a positive multiple of)."""
    directions = incoming / norms.clamp(min=1e-30)[:, None]
    alike = (directions @ directions.T > 1 - _ALIKE) & (norms > 0)[:, None]
    first = alike.int().argmax(0)
    return [(unit, int(leader)) for unit, leader in enumerate(first.tolist()) if norms[unit] > 0 and leader < unit]


def _pour(tensors: Tensors, slot: Slot, unit: int, leader: int, factor: float) -> None:
    """Let the leader be read as both were."""
    tensor = tensors[slot.tensor].clone()
    source, target = (positions(slot, torch.tensor([which])) for which in (unit, leader))
    extra = tensor.index_select(slot.axis, source) * factor
    tensors[slot.tensor] = tensor.index_add(slot.axis, target, extra)
