"""Where and how a model runs: devices, evaluation mode, seeded randomness of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.errors import ParameterError


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` takes CUDA where it is there.

    Raises:
        ParameterError: not ``auto``, ``cpu`` or ``cuda[:n]``, or no CUDA on this machine.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ParameterError("unknown device", expected="auto, cpu, cuda or cuda:N", found=name) from None
    if device.type not in ("cpu", "cuda"):
        raise ParameterError("unknown device", expected="auto, cpu, cuda or cuda:N", found=name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            "no such device here", expected="cpu", found=name, advice="use --device auto or --device cpu"
        )
    return device


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; every submodule gets its own mode back. Yields the device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Let code that draws from torch's global generator draw from ``rng``; restore it afterwards.

    Layer initialisation and dropout know no other generator. This is the one place that touches it.
    """
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(int(rng.integers(2**63)))
        yield


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A torch generator on the CPU, seeded from ``rng``."""
    return torch.Generator().manual_seed(int(rng.integers(2**63)))


def chunks(rows: Tensor, size: int = 512) -> Iterator[Tensor]:
    """Consecutive slices of at most ``size`` rows; one empty slice where there are none."""
    for start in range(0, max(1, len(rows)), size):
        yield rows[start : start + size]
