"""How hidden units pass functions that change shapes: reductions, views, heads, indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sealmark.core.symmetry.unit_groups import Flow, Op, Rule, Value, flows_in


def beside(flow: Flow, dim: int) -> bool:
    """Whether ``dim`` is another axis than that of the units.

    Without a known rank, units on the last axis are taken to be there because more axes stand before
    them; if not, what comes out no longer has their number and no layer that reads them fits it.
    """
    if dim < 0:
        return dim != flow.axis
    return flow.axis == -1 if flow.rank is None else dim - flow.rank != flow.axis


def _reduce(op: Op) -> Any:
    value = op.args[0]
    dims = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
    keep = op.kwargs.get("keepdim", op.args[2] if len(op.args) > 2 else False)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(value, Flow) or not dims or not all(beside(value, dim) for dim in dims):
        return op.give_up()
    if op.name not in ("mean", "sum"):
        value.scaled.root.signs = False
    if keep:
        return value
    after = sum(value.axis < (dim if dim < 0 else dim - (value.rank or 0)) for dim in dims if value.rank or dim < 0)
    rank = None if value.rank is None else value.rank - len(dims)
    return value.at(value.axis + after, rank, spread=value.spread)


def flatten(op: Op) -> Any:
    """Units and what lies behind them become one axis: blocks of features."""
    value = op.args[0]
    start = op.kwargs.get("start_dim", op.args[1] if len(op.args) > 1 else 0)
    end = op.kwargs.get("end_dim", op.args[2] if len(op.args) > 2 else -1)
    if not isinstance(value, Flow):
        return Value(start + 1 if end == -1 and start >= 0 else None)
    rank = value.rank
    if value.spread or (rank is None and (value.axis, end) != (-1, -1)):
        return op.give_up()
    if rank is None:  # one axis to flatten, or the reader will not fit
        return value.at(-1, start + 1) if start > 0 else op.give_up()
    start, end, axis = start % rank, end % rank, rank + value.axis
    left = rank - (end - start)
    if axis < start or axis > end:
        return value.at(value.axis if axis > end else axis - left, left)
    if axis > start:
        return op.give_up()
    return value.at(start - left, left, spread=end > start)


def _reshape(op: Op) -> Any:
    """``view`` and ``reshape``: all but the batch into one, heads out of the last axis, or heads merged."""
    value = op.args[0]
    sizes = op.args[1] if len(op.args) == 2 and isinstance(op.args[1], list | tuple) else op.args[1:]
    if not isinstance(value, Flow):
        return replace(op.give_up(), rank=len(sizes))
    *before, last = sizes
    written = any(isinstance(size, int) and size > 1 for size in sizes)
    kept = [size.sized == ("size", at) if isinstance(size, Value) else False for at, size in enumerate(sizes)]
    rank, batch = value.rank, kept[:1] == [True] or (sizes[0] == -1 and isinstance(last, int) and last > 0)
    group = value.group.root
    result: Value | None = None
    if len(sizes) == 2 and batch and rank is not None and value.axis == 1 - rank and not value.spread:
        result = value.at(-1, 2, spread=rank > 2)
    elif len(sizes) == 2 and batch and value.axis == -1 and rank is None:
        result = value.at(-1, 2)
    elif _splits_heads(value, sizes) and all(kept[:-2]):
        heads = sizes[-2] if isinstance(sizes[-2], int) and sizes[-2] > 0 else group.size // last
        group.coarsen(heads)
        result = value.at(-2, len(sizes))
    elif rank is not None and value.axis == -2 and len(before) == rank - 2 and all(kept[: len(before)]):
        result = value.at(-1, rank - 1, spread=True)
    if result is None:
        return op.give_up()
    group.resizable &= not written
    return result


def _splits_heads(value: Flow, sizes: Sequence[Any]) -> bool:
    """Whether the last axis becomes (heads, width)."""
    if value.axis != -1 or value.spread or len(sizes) < 3:
        return False
    size, heads, width = value.group.root.size, *sizes[-2:]
    if isinstance(heads, int) and heads > 0:
        return size % heads == 0 and (width in (size // heads, -1) or isinstance(width, Value))
    return isinstance(width, int) and width > 0 and size % width == 0


def _transpose(op: Op) -> Any:
    value, dims = (
        op.args[0],
        op.args[1] if len(op.args) == 2 and isinstance(op.args[1], list | tuple) else op.args[1:],
    )
    if not isinstance(value, Flow):
        return Value(value.rank)
    rank = value.rank
    fixed = all(isinstance(dim, int) for dim in dims) and not op.kwargs and not value.spread
    if not fixed or (rank is None and (op.name == "permute" or min(dims) >= 0 or max(dims) >= 0)):
        return op.give_up()
    below = [dim if dim < 0 else dim - (rank or 0) for dim in dims]
    if op.name == "permute":
        return value.at(below.index(value.axis) - len(below), rank)
    swap = {below[0]: below[1], below[1]: below[0]}
    return value.at(swap.get(value.axis, value.axis), rank)


def _sizes(op: Op) -> Value:
    if len(op.args) == 2 and isinstance(op.args[1], int):
        return Value(sized=("size", op.args[1]))
    return Value(sized=("shape", 0) if len(op.args) == 1 else None)


def _getattr(op: Op) -> Any:
    return Value(sized=("shape", 0)) if op.args[1] in ("shape", "device", "dtype") else op.give_up()


def _getitem(op: Op) -> Any:
    value, index = op.args
    if isinstance(value, tuple):
        return value[index] if isinstance(index, int) else op.give_up()
    if isinstance(value, Value) and value.sized:
        return Value(sized=("size", index)) if value.sized[0] == "shape" and isinstance(index, int) else Value()
    index = index if isinstance(index, tuple) else (index,)
    if isinstance(value, Value) and value.parameter and len(index) <= len(value.shape):
        return _part(op, value, index)
    if not isinstance(value, Flow) or not all(isinstance(part, int | slice) for part in index):
        return op.give_up()
    at = len(index) if value.rank is None else value.rank + value.axis  # see `_beside`
    mine = index[at] if at < len(index) else slice(None)
    if mine != slice(None) or (value.rank is None and value.axis != -1) or [*flows_in(_bounds(index))]:
        return op.give_up()
    gone = [isinstance(part, int) for part in index]
    return value.at(value.axis + sum(gone[at + 1 :]), None if value.rank is None else value.rank - sum(gone))


def _part(op: Op, value: Value, index: tuple[Any, ...]) -> Value:
    """Some rows of a parameter, as of a table of positions; the axes that were cut have no known size."""
    if not all(isinstance(part, slice) for part in index) or [*flows_in(_bounds(index))]:
        return op.give_up()
    sizes = [size if part == slice(None) else -1 for size, part in zip(value.shape, index, strict=False)]
    return replace(value, shape=(*sizes, *value.shape[len(index) :]))


def _bounds(index: tuple[Any, ...]) -> list[Any]:
    return [[part.start, part.stop] for part in index if isinstance(part, slice)]


def _expand(op: Op) -> Any:
    value, *sizes = op.args
    same = isinstance(value, Value) and value.parameter and len(sizes) == len(value.shape) and sizes[-1] == -1
    if same and value.shape[0] == 1 and all(size == -1 for size in sizes[1:]):
        return value  # one row of the batch each, as a class token
    return op.give_up()


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("size", "dim", "device", "dtype", "numel", "ndim"), _sizes),
    "flatten": flatten,
    "view": _reshape,
    "reshape": _reshape,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _transpose,
    "getattr": _getattr,
    "getitem": _getitem,
    "expand": _expand,
}
