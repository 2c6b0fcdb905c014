"""A task: how to make the model, what to train it on, how well it does. Any architecture, any loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.errors import ParameterError
from sealmark.core.modes import chunks, evaluating, seeded


class Batch(NamedTuple):
    """Inputs and their targets, row by row: (N, ...) and (N, ...)."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on another device."""
        return Batch(self.inputs.to(device), self.targets.to(device))

    def take(self, rows: Tensor | slice) -> Batch:
        """Some of the rows."""
        return Batch(self.inputs[rows], self.targets[rows])

    def join(self, other: Batch) -> Batch:
        """These rows, then the other's."""
        if other.rows == 0:
            return self
        other = other.to(self.inputs.device)
        return Batch(
            torch.cat([self.inputs, other.inputs.to(self.inputs.dtype)]),
            torch.cat([self.targets, other.targets.to(self.targets.dtype)]),
        )

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.inputs)


Loss = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], float]
Augment = Callable[[Batch, np.random.Generator], Batch]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest output is the target: (N, K) and (N,) to 0 .. 1.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        0.5
    """
    return (outputs.argmax(-1) == targets.to(outputs.device)).double().mean().item()


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows a step.
        rate: learning rate; decayed to 0 along half a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest norm of a gradient, 0 for no limit.
        bfloat16: compute in mixed precision, channels last: about twice as fast on convolutional networks.
    """

    epochs: int = 15
    batch_size: int = 64
    rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 0.0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or self.rate < 0:
            raise ParameterError("bad recipe", expected="epochs >= 0, batch_size >= 1, rate >= 0", found=self)


@dataclass(frozen=True)
class Task:
    """All that training and judging a model needs.

    The three splits are disjoint: the owner's training rows, the attacker's, and the test rows.

    Attributes:
        name: public name.
        make: builds an untrained model.
        owner: the owner's training rows.
        attacker: rows that an attacker has.
        test: rows for judging.
        classes: number of classes, 0 where the task has none.
        loss: (outputs, targets) to a scalar, averaged over rows.
        metric: (outputs, targets) to a number, higher is better.
        chance: the metric of a useless model.
        recipe: how the owner trains.
        augment: changes the rows of a batch at random while training; None for no change.
    """

    name: str
    make: Callable[[], nn.Module]
    owner: Batch
    attacker: Batch
    test: Batch
    classes: int
    loss: Loss = functional.cross_entropy
    metric: Metric = accuracy
    chance: float = 0.0
    recipe: Recipe = field(default_factory=Recipe)
    augment: Augment | None = None

    def model(self, rng: np.random.Generator) -> nn.Module:
        """An untrained model; its initial weights come from ``rng``."""
        with seeded(rng):
            return self.make()

    def score(self, model: nn.Module, rows: Batch | None = None) -> float:
        """The metric of ``model`` on the test rows, or on ``rows``."""
        rows = rows or self.test
        with evaluating(model) as device:
            outputs = torch.cat([model(chunk.to(device)).to("cpu") for chunk in chunks(rows.inputs)])
        return self.metric(outputs, rows.targets)
