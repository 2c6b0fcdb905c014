"""Which axes of which tensors index the same hidden units, and what may be done to them for free.

A network computes the same function after its hidden units were put in another order, scaled through
ReLU or batch normalization, or flipped in sign through batch normalization. Whoever reads weights must
know where those freedoms are, and so must whoever attacks the reader. Both ask `units_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sealmark.core.symmetry.tracing import GraphWalk, trace
from sealmark.core.symmetry.unit_groups import Group, Scaled


@dataclass(frozen=True, order=True)
class Slot:
    """A place where a tensor is indexed by units.

    Unit u owns the entries ``start + u * block`` up to ``start + (u + 1) * block`` along ``axis``.

    Attributes:
        tensor: its name, as in ``state_dict``; of tied tensors the first.
        axis: 0 in the rows of a layer that makes the units, 1 in the columns of one that reads them.
        block: entries a unit; more than one after ``flatten``, and for attention heads.
        start: where the units begin; not 0 in fused projections alone.
    """

    tensor: str
    axis: int
    block: int = 1
    start: int = 0


@dataclass(frozen=True)
class Norm:
    """A normalization that the units pass. Tensors that it lacks are "".

    Attributes:
        module: its name.
        kind: ``batch`` (running statistics, units apart), ``instance`` (units apart), ``layer`` or
            ``group`` (units together).
        eps: added to the variance.
        weight: name of the factor, gamma.
        bias: name of the offset, beta.
        mean: name of the running mean.
        var: name of the running variance.
        block: entries a unit.
    """

    module: str
    kind: str
    eps: float
    weight: str = ""
    bias: str = ""
    mean: str = ""
    var: str = ""
    block: int = 1

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where its tensors are indexed by the units."""
        return tuple(Slot(name, 0, self.block) for name in (self.weight, self.bias, self.mean, self.var) if name)


@dataclass(frozen=True)
class Stretch:
    """A part of the way of the units over which each may be scaled by a positive factor of its own.

    Multiply the ``sources`` by the factor, divide the ``readers`` by it, and let the ``norms``, which are
    batch normalizations, take it up: the function stays. `sealmark.core.symmetry.rewriting.scale` does it.

    Attributes:
        sources: what makes the units, or the factor and the offset of the norm that they come from.
        readers: the weights that read them.
        norms: the batch normalizations that end the stretch.
        signs: whether the factors may be negative: nothing but linear maps on the way.
    """

    sources: tuple[Slot, ...]
    readers: tuple[Slot, ...]
    norms: tuple[Norm, ...]
    signs: bool


@dataclass(frozen=True)
class Units:
    """Hidden units whose order is free, and everything that is indexed by them.

    Attributes:
        layer: name of the first layer that makes them.
        size: how many.
        makers: weights and biases of the layers that make them, and parameters added to them.
        norms: what normalizes them.
        readers: weights of the layers that read them.
        activations: nonlinear functions and products on the way, by name, in order.
        stretches: where they may be scaled.
        layers: names of all modules that are indexed by them, in order.
        resizable: whether more units could be added: no head, no norm over the units, no size that the
            forward function spells out.
    """

    layer: str
    size: int
    makers: tuple[Slot, ...]
    norms: tuple[Norm, ...]
    readers: tuple[Slot, ...]
    activations: tuple[str, ...]
    stretches: tuple[Stretch, ...]
    layers: tuple[str, ...]
    resizable: bool

    @property
    def scalable(self) -> bool:
        """Whether they may be scaled on the last part of the way, up to the readers."""
        return any(stretch.readers for stretch in self.stretches)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Everything that is indexed by the units, once."""
        norms = [slot for norm in self.norms for slot in norm.slots]
        return tuple(dict.fromkeys((*self.makers, *norms, *self.readers)))


def units_of(model: nn.Module) -> tuple[Units, ...]:
    """The hidden units of ``model`` that may be put in another order, in the order of the forward pass.

    The graph is found by `torch.fx` on a copy. What is not understood freezes the units that flow into
    it, and so do inputs and outputs: what is told is right, and may be less than all.

    Raises:
        UnsupportedError: `torch.fx` cannot trace the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [units] = units_of(model)
        >>> units.layer, units.size, units.activations, units.scalable
        ('0', 8, ('relu',), True)
        >>> units.makers, units.readers
        ((Slot(tensor='0.weight', axis=0, block=1, start=0), Slot(tensor='0.bias', axis=0, block=1, start=0)),
         (Slot(tensor='2.weight', axis=1, block=1, start=0),))
    """
    return tuple(_units(group) for group in GraphWalk(trace(model)).groups())


def normalized_layers(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of a convolution or linear layer and the normalization that reads it alone, in forward order.

    Raises:
        UnsupportedError: `torch.fx` cannot trace the model.

    Example:
        >>> normalized_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        (('0', '1'),)
    """
    return tuple(trace(model).normalized())


def _units(group: Group) -> Units:
    def slots(role: str) -> tuple[Slot, ...]:
        return tuple(dict.fromkeys(Slot(*place) for kind, place in group.places if kind == role))

    norms = {norm.module: Norm(norm.module, norm.kind, norm.eps, *norm.tensors, norm.block) for norm in group.norms}
    return Units(
        layer=group.layer,
        size=group.size,
        makers=slots("maker"),
        norms=tuple(norms.values()),
        readers=slots("reader"),
        activations=tuple(group.activations),
        stretches=tuple(_stretch(scaled, norms) for scaled in group.scaled if scaled.free),
        layers=tuple(dict.fromkeys(group.layers)),
        resizable=group.resizable,
    )


def _stretch(scaled: Scaled, norms: dict[str, Norm]) -> Stretch:
    return Stretch(
        sources=tuple(Slot(*place) for place in dict.fromkeys(scaled.sources)),
        readers=tuple(Slot(*place) for place in dict.fromkeys(scaled.readers)),
        norms=tuple(norms[module] for module in dict.fromkeys(scaled.norms)),
        signs=scaled.signs,
    )
