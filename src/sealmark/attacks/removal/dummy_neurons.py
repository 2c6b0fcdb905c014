"""Neurons that change nothing: unread, cancelling one another, or sharing the work of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.symmetry.rewriting import Tensors, positions, reorder, rewriting
from sealmark.core.symmetry.structure import Slot, Units


@dataclass(frozen=True)
class DummyNeurons(Modification):
    """Add neurons to every hidden layer that may grow, and shuffle them in: neural structural obfuscation.

    ``zero``: weights drawn from those of real neurons, and nobody reads them. ``clique``: the same in
    equal pairs whose readers cancel. ``split``: copies of real neurons, which share their outgoing
    weights in random parts. Layers under a layer norm, attention heads, residual streams of
    transformers, and widths that the forward function spells out stay as they are.

    Args:
        kind: ``zero``, ``clique`` or ``split``.
        share: how many are added, as a share of the layer; at least one, two of a clique.

    Raises:
        ParameterError: another kind, or a share that is not positive.

    Example:
        >>> DummyNeurons(kind="split")
        DummyNeurons(kind='split', share=0.25)
    """

    kind: Literal["zero", "clique", "split"] = "clique"
    share: float = 0.25

    card = AttackCard(
        title="Dummy neurons",
        citation="Y. Yan, X. Pan, M. Zhang, M. Yang, Rethinking White-Box Watermarks on Deep Learning Models under "
        "Neural Structural Obfuscation, USENIX Security 2023, arXiv 2303.09732",
        goal="make a mark in the weights unreadable, at no cost in accuracy",
        knowledge="the weights and the architecture",
        level=1,
        needs_data=False,
        changes_form=True,
        parameters="kind zero, clique or split; share 0.05 to 1 of a layer's neurons",
    )

    def __post_init__(self) -> None:
        if self.kind not in ("zero", "clique", "split") or not 0 < self.share <= 4:
            raise ParameterError(
                "bad parameters of dummy_neurons",
                expected="kind zero, clique or split, share above 0, at most 4",
                found=(self.kind, self.share),
            )

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`."""
        model = copies[0]
        with rewriting(model) as (groups, tensors):
            for units in groups:
                if units.resizable:
                    self._grow(tensors, units, rng)
        return model, 0

    def _grow(self, tensors: Tensors, units: Units, rng: np.random.Generator) -> None:
        count = max(1, round(self.share * units.size))
        pairs = (count + 1) // 2
        models = rng.integers(units.size, size=pairs if self.kind == "clique" else count)
        source = torch.from_numpy(np.repeat(models, 2) if self.kind == "clique" else models)
        added = len(source)
        for slot in dict.fromkeys((*units.makers, *(slot for norm in units.norms for slot in norm.slots))):
            extra = _taken(tensors[slot.tensor], slot, source)
            if self.kind != "split" and slot in units.makers:  # not a copy of anybody, and alike in pairs
                noise = rng.standard_normal(extra.shape)
                if self.kind == "clique":
                    noise = _paired(noise, slot)
                # on the scale of the neuron whose statistics it takes, else float32 feels the pair cancel
                others = [axis for axis in range(extra.dim()) if axis != slot.axis]
                size = extra.square().mean(others, keepdim=True).sqrt() if others else extra.abs()
                extra = extra + size * torch.from_numpy(noise).to(extra)
            tensors[slot.tensor] = torch.cat([tensors[slot.tensor], extra], slot.axis)
        parts = torch.from_numpy(rng.uniform(0.2, 0.8, added))
        for slot in units.readers:
            tensors[slot.tensor] = self._read(tensors[slot.tensor], slot, source, parts)
        grown = replace(units, size=units.size + added)
        reorder(tensors, grown, torch.from_numpy(rng.permutation(grown.size)))

    def _read(self, tensor: Tensor, slot: Slot, source: Tensor, parts: Tensor) -> Tensor:
        """Outgoing weights of the dummies, beside those of the others."""
        extra = _taken(tensor, slot, source)
        if self.kind == "zero":
            return torch.cat([tensor, torch.zeros_like(extra)], slot.axis)
        if self.kind == "clique":
            signs = torch.tensor([1.0, -1.0]).repeat(len(source) // 2).repeat_interleave(slot.block)
            return torch.cat([tensor, extra * _along(signs, extra, slot)], slot.axis)
        tensor, pieces = tensor.clone(), []
        for unit, part in zip(source.tolist(), parts.tolist(), strict=True):
            place = positions(slot, torch.tensor([unit])).to(tensor.device)
            whole = tensor.index_select(slot.axis, place)
            pieces.append(whole * part)
            tensor = tensor.index_copy(slot.axis, place, whole - pieces[-1])
        return torch.cat([tensor, *pieces], slot.axis)


def _taken(tensor: Tensor, slot: Slot, units: Tensor) -> Tensor:
    return tensor.index_select(slot.axis, positions(slot, units).to(tensor.device))


def _along(values: Tensor, tensor: Tensor, slot: Slot) -> Tensor:
    return values.to(tensor).reshape([-1 if axis == slot.axis else 1 for axis in range(tensor.dim())])


def _paired(noise: NDArray[np.float64], slot: Slot) -> NDArray[np.float64]:
    """The same noise for both of a pair."""
    halves = np.split(noise, np.arange(slot.block, noise.shape[slot.axis], slot.block), slot.axis)
    return np.concatenate([half for pair in halves[::2] for half in (pair, pair)], slot.axis)
