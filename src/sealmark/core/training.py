"""One training loop for all: tasks, embedding, attacks.

A scheme contributes a loss term and rows that are trained on beside each batch; nothing here knows
which scheme it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.modes import chunks, device_of, seeded, torch_generator
from sealmark.core.task import Augment, Batch, Loss, Recipe, Task

Term = Callable[[nn.Module, Batch], Tensor]  # a scalar that is added to the task's loss
Extra = Callable[[Batch, np.random.Generator], Batch]  # rows that are trained on beside a batch
OnEpoch = Callable[[int, int, float], None]  # epoch (from 1), epochs, mean loss


@dataclass(frozen=True)
class TrainingReport:
    """What a training run cost and came to.

    Attributes:
        losses: mean loss of each epoch.
        rows: rows seen, extra ones included.
        steps: gradient steps.
        seconds: wall time.
    """

    losses: list[float] = field(default_factory=list)
    rows: int = 0
    steps: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    rows: Batch,
    *,
    loss: Loss,
    recipe: Recipe,
    rng: np.random.Generator,
    terms: Sequence[Term] = (),
    extras: Sequence[Extra] = (),
    parameters: Sequence[nn.Parameter] | None = None,
    augment: Augment | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainingReport:
    """Train ``model`` in place, on the device where it is.

    Args:
        model: left in training mode.
        rows: what to train on.
        loss: of the task.
        recipe: epochs, batch size, rate; SGD with momentum and a cosine decay.
        rng: order of rows, dropout and extras; the same state gives the same model on one machine.
        terms: added to the loss at each step; they see the batch without the extra rows.
        extras: rows appended to each batch.
        parameters: which to train; all by default.
        augment: changes each batch at random, before extra rows join it.
        on_epoch: progress.

    Raises:
        ParameterError: there are no rows.
        MarkFailedError: the loss became NaN or infinite.
    """
    if rows.rows == 0:
        raise ParameterError("nothing to train on", expected="at least one row", found=0)
    began = time.perf_counter()
    device, rows_on = device_of(model), rows.to(device_of(model))
    trained = list(model.parameters()) if parameters is None else list(parameters)
    optimizer = torch.optim.SGD(
        trained,
        lr=recipe.rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    per_epoch = math.ceil(rows.rows / recipe.batch_size)
    total = max(1, recipe.epochs * per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / total))
    order, losses, seen = torch_generator(rng), [], 0
    model.train()
    with seeded(rng):
        for epoch in range(recipe.epochs):
            sums = torch.zeros((), device=device)
            shuffled = torch.randperm(rows.rows, generator=order).to(device)
            for chunk in chunks(shuffled, recipe.batch_size):
                own = rows_on.take(chunk)
                batch = own = augment(own, rng) if augment else own
                for extra in extras:
                    batch = batch.join(extra(own, rng))  # never another's extra rows
                with _precision(recipe, device):
                    outputs = model(_laid_out(batch.inputs, recipe))
                value = loss(outputs.float() if recipe.bfloat16 else outputs, batch.targets)
                for term in terms:  # in full precision: a mark's term can be small
                    value = value + term(model, own)
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                if recipe.clip:
                    nn.utils.clip_grad_norm_(trained, recipe.clip)
                optimizer.step()
                schedule.step()
                sums += value.detach()
                seen += batch.rows
            losses.append(sums.item() / per_epoch)
            if not math.isfinite(losses[-1]):
                raise MarkFailedError(
                    "training diverged", found=f"loss {losses[-1]}", advice="lower the rate or the strength"
                )
            if on_epoch:
                on_epoch(epoch + 1, recipe.epochs, losses[-1])
    return TrainingReport(losses, seen, recipe.epochs * per_epoch, time.perf_counter() - began)


def _precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16)


def _laid_out(inputs: Tensor, recipe: Recipe) -> Tensor:
    fast = recipe.bfloat16 and inputs.ndim == 4
    return inputs.contiguous(memory_format=torch.channels_last) if fast else inputs


def train_task(
    task: Task,
    *,
    rng: np.random.Generator,
    rows: Batch | None = None,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> nn.Module:
    """A fresh model of the task, trained as its owner does, or on ``rows`` by ``recipe``."""
    model = task.model(rng).to(device)
    train(
        model,
        rows or task.owner,
        loss=task.loss,
        recipe=recipe or task.recipe,
        rng=rng,
        augment=task.augment,
        on_epoch=on_epoch,
    )
    return model
