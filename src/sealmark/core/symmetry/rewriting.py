"""The rewrites that leave a network's function as it is: another order, another scale, another sign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from sealmark.core.symmetry.structure import Norm, Slot, Stretch, Units, units_of
from sealmark.core.weights import ModelWeights

Tensors = MutableMapping[str, Tensor]


@contextmanager
def rewriting(model: nn.Module) -> Iterator[tuple[tuple[Units, ...], Tensors]]:
    """The units of a model and copies of its tensors to change, which are put into the model at the end.

    Raises:
        UnsupportedError: `torch.fx` cannot trace the model.
    """
    weights = ModelWeights(model)
    tensors = {name: weights[name].clone() for name in weights}
    yield units_of(model), tensors
    for name in weights:
        if tensors[name].shape == weights[name].shape:
            weights[name].copy_(tensors[name])
        else:
            resize(model, name, tensors[name])


def positions(slot: Slot, units: Tensor) -> Tensor:
    """The entries along the slot's axis that belong to ``units``: (len(units) * block,) int64.

    Example:
        >>> positions(Slot("w", 0, block=2, start=4), torch.tensor([1, 0])).tolist()
        [6, 7, 4, 5]
    """
    return (slot.start + units[:, None] * slot.block + torch.arange(slot.block)).reshape(-1)


def reorder(tensors: Tensors, units: Units, order: Tensor) -> None:
    """Put unit ``order[i]`` in place i, everywhere.

    Args:
        tensors: replaced by reordered copies where they are indexed by the units.
        units: as `units_of` tells them.
        order: (size,) int64, a permutation.
    """
    for slot in units.slots:
        tensor = tensors[slot.tensor]
        result = tensor.clone()
        target = positions(slot, torch.arange(units.size)).to(tensor.device)
        moved = tensor.index_select(slot.axis, positions(slot, order).to(tensor.device))
        tensors[slot.tensor] = result.index_copy(slot.axis, target, moved)


def scale(tensors: Tensors, stretch: Stretch, factors: Tensor) -> None:
    """Multiply each unit by its factor over the stretch; readers and norms take it up.

    A batch normalization divides by ``sqrt(var + eps)``, where eps does not grow with the units: its
    factor makes up for that, so that the function is the same at any scale.

    Args:
        tensors: replaced by scaled copies.
        stretch: of some units.
        factors: (size,) nonzero; positive unless ``stretch.signs``.
    """
    factors = factors.double()
    for slot in stretch.sources:
        multiply(tensors, slot, factors)
    for slot in stretch.readers:
        multiply(tensors, slot, 1 / factors)
    for norm in stretch.norms:
        _absorb(tensors, norm, factors)


def multiply(tensors: Tensors, slot: Slot, factors: Tensor) -> None:
    """Multiply a slot's entries, unit by unit; computed in float64, kept in the tensor's own type."""
    tensor = tensors[slot.tensor]
    whole = torch.ones(tensor.shape[slot.axis], dtype=torch.float64)
    whole[positions(slot, torch.arange(len(factors)))] = factors.to("cpu").repeat_interleave(slot.block)
    form = [-1 if axis == slot.axis else 1 for axis in range(tensor.dim())]
    tensors[slot.tensor] = (tensor.double() * whole.to(tensor.device).reshape(form)).to(tensor.dtype)


def _absorb(tensors: Tensors, norm: Norm, factors: Tensor) -> None:
    weight, _, mean, var = (Slot(name, 0, norm.block) for name in (norm.weight, norm.bias, norm.mean, norm.var))
    old = tensors[norm.var].double().cpu()
    spread = factors.to("cpu").repeat_interleave(norm.block)
    new = old * spread**2
    multiply(tensors, mean, factors)
    multiply(tensors, var, factors**2)
    gain = torch.sqrt((new + norm.eps) / (old + norm.eps)) / spread
    tensor = tensors[weight.tensor]
    tensors[weight.tensor] = (tensor.double() * gain.to(tensor.device)).to(tensor.dtype)


def rows(tensors: Mapping[str, Tensor], slot: Slot, size: int) -> Tensor:
    """What each of ``size`` units owns there: (size, entries)."""
    tensor = tensors[slot.tensor]
    chosen = positions(slot, torch.arange(size)).to(tensor.device)
    return tensor.index_select(slot.axis, chosen).movedim(slot.axis, 0).reshape(size, -1)


def keep(tensors: Tensors, units: Units, chosen: Tensor) -> None:
    """Put unit ``chosen[i]`` in place i and drop those that are not chosen: (count,) int64.

    Fused tensors, where the units do not fill the axis, cannot lose any: `reorder` serves them.
    """
    for slot in units.slots:
        tensor = tensors[slot.tensor]
        tensors[slot.tensor] = tensor.index_select(slot.axis, positions(slot, chosen).to(tensor.device))


def resize(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor of another shape in the place of a parameter or buffer, and tell its module its new width."""
    path, _, part = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, part)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    setattr(module, part, new)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm | _InstanceNorm):
        module.num_features = len(tensor)
    elif isinstance(module, _ConvNd):
        depthwise = module.groups > 1  # of all grouped convolutions the one that may grow
        outputs, inputs = module.weight.shape[:2]
        module.out_channels, module.in_channels = outputs, outputs if depthwise else inputs
        module.groups = outputs if depthwise else 1
        if module.transposed:
            module.in_channels, module.out_channels = outputs, inputs
