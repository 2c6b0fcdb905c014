"""Query modification: what changes the answer when an autoencoder redraws it is taken for a trigger."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.modes import chunks, evaluating, seeded
from sealmark.core.task import Batch, Recipe
from sealmark.core.training import train, train_task

_SCREENING = 4  # one row of that many sets the threshold


@dataclass(frozen=True)
class QueryModification(Modification):
    """Detect and sanitize queries at serving time; the weights stay as they are.

    An autoencoder g learns the thief's rows. A query x is flagged where the Jensen-Shannon divergence
    between the answers to x and to g(x) exceeds tau, and is then answered as g(x) would be. Tau is the
    quantile of the divergence on clean rows that lets ``false_alarms`` of them be flagged.

    Ours: tau is measured on a quarter of the rows that the autoencoder did not learn, since it redraws
    what it learned too well. The autoencoder is of linear layers, as wide as the input, with ``code``
    numbers in the middle.

    Args:
        false_alarms: share of clean queries that may be flagged.
        code: numbers in the middle of the autoencoder. One that redraws badly flags keys and triggers alike.
        epochs: passes over the rows.

    Raises:
        ParameterError: a share outside 0 to 1, no code or no epochs.

    Example:
        >>> QueryModification(false_alarms=0.05).name
        'query_modification'
    """

    false_alarms: float = 0.1
    code: int = 32
    epochs: int = 200

    card = AttackCard(
        title="Query modification by an autoencoder",
        citation="R. Namba, J. Sakuma, Robust Watermarking of Neural Network with Exponential Weighting, ACM "
        "AsiaCCS 2019",
        goal="find triggers among the queries and answer them as if they were ordinary",
        knowledge="the model, to serve it; unlabeled rows of the task",
        level=2,
        needs_data=True,
        changes_form=True,
        parameters="false_alarms 0.01 to 0.2, code 8 to 64 numbers, epochs of the autoencoder",
    )

    def __post_init__(self) -> None:
        if not 0 < self.false_alarms < 1 or self.code < 1 or self.epochs < 1:
            raise ParameterError(
                "bad parameters of query_modification",
                expected="false_alarms above 0 and below 1, code >= 1, epochs >= 1",
                found=(self.false_alarms, self.code, self.epochs),
            )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            UnsupportedError: the inputs are integers.
            ParameterError: too few rows to learn from and to set the threshold.
        """
        inputs = resources.rows.inputs
        if not inputs.is_floating_point():
            raise UnsupportedError(
                "query_modification redraws inputs that are real numbers",
                expected="floating-point inputs",
                found=inputs.dtype,
                advice="use fine_tune or knockoff",
            )
        if len(inputs) < 2 * _SCREENING:
            raise ParameterError("too few rows", expected=f"at least {2 * _SCREENING}", found=len(inputs))
        shuffled = inputs[torch.from_numpy(rng.permutation(len(inputs)))]
        screening, learning = shuffled[: len(inputs) // _SCREENING], shuffled[len(inputs) // _SCREENING :]
        with seeded(rng):
            redraw = Autoencoder(learning, self.code).to(resources.device)
        report = train(
            redraw,
            Batch(learning, learning),
            loss=lambda drawn, wanted: (drawn - wanted).square().flatten(1).sum(1).mean(),
            recipe=Recipe(self.epochs, batch_size=32, rate=0.05, weight_decay=0, clip=1.0),
            rng=rng,
        )
        served = Sanitized(copies[0], redraw.eval(), 0.0).eval()
        served.tau = torch.quantile(served.divergence(screening), 1 - self.false_alarms).item()
        return served, report.rows

    def scratch(self, resources: Resources, rng: np.random.Generator) -> nn.Module:
        """What he would serve without the stolen model: a fresh one, trained on his rows and their labels."""
        return train_task(resources.task, rng=rng, rows=resources.rows, device=resources.device).eval()


class Sanitized(nn.Module):
    """A model that answers a suspicious query as it would answer its reconstruction.

    Args:
        model: inputs (N, ...) to logits (N, K); its weights are found under ``model.``.
        redraw: an autoencoder of such inputs.
        tau: largest divergence of a query that is answered as it is, in nats.
    """

    def __init__(self, model: nn.Module, redraw: nn.Module, tau: float) -> None:
        super().__init__()
        self.model, self.redraw, self.tau = model, redraw, tau

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K): of the query, or of its reconstruction where that says something else."""
        plain, redrawn = self.model(inputs), self.model(self.redraw(inputs))
        answers: Tensor = torch.where((_divergence(plain, redrawn) > self.tau)[:, None], redrawn, plain)
        return answers

    def divergence(self, inputs: Tensor) -> Tensor:
        """Jensen-Shannon divergence between the answers to inputs (N, ...) and to their reconstructions: (N,)."""
        with evaluating(self) as device:
            parts = [chunk.to(device) for chunk in chunks(inputs)]
            found = [_divergence(self.model(part), self.model(self.redraw(part))).cpu() for part in parts]
        return torch.cat(found)

    def flagged(self, inputs: Tensor) -> Tensor:
        """Which of the inputs (N, ...) are taken for triggers: (N,) bool; the mean is the share flagged."""
        return self.divergence(inputs) > self.tau


class Autoencoder(nn.Module):
    """Linear layers from an input of any shape to a few numbers and back, in the range of the rows.

    Args:
        rows: (N, ...), for their shape and range.
        code: numbers in the middle.
    """

    def __init__(self, rows: Tensor, code: int) -> None:
        super().__init__()
        size = rows[0].numel()
        hidden = max(code, min(512, 2 * size))
        self.limits = (rows.min().item(), rows.max().item())
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((size, hidden, code, hidden, size)):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """The reconstruction: the shape of ``inputs``."""
        low, high = self.limits
        unit = (inputs.flatten(1) - low) / (high - low)
        drawn: Tensor = torch.sigmoid(self.layers(unit)) * (high - low) + low
        return drawn.reshape(inputs.shape)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two rows of logits, in nats: (N, K) and (N, K) to (N,), 0 to ln 2."""
    p, q = torch.log_softmax(one.double(), -1), torch.log_softmax(other.double(), -1)
    middle = torch.logaddexp(p, q) - math.log(2)
    found: Tensor = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    return found
