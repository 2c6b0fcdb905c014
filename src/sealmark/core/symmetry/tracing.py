"""Walks the graph of a model and follows its hidden units through layers and norms."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from sealmark.core.errors import UnsupportedError
from sealmark.core.symmetry import flow_rules as rules
from sealmark.core.symmetry.unit_groups import Flow, Group, NormUse, Op, Place, Scaled, Value, flows_in, give_up

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Trace:
    """A traced copy of a model: its graph, its modules, and the first name of each tensor."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def normalized(self) -> Iterator[tuple[str, str]]:
        """Pairs (layer, norm) where the norm reads that layer alone and each is called once."""
        calls: dict[str, int] = defaultdict(int)
        for node in self.graph.nodes:
            calls[str(node.target)] += node.op == "call_module"
        for node in self.graph.nodes:
            if node.op != "call_module" or not isinstance(self.modules[node.target], _NORMS):
                continue
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_module":
                continue
            layer = self.modules[str(source.target)]
            if isinstance(layer, _ConvNd | nn.Linear) and calls[str(source.target)] == calls[node.target] == 1:
                yield str(source.target), str(node.target)


def trace(model: nn.Module) -> Trace:
    """Trace a copy of ``model`` as it is evaluated.

    Raises:
        UnsupportedError: the forward function depends on values, or does what `torch.fx` cannot follow.
    """
    twin = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(twin)
    except Exception as error:
        raise UnsupportedError(
            "the graph of the model cannot be traced",
            expected="a forward function that torch.fx.symbolic_trace follows",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            advice="take decisions on values out of forward, or wrap that part by torch.fx.wrap",
        ) from error
    first: dict[object, str] = {}
    names, shapes = {}, {}
    for name, tensor in twin.state_dict().items():
        shapes[name] = tuple(tensor.shape)
        lies = (tensor.data_ptr(), shapes[name], tensor.dtype) if tensor.numel() else name
        names[name] = first.setdefault(lies, name)
    return Trace(graph, dict(twin.named_modules(remove_duplicate=False)), names, shapes)


class GraphWalk:
    """One pass over a graph; `groups` is the result."""

    def __init__(self, traced: Trace) -> None:
        self.trace = traced
        self._groups: list[Group] = []
        self._uses: dict[tuple[str, int], list[tuple[Group, Place]]] = defaultdict(list)
        self._users: dict[str, set[str]] = defaultdict(set)  # tensor: the nodes that use it
        self._frozen: set[str] = set()
        self._node: fx.Node
        values: dict[fx.Node, Any] = {}
        for self._node in traced.graph.nodes:
            values[self._node] = self._visit(self._node, values)

    def groups(self) -> list[Group]:
        """The groups that may move, in forward order."""
        self._settle()
        roots = dict.fromkeys(group.root for group in sorted(self._groups, key=lambda group: group.birth))
        movable = [group for group in roots if not group.frozen and group.size > 1]
        for group in movable:
            group.scaled = list(dict.fromkeys(scaled.root for scaled in group.scaled))
        return [group for group in movable if {role for role, _ in group.places} >= {"maker", "reader"}]

    def _settle(self) -> None:
        """Tensors that several groups or nodes use: one order, or none; and no scale."""
        for uses in self._uses.values():
            first, place = uses[0]
            for group, other in uses[1:]:
                if group.root is first.root:
                    continue
                merged = first.merge(group)
                merged.frozen |= other[2:] != place[2:]
        for group in self._groups:
            if any(place[0] in self._frozen for _, place in group.places):
                group.root.frozen = True
            for scaled in group.scaled:
                places = [*scaled.root.sources, *scaled.root.readers]
                if any(len(self._users[place[0]]) > 1 or place[0] in self._frozen for place in places):
                    scaled.fix()

    # what the rules build with

    def tensor(self, module: str, part: str) -> str:
        """The first name of a module's tensor; "" when it has none."""
        return self.trace.names.get(f"{module}.{part}" if module else part, "")

    def born(self, size: int, places: list[Place], axis: int, rank: int | None, layer: str) -> Flow:
        """New units and the value that holds them."""
        group = Group(layer, size, len(self._groups), layers=[layer])
        self._groups.append(group)
        flow = Flow(rank, group=group, axis=axis, scaled=Scaled())
        group.scaled.append(flow.scaled)
        for place in places:
            self.use(flow, "maker", place)
            flow.scaled.sources.append(place)
        return flow

    def onward(self, flow: Flow, sources: list[Place]) -> Flow:
        """The same units on a new stretch."""
        scaled = Scaled(sources=sources)
        flow.group.root.scaled.append(scaled)
        return Flow(flow.rank, group=flow.group, scaled=scaled, axis=flow.axis, spread=flow.spread)

    def use(self, flow: Flow, role: str, place: Place) -> None:
        """The units of ``flow`` index a tensor there."""
        flow.group.root.places.append((role, place))
        self._uses[place[:2]].append((flow.group, place))
        self._users[place[0]].add(self._node.name)

    def read(self, value: Value, name: str, axis: int, size: int, *, at: int, layer: str) -> None:
        """A weight reads ``value`` along ``axis`` of ``size`` entries; units must lie at axis ``at``."""
        if not isinstance(value, Flow):
            # its order is given from outside, so whoever else indexes this axis stays as it is
            self._uses[(name, axis)].append((Group("", 0, -1, frozen=True), (name, axis, 1, 0)))
            return
        count = value.group.root.size
        fits = size % count == 0 if value.spread else size == count
        if value.axis != at or not fits:
            value.freeze()
            return
        place = (name, axis, size // count, 0)
        self.use(value, "reader", place)
        value.scaled.root.readers.append(place)
        value.group.root.layers.append(layer)

    def freeze_tensors(self, *names: str) -> None:
        """Whatever these tensors are indexed by stays in its order."""
        self._frozen.update(names)

    # the walk

    def _visit(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "get_attr":
            name = self.trace.names.get(str(node.target), "")
            shape = self.trace.shapes.get(name, ())
            return Value(len(shape), parameter=name, shape=shape) if name else Value()
        if node.op == "call_module":
            return self._module(str(node.target), args, kwargs)
        if node.op in ("call_function", "call_method"):
            return rules.call(self, node, args, kwargs)
        return give_up(self, args, kwargs)  # placeholder, output

    def _module(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        module, handled = self.trace.modules[name], None
        if self._plain(name, module):
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Value)
            rule = next((rule for kinds, rule in _MODULES if isinstance(module, kinds)), None)
            if isinstance(module, nn.MultiheadAttention):
                handled = self._attention(name, module, args, kwargs)
            elif alone:
                handled = rule(self, name, module, args[0]) if rule else rules.module(self, name, module, args[0])
        if handled is None:
            self.freeze_tensors(*(self.tensor(name, part) for part in module.state_dict()))
            return give_up(self, args, kwargs)
        return handled

    def _plain(self, name: str, module: nn.Module) -> bool:
        """Whether its parameters are what it computes with: no hook, no parametrization."""
        hooks = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        own = [*module._parameters.items(), *module._buffers.items()]
        kept = all(self.tensor(name, part) for part, tensor in own if tensor is not None)
        return kept and not hooks and not any("parametrizations" in part._modules for part in module.modules())

    def _linear(self, name: str, layer: nn.Linear, value: Value) -> Value:
        weight, bias = self.tensor(name, "weight"), self.tensor(name, "bias")
        self.read(value, weight, 1, layer.in_features, at=-1, layer=name)
        return self.born(layer.out_features, _rows(weight, bias), -1, value.rank, name)

    def _conv(self, name: str, layer: _ConvNd, value: Value) -> Value:
        weight, bias = self.tensor(name, "weight"), self.tensor(name, "bias")
        axis = -1 - len(layer.kernel_size)
        out = int(isinstance(layer, _ConvTransposeNd))  # the axis of the outputs
        if layer.groups == 1:
            self.read(value, weight, 1 - out, layer.in_channels, at=axis, layer=name)
            places = [(weight, out, 1, 0), *_rows(bias)]
            return self.born(layer.out_channels, places, axis, 1 - axis, name)
        alike = isinstance(value, Flow) and value.axis == axis and value.group.root.size == layer.in_channels
        if isinstance(value, Flow) and alike and layer.groups == layer.in_channels == layer.out_channels:
            self.use(value, "maker", (weight, 0, 1, 0))
            value.scaled.root.readers.append((weight, 0, 1, 0))
            value.group.root.layers.append(name)
            following = self.onward(value, _rows(weight, bias))
            for place in _rows(bias):
                self.use(value, "maker", place)
            return following
        self.freeze_tensors(weight, bias)
        return give_up(self, (value,), {})

    def _embedding(self, name: str, layer: nn.Embedding, value: Value) -> Value:
        rank = None if value.rank is None else value.rank + 1
        weight = self.tensor(name, "weight")
        self.read(Value(), weight, 0, layer.num_embeddings, at=-1, layer=name)
        flow = self.born(layer.embedding_dim, [(weight, 1, 1, 0)], -1, rank, name)
        if layer.max_norm is not None:  # rows are shrunk by their norm when they are looked up
            flow.scaled.fix()
        return flow

    def _norm(self, name: str, norm: Any, value: Value) -> Value:
        weight, bias, mean, var = (self.tensor(name, part) for part in _NORM_TENSORS)
        tensors = (weight, bias, mean, var)
        kind = next(kind for types, kind in _KINDS if isinstance(norm, types))
        size = math.prod(norm.normalized_shape[:1]) if kind == "layer" else _channels(norm)
        if not isinstance(value, Flow):
            self.freeze_tensors(*tensors)
            return Value(value.rank)
        group = value.group.root
        block = size // group.size if value.spread else 1
        axis = -len(norm.normalized_shape) if kind == "layer" else -1 if value.rank is None else 1 - value.rank
        together = kind == "group" and norm.num_groups not in (1, size)
        if block * group.size != size or value.axis != axis or together:
            self.freeze_tensors(*tensors)
            return give_up(self, (value,), {})
        if kind == "group" and norm.num_groups == size and not value.spread:
            kind = "instance"
        eps = norm.eps if norm.eps is not None else 0.0
        group.norms.append(NormUse(name, kind, eps, tensors, block))
        group.layers.append(name)
        group.resizable &= kind in ("batch", "instance")
        for tensor in filter(None, tensors):
            self.use(value, "norm", (tensor, 0, block, 0))
        if kind == "batch" and tensors[0] and tensors[2]:
            value.scaled.root.norms.append(name)
        else:
            value.scaled.fix()
        sources: list[Place] = [(tensor, 0, block, 0) for tensor in tensors[:2] if tensor]
        return self.onward(value, sources)

    def _attention(self, name: str, layer: nn.MultiheadAttention, args: Any, kwargs: dict[str, Any]) -> Any:
        """Heads are units inside; the outputs are new units. Queries, keys and values share an order."""
        inputs = [*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
        packed, out = self.tensor(name, "in_proj_weight"), self.tensor(name, "out_proj.weight")
        if not packed or layer.bias_k is not None or len(inputs) != 3:
            self.freeze_tensors(*(self.tensor(name, part) for part in layer.state_dict()))
            return give_up(self, args, kwargs)
        extra = [*args[3:], *(value for key, value in kwargs.items() if key not in ("query", "key", "value"))]
        give_up(self, tuple(extra), {})
        for value in inputs:
            self.read(value, packed, 1, layer.embed_dim, at=-1, layer=name)
        block = layer.head_dim
        starts = [part * layer.embed_dim for part in range(3)]
        inside = [packed, *filter(None, [self.tensor(name, "in_proj_bias")])]
        heads = self.born(layer.num_heads, [(t, 0, block, start) for t in inside for start in starts], -1, 3, name)
        self.use(heads, "reader", (out, 1, block, 0))
        heads.scaled.fix()
        heads.group.resizable = False
        heads.group.frozen = kwargs.get("average_attn_weights") is False  # shows the heads one by one
        for flow in flows_in(inputs):
            flow.group.root.resizable = False
        result = self.born(
            layer.embed_dim, _rows(out, self.tensor(name, "out_proj.bias")), -1, inputs[0].rank, name
        )
        result.group.resizable = False
        return (result, Value())

    def _encoder(self, name: str, encoder: nn.TransformerEncoder, value: Value) -> Value:
        for at, layer in enumerate(encoder.layers):
            value = self._encoder_layer(f"{name}.layers.{at}", layer, value)
        return value if encoder.norm is None else self._norm(f"{name}.norm", encoder.norm, value)

    def _encoder_layer(self, name: str, layer: nn.TransformerEncoderLayer, value: Value) -> Value:
        def plus(value: Value, change: Value) -> Value:
            result: Value = rules.add(Op(self, "add", (value, change)))
            return result

        def attend(value: Value) -> Value:
            result: Value = self._attention(f"{name}.self_attn", layer.self_attn, (value,) * 3, {})[0]
            return result

        def feed(value: Value) -> Value:
            hidden = self._linear(f"{name}.linear1", layer.linear1, value)
            hidden = rules.activation(self, layer.activation, hidden)
            return self._linear(f"{name}.linear2", layer.linear2, hidden)

        norm1, norm2 = (partial(self._norm, f"{name}.{part}", getattr(layer, part)) for part in ("norm1", "norm2"))
        if layer.norm_first:
            value = plus(value, attend(norm1(value)))
            return plus(value, feed(norm2(value)))
        value = norm1(plus(value, attend(value)))
        return norm2(plus(value, feed(value)))


def _rows(*names: str) -> list[Place]:
    return [(name, 0, 1, 0) for name in names if name]


def _channels(norm: Any) -> int:
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_KINDS: tuple[tuple[Any, str], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    ((nn.LayerNorm, nn.RMSNorm), "layer"),
)
_MODULES: tuple[tuple[Any, Any], ...] = (
    (nn.Linear, GraphWalk._linear),
    (_ConvNd, GraphWalk._conv),
    (nn.Embedding, GraphWalk._embedding),
    (_NORMS, GraphWalk._norm),
    (nn.TransformerEncoderLayer, GraphWalk._encoder_layer),
    (nn.TransformerEncoder, GraphWalk._encoder),
)
