"""Models and their weight files: an architecture from a task or a module, weights from safetensors."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.modes import seeded
from sealmark.core.symmetry.rewriting import resize as widen
from sealmark.core.weights import Weights, weights_of


def build_model(reference: str, *, rng: np.random.Generator) -> nn.Module:
    """An untrained model from ``package.module:factory``, which is imported and called without arguments.

    Importing runs the module's code: pass references that you trust. Modules in the current folder are
    found too.

    Args:
        reference: as ``torchvision.models:resnet18``.
        rng: decides the initial weights.

    Raises:
        ParameterError: not of this form, or the factory gives no model.
        UnknownNameError: no such module, or no such name in it.

    Example:
        >>> build_model("torch.nn:Flatten", rng=np.random.default_rng(0))
        Flatten(start_dim=1, end_dim=-1)
    """
    factory = imported(reference)
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise ParameterError(
            f"cannot call {reference}",
            expected="a function or class that takes no arguments",
            found=error,
            advice="write a function in a module of your own that builds the model",
        ) from None
    with seeded(rng):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ParameterError(f"{reference} gives no model", expected="an nn.Module", found=type(model).__name__)
    return model


def load_weights(model: nn.Module, source: Weights | Path | str, *, resize: bool = False) -> None:
    """Put stored weights into ``model``, in place; every tensor must be there and none besides.

    Floating-point types may differ (a model leaked in bfloat16 is still that model): values are converted
    to the model's. Of tied tensors the file may hold one or all.

    Args:
        model: on any device; it is changed only when everything fits.
        source: a safetensors file, a sharded folder, or weights.
        resize: give layers the widths that the weights have, where these differ (sealed or padded models).

    Raises:
        ParameterError: nothing is there.
        FormatError: not sound safetensors.
        ModelMismatchError: tensors are missing, left over, of another form, or tied ones differ.
    """
    weights = weights_of(source)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    groups = _tied(state)
    missing = sorted(names[0] for names in groups if not any(name in weights.info for name in names))
    unexpected = sorted(set(weights.info) - set(state))
    if missing or unexpected:
        raise ModelMismatchError(
            "the weights are not those of this model",
            expected=_some(missing) or "no other tensors",
            found=_some(unexpected) or "none of them",
            advice="check that --task or --model names the architecture that these weights belong to",
        )
    for name, info in weights.info.items():
        if resize and info.shape != tuple(state[name].shape) and len(info.shape) == state[name].dim():
            widen(model, name, state[name].new_empty(info.shape))
            state[name] = model.state_dict()[name]
    for name in weights.info:
        _check_form(name, weights, state[name])
    for names in groups:
        _check_tied([name for name in names if name in weights.info], weights)
    with torch.no_grad():
        for names in groups:
            name = next(name for name in names if name in weights.info)
            state[name].copy_(weights[name])


def imported(reference: str) -> Callable[[], Any]:
    """The function or class that ``package.module:name`` names; importing runs the module's code.

    Raises:
        ParameterError: not of this form.
        UnknownNameError: no such module, or no such name in it.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ParameterError("bad reference", expected="package.module:factory", found=repr(reference))
    try:
        with _current_folder():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownNameError(
            f"no module {error.name}",
            found=reference,
            advice="install it, or run from the folder that it is in",
        ) from None
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if factory is None:
        known = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise UnknownNameError(f"no {name} in {module_name}", expected=_some(known), found=name)
    return factory


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let an import look into the current folder too, after everything that is installed."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _tied(state: dict[str, Tensor]) -> list[list[str]]:
    """Names that share memory, group by group; the groups in the order of the state."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _check_form(name: str, weights: Weights, tensor: Tensor) -> None:
    info = weights.info[name]
    fits = info.dtype == tensor.dtype or (info.is_float and tensor.is_floating_point())
    if info.shape != tuple(tensor.shape) or not fits:
        raise ModelMismatchError(
            f"tensor {name!r} has another form",
            expected=f"{tuple(tensor.shape)} {tensor.dtype}",
            found=f"{info.shape} {info.dtype}",
        )


def _check_tied(names: list[str], weights: Weights) -> None:
    for name in names[1:]:
        if not torch.equal(weights[name], weights[names[0]]):
            raise ModelMismatchError(
                f"tensors {names[0]!r} and {name!r} differ", expected="one tensor, as the model ties them"
            )


def _some(names: list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
