"""Groups of hidden units while they are being found: merged as values meet, frozen when in doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sealmark.core.symmetry.tracing import GraphWalk

Place = tuple[str, int, int, int]  # (tensor, axis, block, start), the fields of a slot


@dataclass(eq=False)
class NormUse:
    """A normalization that a group passes; ``tensors`` are weight, bias, mean and variance, or ""."""

    module: str
    kind: str
    eps: float
    tensors: tuple[str, str, str, str]
    block: int


@dataclass(eq=False)
class Scaled:
    """A stretch of the way with one scale a unit; ``free`` while a positive factor may be chosen."""

    sources: list[Place] = field(default_factory=list)
    readers: list[Place] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    positive: bool = True
    signs: bool = True
    into: Scaled | None = None

    @property
    def root(self) -> Scaled:
        """What it was merged into."""
        return self if self.into is None else self.into.root

    @property
    def free(self) -> bool:
        """Whether there is something to scale and something that takes it up."""
        return self.positive and bool(self.sources) and bool(self.readers or self.norms)

    def fix(self) -> None:
        """No factor but 1 leaves the function as it is."""
        root = self.root
        root.positive = root.signs = False

    def merge(self, other: Scaled) -> Scaled:
        """One stretch of two whose values meet."""
        one, two = self.root, other.root
        if one is not two:
            one.sources += two.sources
            one.readers += two.readers
            one.norms += two.norms
            one.positive &= two.positive
            one.signs &= two.signs
            two.into = one
        return one


@dataclass(eq=False)
class Group:
    """Units that must keep one order together."""

    layer: str
    size: int
    birth: int  # when in the forward pass
    places: list[tuple[str, Place]] = field(default_factory=list)  # (maker, norm or reader; place)
    norms: list[NormUse] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    scaled: list[Scaled] = field(default_factory=list)
    frozen: bool = False
    resizable: bool = True
    into: Group | None = None

    @property
    def root(self) -> Group:
        """What it was merged into."""
        return self if self.into is None else self.into.root

    def merge(self, other: Group) -> Group:
        """One group of two whose values meet; frozen when they do not fit."""
        one, two = sorted((self.root, other.root), key=lambda group: group.birth)
        if one is two:
            return one
        one.places += two.places
        one.norms += two.norms
        one.activations += two.activations
        one.layers += two.layers
        one.scaled += two.scaled
        one.frozen |= two.frozen or one.size != two.size
        one.resizable &= two.resizable
        two.into = one
        return one

    def coarsen(self, size: int) -> None:
        """Move whole blocks from now on: ``size`` of them, as attention heads."""
        group = self.root
        factor = group.size // size

        def wider(place: Place) -> Place:
            return (place[0], place[1], place[2] * factor, place[3])

        group.places = [(role, wider(place)) for role, place in group.places]
        for norm in group.norms:
            norm.block *= factor
        for scaled in group.scaled:
            scaled.fix()
        group.size, group.resizable = size, False


@dataclass(frozen=True)
class Value:
    """What is known of an intermediate value; by itself a value without units that could be moved.

    Attributes:
        rank: its number of dimensions, if known.
        sized: for sizes alone: ("shape", 0) or ("size", dimension).
        parameter: for a parameter or buffer: its name.
        shape: the form of that.
    """

    rank: int | None = None
    sized: tuple[str, int] | None = None
    parameter: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flow(Value):
    """A value with units along an axis.

    Attributes:
        group: the units.
        scaled: the stretch that it is on.
        axis: counted from the end, -1 or less.
        spread: each unit is a block of equal, yet unknown, length.
    """

    group: Group = field(default_factory=lambda: Group("", 0, 0))
    scaled: Scaled = field(default_factory=Scaled)
    axis: int = -1
    spread: bool = False

    def at(self, axis: int, rank: int | None, *, spread: bool = False) -> Flow:
        """The same units elsewhere."""
        return replace(self, axis=axis, rank=rank, spread=spread)

    def freeze(self) -> None:
        """Leave the units in their order."""
        self.group.root.frozen = True


def flows_in(*values: Any) -> Iterator[Flow]:
    """All flows in nested arguments."""
    for value in values:
        if isinstance(value, Flow):
            yield value
        elif isinstance(value, list | tuple):
            yield from flows_in(*value)
        elif isinstance(value, dict):
            yield from flows_in(*value.values())


def meet(flows: Iterable[Flow]) -> Flow | None:
    """The units of values that are added: one group, one stretch; None when they do not lie alike."""
    first, *others = flows
    ranks = [flow.rank for flow in (first, *others)]
    rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
    for other in others:
        if (other.axis, other.spread) != (first.axis, first.spread):
            first.freeze()
            other.freeze()
            return None
        first.group.merge(other.group)
        first.scaled.merge(other.scaled)
    return first.at(first.axis, rank, spread=first.spread)


def parameters_in(*values: Any) -> Iterator[str]:
    """Names of all parameters in nested arguments."""
    for value in values:
        if isinstance(value, Value):
            yield from filter(None, [value.parameter])
        elif isinstance(value, list | tuple):
            yield from parameters_in(*value)
        elif isinstance(value, dict):
            yield from parameters_in(*value.values())


def give_up(walk: GraphWalk, args: Any, kwargs: Any) -> Value:
    """Not understood: units and tensors that come in keep their order."""
    for flow in flows_in(args, kwargs):
        flow.freeze()
    walk.freeze_tensors(*parameters_in(args, kwargs))
    return Value()


@dataclass(frozen=True)
class Op:
    """One call in the graph: a name that the rules know, and arguments with values for nodes."""

    walk: GraphWalk
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def give_up(self) -> Value:
        """See `give_up`."""
        return give_up(self.walk, self.args, self.kwargs)


Rule = Callable[[Op], Any]
