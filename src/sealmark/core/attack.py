"""Attacks: what a thief does to a model, what he has for it, and what it costs him."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import nn

from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.task import Batch, Task


@dataclass(frozen=True)
class Resources:
    """What an attacker has besides the model.

    Attributes:
        task: tells him the architecture, the loss and the metric.
        rows: his data; disjoint from the owner's.
        device: where he computes.
    """

    task: Task
    rows: Batch
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, task: Task, share: float = 1.0, *, device: torch.device | str = "cpu") -> Resources:
        """The first ``share`` of the task's attacker rows.

        Raises:
            ParameterError: ``share`` is not in 0 .. 1.
        """
        if not 0 <= share <= 1:
            raise ParameterError("bad share of data", expected="0 to 1", found=share)
        return cls(task, task.attacker.take(slice(0, round(share * task.attacker.rows))), device)


@dataclass(frozen=True)
class Cost:
    """What an attack cost.

    Attributes:
        cpu_seconds: processor time of this process.
        wall_seconds: time on the clock.
        rows: rows of data that the attacker had to have.
        rows_seen: rows that went through training, with repetition.
        copies: models that he had to get hold of.
    """

    cpu_seconds: float
    wall_seconds: float
    rows: int
    rows_seen: int
    copies: int


@dataclass(frozen=True)
class AttackResult:
    """The surrogate model, and what it cost."""

    model: nn.Module
    cost: Cost


@dataclass(frozen=True)
class Attack(ABC):
    """Base of all attacks: a frozen dataclass of hyper-parameters whose subclass writes `modify`.

    The public name is the stem of the file that it stands in.
    """

    card: ClassVar[AttackCard]

    @property
    def name(self) -> str:
        """The public name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters, as plain JSON."""
        return asdict(self)

    @abstractmethod
    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """The surrogate, and how many rows went through training.

        ``copies`` are the attacker's own: changing them in place is fine.
        """

    def scratch(self, resources: Resources, rng: np.random.Generator) -> nn.Module:
        """What the same attacker gets from a random start: an untrained model, for want of training.

        Accuracy after an attack means nothing without it.
        """
        return resources.task.model(rng).to(resources.device)

    @final
    def run(
        self,
        target: nn.Module | Sequence[nn.Module],
        resources: Resources,
        *,
        rng: np.random.Generator,
    ) -> AttackResult:
        """Attack ``target``, a model or the copies of several users; they are left as they are.

        Raises:
            ParameterError: fewer copies than the attack needs, or no data where it needs some.
        """
        models = [target] if isinstance(target, nn.Module) else list(target)
        if len(models) < self.card.copies:
            raise ParameterError(f"{self.name} needs more copies", expected=self.card.copies, found=len(models))
        if self.card.needs_data and resources.rows.rows == 0:
            raise ParameterError(f"{self.name} needs data", expected="at least one row", found=0)
        copies = [copy.deepcopy(model).to(resources.device) for model in models]
        wall, cpu = time.perf_counter(), time.process_time()
        model, rows_seen = self.modify(copies, resources, rng)
        cost = Cost(
            cpu_seconds=time.process_time() - cpu,
            wall_seconds=time.perf_counter() - wall,
            rows=resources.rows.rows if self.card.needs_data else 0,
            rows_seen=rows_seen,
            copies=len(models),
        )
        return AttackResult(model, cost)
