"""Inputs made with a model's gradients: adversarial examples and their kin, in one place.

Crafting runs in evaluation mode, leaves the model's own gradients alone and stays in the task's range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.errors import UnsupportedError
from sealmark.core.modes import chunks, device_of

Objective = Callable[[Tensor, Tensor], Tensor]  # (logits (N, K), targets (N, ...)) to one number a row (N,)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row: (N, K) and (N,) to (N,)."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


@contextlib.contextmanager
def frozen(models: nn.Module | Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Evaluation mode and no gradients for weights; inputs may have them. Everything is put back."""
    listed = [models] if isinstance(models, nn.Module) else list(models)
    modes = {module: module.training for model in listed for module in model.modules()}
    wanted = [p for model in listed for p in model.parameters() if p.requires_grad]
    for model in listed:
        model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield listed
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model answers in evaluation mode, without gradients: (N, ...) to (N, K) on the CPU."""
    with frozen(model), torch.no_grad():
        return torch.cat([model(chunk.to(device_of(model))).to("cpu").float() for chunk in chunks(inputs)])


def ascend(
    models: nn.Module | Sequence[nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    objective: Objective = cross_entropy,
    radius: float,
    steps: int,
    step: float | None = None,
    low: float,
    high: float,
    start: Tensor | None = None,
) -> Tensor:
    """Inputs near ``inputs`` at which an objective is large: sign-gradient steps, projected (PGD).

    One step of size ``radius`` is the fast gradient sign method. For targeted examples pass an objective that
    is large where the target is likely: ``lambda logits, t: -cross_entropy(logits, t)``.

    Args:
        models: one, or several whose objectives are averaged; any devices.
        inputs: (N, ...) real.
        targets: (N, ...) what the objective compares with.
        objective: see `Objective`.
        radius: largest change of an entry (l-infinity), in units of the inputs.
        steps: how many.
        step: size of one; by default 2.5 * radius / steps.
        low: smallest entry allowed.
        high: largest.
        start: (N, ...) where to begin; at the inputs without.

    Returns:
        (N, ...) on the CPU.

    Raises:
        UnsupportedError: inputs are whole numbers, which have no gradient.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> ascend(model, torch.zeros(1, 2), torch.tensor([0]), radius=0.5, steps=1, step=0.5, low=-1, high=1)
        tensor([[-0.5000,  0.5000]])
    """
    require_real(inputs)
    size = 2.5 * radius / steps if step is None else step
    done = []
    with frozen(models) as listed:
        for rows in chunks(torch.arange(len(inputs))):
            origin, wanted = inputs[rows].detach(), targets[rows]
            found = origin.clone() if start is None else start[rows].detach().clone()
            for _ in range(steps):
                slope = _slope(listed, found, wanted, objective)
                moved = (found + size * slope.sign() - origin).clamp(-radius, radius)
                found = (origin + moved).clamp(low, high)
            done.append(found.to("cpu"))
    return torch.cat(done)


def _slope(models: list[nn.Module], inputs: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    total: Any = torch.zeros_like(inputs)
    for model in models:
        device = device_of(model)
        leaf = inputs.to(device).detach().requires_grad_(True)
        value = objective(model(leaf), targets.to(device)).sum()
        total = total + torch.autograd.grad(value, leaf)[0].to(inputs.device) / len(models)
    slope: Tensor = total
    return slope


def require_real(inputs: Tensor) -> None:
    """Refuse inputs without gradients.

    Raises:
        UnsupportedError: they are whole numbers, such as words.
    """
    if not inputs.is_floating_point():
        raise UnsupportedError(
            "crafting follows the gradient of inputs",
            expected="real-valued inputs",
            found=str(inputs.dtype),
            advice="use hash_chain with objective=plain",
        )
