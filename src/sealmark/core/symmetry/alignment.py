"""Brings a suspect back into the form of the original: order, sign, scale and number of its units.

A thief may rewrite a network so that it computes the same and no mark in its weights can be read. The
owner holds the original, and undoes the rewrite. The suspect's function stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, UnknownNameError
from sealmark.core.symmetry.matching import Evidence, assign
from sealmark.core.symmetry.merging import drop_dummies
from sealmark.core.symmetry.rewriting import keep, reorder, scale
from sealmark.core.symmetry.structure import Units, units_of
from sealmark.core.weights import MemoryWeights, ModelWeights, TensorMap, Weights

_ROUNDS = 6


@dataclass(frozen=True)
class Alignment:
    """A suspect in the form of the original, and what had to be undone.

    Attributes:
        weights: its tensors under the original's names, in the original's shapes and types.
        agreement: mean cosine of matched units, 0 to 1: near 1 for a copy, far below for a stranger.
        units: how many could be compared.
        moved: how many stood elsewhere.
        flipped: signs that were undone.
        scaled: scales that were undone.
        dropped: units that the original does not have.
    """

    weights: MemoryWeights
    agreement: float
    units: int
    moved: int
    flipped: int
    scaled: int
    dropped: int

    @property
    def note(self) -> dict[str, Any]:
        """What a reader of the evidence wants to know, as plain values."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weights"}
        return {**told, "agreement": round(self.agreement, 4)}

    def model(self, original: nn.Module) -> nn.Module:
        """A copy of ``original`` that holds the weights."""
        twin = copy.deepcopy(original)
        tensors = ModelWeights(twin)
        with torch.no_grad():
            for name in tensors:
                tensors[name].copy_(self.weights[name])
        return twin


def align(suspect: Weights, original: nn.Module, *, blind: TensorMap | Collection[str] | None = None) -> Alignment:
    """Undo reordering, rescaling, sign flips and dummy neurons, as far as the original tells them.

    Units are taken in forward order, each matched by what makes and what reads it, where the other side of
    those weights is in order already; then backward, for units whose makers are blind; then all again until
    nothing moves. Whatever is done leaves the suspect's function as it is, but for units that remain in
    excess. A suspect in which nothing is to undo comes back bit for bit.

    Args:
        suspect: its named tensors.
        original: the model that the owner shipped.
        blind: what carries a mark: it is carried along, and no decision looks at it on either side; else
            an innocent model would be bent towards the mark. Names of tensors, of which nothing is seen;
            or a map that takes what must not be seen out of a tensor of the original's shape. What it
            leaves of those that it changes is looked at only where nothing else tells the units apart.

    Raises:
        ModelMismatchError: the suspect lacks tensors, or has a form that no dummy neuron explains.
        UnknownNameError: ``blind`` names no tensor of the original.
        UnsupportedError: the original cannot be traced.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> turned = copy.deepcopy(model)
        >>> for tensor in (turned[0].weight, turned[0].bias, turned[2].weight.T):
        ...     tensor.data[:] = tensor.data.flip(0)
        >>> found = align(ModelWeights(turned), model)
        >>> found.moved, torch.equal(found.weights["0.weight"], model[0].weight)
        (8, True)
    """
    reference = ModelWeights(original)
    if blind is None or not callable(blind):
        hidden = frozenset(blind or ())
        unknown = sorted(hidden - set(reference))
        if unknown:
            raise UnknownNameError("no such tensor", expected=f"one of {[*reference][:8]} ...", found=unknown)
        return _Aligner(suspect, reference, units_of(original), hidden, _whole).run()
    return _Aligner(suspect, reference, units_of(original), frozenset(), blind).run()


@dataclass
class _Undone:
    """What was undone for some units."""

    order: Tensor
    dropped: int = 0
    factors: dict[int, Tensor] = field(default_factory=dict)  # by stretch


class _Aligner:
    def __init__(
        self,
        suspect: Weights,
        reference: ModelWeights,
        units: tuple[Units, ...],
        hidden: frozenset[str],
        view: TensorMap,
    ) -> None:
        missing = sorted(set(reference) - set(suspect))
        if missing:
            raise ModelMismatchError("the suspect lacks tensors", expected=missing[:8], found=[*suspect][:8])
        self.reference, self.units = reference, units
        self.tensors = {name: _wide(suspect[name]) for name in reference}
        original = {name: _wide(reference[name]) for name in reference}
        self.evidence = Evidence(units, original, self.tensors, hidden=hidden, view=view)
        shown = self.evidence.original
        self.hidden = hidden  # for good
        self.evidence.hidden = hidden | {name for name in shown if not torch.equal(shown[name], original[name])}
        self.sizes = [self._size(group) for group in units]
        self.undone = [_Undone(torch.arange(group.size)) for group in units]

    def run(self) -> Alignment:
        order = range(len(self.units))
        for at in reversed(order):  # a unit that only dummies read is unread once they are gone
            if self.sizes[at] > self.units[at].size:
                self._drop(at)
        self._sweep()
        if len(self.evidence.known) < len(order):
            self.evidence.hidden = self.hidden | self._grown()
            self._sweep()
        stale = set(order)  # units of which something may have changed since they were looked at
        for _ in range(_ROUNDS):
            moved = [at for at in sorted(stale) if self._place(at)]
            stale = {other for at in moved for other in self.evidence.neighbors(at)}
        self._check_form()
        return self._result()

    def _sweep(self) -> None:
        """Forward, then backward, over what is not in order yet."""
        order = range(len(self.units))
        for at in (*order, *reversed(order)):
            if at not in self.evidence.known:
                self._place(at)

    def _grown(self) -> set[str]:
        """Tensors that still have another shape than the original's: a view of them means nothing."""
        info = self.reference.info
        partly = self.evidence.hidden - self.hidden
        return {name for name in partly if tuple(self.tensors[name].shape) != info[name].shape}

    def _size(self, units: Units) -> int:
        """How many units the suspect has; every tensor that they index must say the same."""
        counts = set()
        for slot in units.slots:
            form, here = self.reference.info[slot.tensor].shape, tuple(self.tensors[slot.tensor].shape)
            grown = here[slot.axis] - form[slot.axis] if len(here) == len(form) else 1 - slot.block
            counts.add(units.size + grown // slot.block if grown % slot.block == 0 else -1)
        if len(counts) != 1 or min(counts) < units.size:
            raise ModelMismatchError(
                f"the units of layer {units.layer!r} cannot be aligned",
                expected=f"{units.size}, or more with dummies",
                found=sorted(counts),
            )
        return counts.pop()

    def _drop(self, at: int) -> None:
        units, before = self.units[at], self.sizes[at]
        self.sizes[at] = drop_dummies(self.tensors, units, before)
        self.undone[at].dropped = before - units.size

    def _place(self, at: int) -> bool:
        """Match, reorder and rescale some units; whether anything changed."""
        units, undone = self.units[at], self.undone[at]
        similarity = self.evidence.similarity(at, self.sizes[at])
        if similarity is None:
            return False
        self.evidence.known.add(at)
        order = assign(similarity)
        moved = self.sizes[at] > units.size or not torch.equal(order, torch.arange(units.size))
        if self.sizes[at] > units.size:
            keep(self.tensors, units, order)
            self.sizes[at] = units.size
        elif moved:
            reorder(self.tensors, units, order)
        if moved:
            undone.order = undone.order[order] if int(order.max()) < len(undone.order) else order
            undone.factors = {key: factors[order] for key, factors in undone.factors.items()}
        for key, stretch in sorted(enumerate(units.stretches), key=lambda item: not item[1].norms):
            factors = self.evidence.factors(units, stretch)
            if not bool((factors == 1).all()):
                scale(self.tensors, stretch, 1 / factors)
                undone.factors[key] = undone.factors.get(key, torch.ones_like(factors)) * factors
                moved = True
        return moved

    def _check_form(self) -> None:
        for name, info in self.reference.info.items():
            if tuple(self.tensors[name].shape) != info.shape:
                raise ModelMismatchError(
                    f"tensor {name!r} of the suspect has another form",
                    expected=info.shape,
                    found=tuple(self.tensors[name].shape),
                )

    def _result(self) -> Alignment:
        cosines = []
        for at in sorted(self.evidence.known):
            agreement = self.evidence.agreement(at)
            if agreement is not None:
                cosines.append(agreement)
        matched = torch.cat(cosines) if cosines else torch.zeros(0)
        factors = [factors for undone in self.undone for factors in undone.factors.values()]
        made = {
            name: tensor.to(self.reference.info[name].dtype).contiguous() for name, tensor in self.tensors.items()
        }
        return Alignment(
            weights=MemoryWeights(memoryview(bytearray(save(made)))),
            agreement=float(matched.mean()) if len(matched) else 0.0,
            units=len(matched),
            moved=sum(int((undone.order != torch.arange(len(undone.order))).sum()) for undone in self.undone),
            flipped=sum(int((f < 0).sum()) for f in factors),
            scaled=sum(int((f.abs().log().abs() > 1e-3).sum()) for f in factors),
            dropped=sum(undone.dropped for undone in self.undone),
        )


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _whole(name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001 - a `TensorMap` that hides nothing
    return tensor
