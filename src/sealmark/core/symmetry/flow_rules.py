"""How hidden units pass functions: elementwise, pooled, reshaped, added, multiplied.

Every rule returns the value that comes out, or gives up: it freezes the units that came in.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional

from sealmark.core.symmetry.shape_rules import SHAPE_RULES, beside, flatten
from sealmark.core.symmetry.unit_groups import Flow, Op, Rule, Value, flows_in, give_up, meet, parameters_in

if TYPE_CHECKING:
    from sealmark.core.symmetry.tracing import GraphWalk

_LINEAR = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "identity",
        "contiguous",
        "clone",
        "detach",
        "float",
        "double",
        "half",
        "bfloat16",
        "to",
        "type",
        "type_as",
        "cpu",
        "cuda",
        "neg",
        "interpolate",
        "upsample",
    ]
)
_HOMOGENEOUS = frozenset(("relu", "relu_", "leaky_relu", "leaky_relu_", "abs"))
_NONLINEAR = frozenset(
    [
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "tanh",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "elu",
        "selu",
        "celu",
        "softplus",
        "softsign",
        "logsigmoid",
        "exp",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "square",
        "pow",
        "clamp",
        "erf",
        "sin",
        "cos",
        "softmax",
        "log_softmax",
        "sigmoid_",
        "tanh_",
        "tanhshrink",
        "hardshrink",
        "softshrink",
        "threshold",
        "reciprocal",
    ]
)
_SUMS = frozenset(("add", "add_", "iadd", "sub", "sub_", "isub"))
_PRODUCTS = frozenset(("mul", "mul_", "imul", "multiply", "div", "div_", "truediv", "true_divide"))
_POOLS = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)}
# nn.LeakyReLU does what functional.leaky_relu does, and so do the others
_MODULES = {name.replace("_", ""): name for name in (*_LINEAR, *_HOMOGENEOUS, *_NONLINEAR, *_POOLS)}


def module(walk: GraphWalk, name: str, layer: nn.Module, value: Value) -> Any:
    """A module without weights over the units; None when it is not understood."""
    if isinstance(layer, nn.Flatten):
        return flatten(Op(walk, "flatten", (value, layer.start_dim, layer.end_dim)))
    if isinstance(layer, nn.PReLU):
        return _prelu(walk, value, walk.tensor(name, "weight"), layer.num_parameters)
    ours = type(layer).__module__.startswith("torch.nn.")
    known = _MODULES.get(type(layer).__name__.lower(), "") if ours else ""
    if not known or getattr(layer, "return_indices", False):
        return None
    return _RULES[known](Op(walk, known, (value,)))


def activation(walk: GraphWalk, function: Any, value: Value) -> Any:
    """An activation that is held by a layer, as a function or a module."""
    if isinstance(function, nn.Module):
        name = _MODULES.get(type(function).__name__.lower(), "")
    else:
        name = _FUNCTIONS.get(function, "")
    op = Op(walk, name, (value,))
    return _elementwise(op) if name else op.give_up()


def call(walk: GraphWalk, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """A function or a method."""
    target = node.target
    name = target if isinstance(target, str) else _FUNCTIONS.get(target, "")
    rule = _RULES.get(name)
    if rule is None or not args or (name != "cat" and not isinstance(args[0], Value | int | float | tuple)):
        return give_up(walk, args, kwargs)
    return rule(Op(walk, name, args, kwargs))


def _elementwise(op: Op) -> Any:
    value = op.args[0]
    others = [other for other in (*op.args[1:], *op.kwargs.values()) if isinstance(other, Value | tuple | list)]
    resized = op.name in ("interpolate", "upsample") and isinstance(value, Flow)
    if not isinstance(value, Flow) or others or (resized and (value.spread or value.axis != 1 - (value.rank or 0))):
        result = op.give_up()
        return replace(result, rank=value.rank) if isinstance(value, Value) else result
    if op.name in _LINEAR:
        return value
    value.group.root.activations.append(op.name.rstrip("_"))
    value.scaled.root.signs = False
    if op.name not in _HOMOGENEOUS:
        value.scaled.fix()
        return op.walk.onward(value, [])  # what comes after is a stretch without a source: never scaled
    return value


def _pool(op: Op) -> Any:
    value, over = op.args[0], _POOLS[op.name]
    if not isinstance(value, Flow):
        return Value(over + 2)
    if value.axis != -1 - over or value.spread:
        return op.give_up()
    if "avg" not in op.name:
        value.scaled.root.signs = False
    if "lp" in op.name:
        value.scaled.fix()
    return value.at(value.axis, over + 2)


def _prelu(walk: GraphWalk, value: Value, weight: str, count: int) -> Any:
    if not isinstance(value, Flow) or value.spread or value.rank is None:
        walk.freeze_tensors(weight)
        return give_up(walk, (value,), {})
    if count > 1:
        if value.axis != 1 - value.rank or count != value.group.root.size:
            walk.freeze_tensors(weight)
            return give_up(walk, (value,), {})
        walk.use(value, "maker", (weight, 0, 1, 0))
    value.group.root.activations.append("prelu")
    value.scaled.root.signs = False
    value.group.root.resizable = False
    return value


def add(op: Op) -> Any:
    """Sums, differences and products; a product is a gate, through which no scale can be told."""
    product = op.name in _PRODUCTS
    first, *others = op.args
    if not [*flows_in(op.args)] or len(op.args) != 2:
        return op.give_up()
    flows = [*flows_in(op.args)]
    plain = [value for value in (first, *others) if not isinstance(value, Flow)]
    flow = meet(flows)
    if flow is None:
        return Value()
    if len(flows) == 2 and product:
        flow.group.root.activations.append("product")
        flow.scaled.fix()
        return op.walk.onward(flow, [])
    for value in plain:
        if isinstance(value, int | float):
            if not product or (value is first and "div" in op.name):
                flow.scaled.fix()
        elif not isinstance(value, Value) or not value.parameter or not _join(op.walk, flow, value, product):
            return op.give_up()
    return op.walk.onward(flow, []) if product and [*parameters_in(plain)] else flow


def _join(walk: GraphWalk, flow: Flow, value: Value, product: bool) -> bool:
    """A parameter meets the units: indexed by them, or the same for all."""
    count = value.shape[flow.axis] if len(value.shape) >= -flow.axis else 1
    if flow.spread or count not in (1, flow.group.root.size):
        return False
    flow.group.root.resizable = False
    if count > 1:
        place = (value.parameter, len(value.shape) + flow.axis, 1, 0)
        walk.use(flow, "maker", place)
        if not product:
            flow.scaled.root.sources.append(place)
            return True
    flow.scaled.fix()
    return True


def _cat(op: Op) -> Any:
    values = op.args[0]
    dim = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else 0)
    flows = [*flows_in(values)]
    if not flows or not isinstance(dim, int) or not beside(flows[0], dim):
        return op.give_up()
    flow = meet(flows)
    if flow is None:
        return Value()
    for value in values:
        if not isinstance(value, Flow) and not (
            isinstance(value, Value) and value.parameter and _join(op.walk, flow, value, product=False)
        ):
            return op.give_up()
    return flow


def _attend(op: Op) -> Any:
    """Products of queries, keys and values by head: heads stay apart, and keep one order."""
    operands = 3 if op.name == "scaled_dot_product_attention" else 2
    flows = [value for value in op.args[:operands] if isinstance(value, Flow)]
    others = [*flows_in(op.args[operands:], op.kwargs)]
    alike = len(flows) == operands and not others and all(flow.axis <= -3 and not flow.spread for flow in flows)
    flow = meet(flows) if alike else None
    mask = [value for value in (*op.args[operands:], *op.kwargs.values()) if isinstance(value, Value)]
    if flow is None or mask:
        return op.give_up()
    flow.scaled.fix()
    return op.walk.onward(flow, [])


def _functional(op: Op) -> Any:
    """``linear`` with a weight of the model's: the tied output layer of a language model."""
    value, weight = op.args[0], op.args[1] if len(op.args) in (2, 3) else None
    if op.kwargs or not isinstance(weight, Value) or not weight.parameter or len(weight.shape) != 2:
        return op.give_up()
    bias = [extra.parameter for extra in op.args[2:] if isinstance(extra, Value) and extra.parameter]
    if len(bias) != len([extra for extra in op.args[2:] if extra is not None]):
        return op.give_up()
    layer = weight.parameter.rpartition(".")[0]
    op.walk.read(value, weight.parameter, 1, weight.shape[1], at=-1, layer=layer)
    places = [(tensor, 0, 1, 0) for tensor in (weight.parameter, *bias)]
    flow = op.walk.born(weight.shape[0], places, -1, value.rank, layer)
    flow.group.resizable = False
    for read in flows_in(value):
        read.group.root.resizable = False
    return flow


_RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **dict.fromkeys((*_LINEAR, *_HOMOGENEOUS, *_NONLINEAR), _elementwise),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys((*_SUMS, *_PRODUCTS), add),
    "cat": _cat,
    "concat": _cat,
    "matmul": _attend,
    "bmm": _attend,
    "scaled_dot_product_attention": _attend,
    "linear": _functional,
}


_FUNCTIONS: dict[Any, str] = {
    getattr(space, name): name for space in (torch, functional, operator) for name in _RULES if hasattr(space, name)
}
_FUNCTIONS[getattr] = "getattr"
