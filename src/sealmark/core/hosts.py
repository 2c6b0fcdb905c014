"""The layer that carries a mark: chosen when the secret is made, found again in a suspect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.suspect import Suspect
from sealmark.core.weights import TensorInfo, TensorMap, weights_of


def choose_host(
    model: nn.Module,
    layer: str,
    *,
    room: Callable[[TensorInfo], int],
    need: int,
    unit: str = "bits",
) -> tuple[str, TensorInfo]:
    """The weight tensor of that name, or the one with the most room, and its form.

    Args:
        model: to be marked; weight tensors are its floating-point tensors of two or more dimensions.
        layer: name of a tensor; empty for the roomiest, of several the last by name.
        room: how much a tensor can carry.
        need: how much shall be carried.
        unit: of both, for messages.

    Raises:
        UnknownNameError: no such weight tensor.
        ParameterError: it has too little room.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> choose_host(model, "", room=lambda info: info.count, need=8)[0]
        '0.weight'
    """
    infos = {k: info for k, info in weights_of(model).info.items() if len(info.shape) >= 2 and info.is_float}
    chosen = layer or max(infos, key=lambda name: (room(infos[name]), name), default="")
    if chosen not in infos:
        raise UnknownNameError("no such weight tensor", expected=f"one of {sorted(infos)}", found=chosen)
    if room(infos[chosen]) < need:
        raise ParameterError(
            f"{chosen} is too small a host",
            expected=f"at most {room(infos[chosen])} {unit}",
            found=need,
            advice=f"pass fewer {unit} or a larger layer",
        )
    return chosen, infos[chosen]


def read_host(suspect: Suspect, layer: str, fits: Callable[[TensorInfo], bool], expected: str) -> Tensor:
    """The weight tensor of that name as the suspect has it: float32 on the CPU.

    Args:
        suspect: shows its weights.
        layer: of `choose_host`.
        fits: whether a form is the one that the mark was put into.
        expected: that form in words.

    Raises:
        ModelMismatchError: no such tensor, or of another form.
    """
    info = suspect.weights.info.get(layer)
    if info is None or not info.is_float or not fits(info):
        raise ModelMismatchError(
            "the suspect has another form",
            expected=f"{layer} with {expected}",
            found=info,
            advice="pass original= to align the suspect, or use a scheme that reads answers",
        )
    return suspect.weights[layer].detach().to("cpu", torch.float32)


def mean_filter(weight: Tensor) -> Tensor:
    """A weight averaged over its outputs: (L, ...) to (M,). The order of the outputs does not matter."""
    return weight.mean(0).reshape(-1)


def filter_length(info: TensorInfo) -> int:
    """M, the length of a weight's `mean_filter`."""
    return info.count // info.shape[0] if info.count else 0


def read_mean_filter(suspect: Suspect, layer: str, length: int) -> Tensor:
    """The mean filter of a layer as the suspect has it: (M,) float32 on the CPU.

    Raises:
        ModelMismatchError: no such tensor, or with filters of another length.
    """
    fits = f"{length} inputs a filter"
    return mean_filter(read_host(suspect, layer, lambda info: filter_length(info) == length, fits))


def without_mean_filter(layer: str) -> TensorMap:
    """For `Verifiable.blind`: the layer less its mean filter, all others as they are."""
    return lambda name, tensor: tensor - tensor.mean(0) if name == layer else tensor
