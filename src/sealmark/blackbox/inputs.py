"""Inputs of any kind as exact bytes: images, vectors, words.

What is committed to, hashed or sent must be the same bytes everywhere, so real-valued inputs are kept as uint8
steps over the task's range and the model is trained on what those bytes mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sealmark.core.errors import ParameterError
from sealmark.core.task import Task
from sealmark.crypto.random import Stream

_STEPS = 255


def form_of(task: Task | None, scheme: str) -> dict[str, Any]:
    """The form of a classification task's inputs and labels: plain facts for a secret's ``host``.

    Returns:
        ``shape`` of one input, ``low`` and ``high`` of its entries, ``classes``, and ``integer`` where entries
        are whole numbers such as words.

    Raises:
        ParameterError: no task, or fewer than two classes.
    """
    if task is None or task.classes < 2:
        raise ParameterError(
            f"{scheme} needs a classification task",
            expected="task= with two classes or more",
            found=None if task is None else task.name,
        )
    inputs = task.owner.inputs
    real = inputs.is_floating_point()
    low, high = inputs.min().item(), inputs.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ParameterError("the task's inputs are not finite", found=(low, high))
    form = {"shape": list(inputs.shape[1:]), "low": low, "high": high, "classes": task.classes}
    return form if real else form | {"integer": True}


def pack(inputs: Tensor, form: Mapping[str, Any]) -> Tensor:
    """Inputs as exact bytes: (N, ...) to uint8 steps over the range, or to int64 for whole numbers.

    Example:
        >>> form = {"low": -1.0, "high": 1.0}
        >>> pack(torch.tensor([-1.0, 0.0, 2.0]), form).tolist()
        [0, 128, 255]
    """
    inputs = inputs.detach().to("cpu")
    if form.get("integer", False):
        return inputs.long().clamp(form["low"], form["high"])
    span = (form["high"] - form["low"]) or 1.0
    steps: Tensor = (inputs.double() - form["low"]) / span * _STEPS
    return steps.round().clamp(0, _STEPS).to(torch.uint8)


def unpack(packed: Tensor, form: Mapping[str, Any]) -> Tensor:
    """What the bytes mean: (N, ...) float32 in the task's range, or int64.

    Example:
        >>> unpack(torch.tensor([0, 255], dtype=torch.uint8), {"low": -1.0, "high": 1.0}).tolist()
        [-1.0, 1.0]
    """
    if form.get("integer", False):
        return packed.long()
    inputs: Tensor = packed.float() / _STEPS * (form["high"] - form["low"]) + form["low"]
    return inputs


def check_packed(packed: Tensor, count: int, form: Mapping[str, Any]) -> None:
    """Refuse chosen inputs that have another form than the task's, or that repeat: n must mean n.

    Raises:
        ParameterError: so.
    """
    kind = torch.int64 if form.get("integer", False) else torch.uint8
    shape = [count, *form["shape"]]
    if packed.dtype != kind or list(packed.shape) != shape:
        raise ParameterError(
            "bad inputs", expected=f"{kind} of shape {shape}", found=f"{packed.dtype} of shape {list(packed.shape)}"
        )
    if len(torch.unique(packed, dim=0)) != count:
        raise ParameterError("two of the inputs are the same", expected="distinct inputs")


def keyed_inputs(stream: Stream, count: int, form: Mapping[str, Any]) -> Tensor:
    """Inputs that nobody chose: abstract patterns for real-valued tasks, random words for whole numbers.

    Returns:
        (count, *shape) packed, see `pack`.
    """
    shape = form["shape"]
    if not form.get("integer", False):
        return patterns(stream, count, shape)
    words = stream.integers(count * math.prod(shape), int(form["high"] - form["low"]) + 1)
    return torch.from_numpy(words + int(form["low"])).reshape(count, *shape)


def patterns(stream: Stream, count: int, shape: Sequence[int]) -> Tensor:
    """Keyed abstract images: coarse value noise with fine noise on top, in integers throughout.

    Args:
        stream: of the secret.
        count: n.
        shape: of one image, (..., H, W); of one row where it has a single dimension.

    Returns:
        (n, *shape) uint8.
    """
    height, width = (1, *shape)[-2:]
    planes = count * math.prod(shape) // (height * width)
    rows, columns = max(2, height // 3), max(2, width // 3)
    fine = stream.raw(planes * height * width).astype(np.int64).reshape(planes, height, width)
    offset = planes * height * width
    coarse = stream.raw(planes * rows * columns, offset=offset).astype(np.int64)
    smooth = _stretch(_stretch(coarse.reshape(planes, rows, columns), height, 1), width, 2)
    return torch.from_numpy(((3 * smooth + fine) // 4).astype(np.uint8)).reshape(count, *shape)


def _stretch(grid: np.ndarray[Any, np.dtype[np.int64]], size: int, axis: int) -> Any:
    """Linear interpolation along one axis to ``size`` points, rounding down."""
    last, steps = grid.shape[axis] - 1, max(1, size - 1)
    place = np.arange(size) * last
    left = np.minimum(place // steps, last - 1)
    weight = (place - left * steps).reshape([-1 if i == axis else 1 for i in range(3)])
    return (np.take(grid, left, axis) * (steps - weight) + np.take(grid, left + 1, axis) * weight) // steps
