"""Fingerprint forgery: an outsider shows rows that shall pass for a credential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sealmark.attacks.ambiguity._climbing import Aim, climb
from sealmark.core.attack import Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.impersonation import Impersonation, Spoils
from sealmark.core.task import Batch


@dataclass(frozen=True)
class FingerprintForgery(Impersonation):
    """Noise, rows of the task, or rows that climb to a class by the service's answers.

    A served model takes many inputs for a credential's that nobody was issued: that is its own rule, and
    what this attack goes for. Nothing in the answers depends on what is drawn for a user, so no search
    among them comes nearer to a user than chance does.

    ``search`` starts from rows of other classes and climbs to ``confidence`` in one class: in the additional
    one, where the service answers more classes than the task has; else in any.

    Args:
        strategy: ``noise`` (uniform in the range of his rows), ``natural`` (his rows) or ``search``.
        images: rows to show.
        queries: budget of ``search``, for all rows together.
        confidence: what ``search`` aims at.

    Raises:
        ParameterError: another strategy, no images, fewer queries than 1 + images, or a confidence outside 0 to 1.
    """

    strategy: Literal["noise", "natural", "search"] = "noise"
    images: int = 10
    queries: int = 2000
    confidence: float = 0.6

    card = AttackCard(
        title="Forged fingerprints: noise, natural rows, or a search by answers",
        citation="M. Xue, Z. Wu, C. He, J. Wang, W. Liu, Active DNN IP Protection: A Novel User Fingerprint "
        "Management and DNN Authorization Control Technique, TrustCom 2020 (forged fingerprints)",
        goal="be served without a credential",
        knowledge="rows of the task, and the service's probabilities; no credential",
        level=3,
        needs_data=True,
        copies=0,
        parameters="strategy noise, natural or search; images 1 to 50; queries 500 to 10,000; confidence 0.5 to 1",
    )

    def __post_init__(self) -> None:
        known = self.strategy in ("noise", "natural", "search")
        if not known or self.images < 1 or self.queries <= self.images or not 0 <= self.confidence <= 1:
            raise ParameterError(
                "bad parameters of fingerprint_forgery",
                expected="strategy noise, natural or search, images >= 1, queries > images, confidence in 0 to 1",
                found=self.parameters,
            )

    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        """See `Impersonation.pretend`.

        Raises:
            UnsupportedError: a search among inputs that are whole numbers, such as words.
        """
        rows = resources.rows.to("cpu")
        if self.strategy == "noise":
            return self._noise(rows.inputs, rng)
        if self.strategy == "natural":
            return self._some(rows.inputs, rng)
        classes = spoils.service.probabilities(rows.inputs[:1]).shape[1]
        label = classes - 1 if classes > resources.task.classes else int(rng.integers(classes))
        start = self._some(_others(rows, label), rng)
        return climb(spoils.service, start, Aim(label, self.confidence), queries=self.queries - 1, rng=rng)

    def _noise(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        shape, low, high = (self.images, *inputs.shape[1:]), inputs.min().item(), inputs.max().item()
        if inputs.is_floating_point():
            return torch.from_numpy(rng.uniform(low, high, shape)).to(inputs.dtype)
        return torch.from_numpy(rng.integers(int(low), int(high), shape, endpoint=True)).to(inputs.dtype)

    def _some(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """So many of them, each once while there are enough."""
        order = rng.permutation(len(inputs))
        return inputs[torch.from_numpy(np.resize(order, self.images))]


def _others(rows: Batch, label: int) -> Tensor:
    """Inputs of other classes, where there are any: of the wanted class, many would be there already."""
    other = rows.inputs[rows.targets != label] if rows.targets.shape == rows.inputs.shape[:1] else rows.inputs[:0]
    return other if len(other) else rows.inputs
