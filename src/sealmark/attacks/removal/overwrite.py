"""Overwriting: the thief embeds a mark of his own in the same way, and hopes that it displaces the owner's."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.embedding import Marked
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.ownership import Watermark
from sealmark.core.task import Recipe
from sealmark.core.training import train, train_task


@dataclass(frozen=True)
class Overwrite(Modification):
    """Fine-tuning that embeds another watermark, under a secret of the thief's own.

    Whether his mark takes does not matter: the model as far as he got is the result. Where it takes, the
    model carries two marks, both valid, and the earlier commitment decides. So report the owner's mark
    and the thief's side by side; `embed` gives the thief's secret as well.

    Args:
        scheme: a watermark; against the owner's own, the thief knows how the model was marked.
        settings: its parameters, where they are not the usual ones: the owner's layer makes a strong
            attack, ``strength`` is the lever.
        epochs: passes over the attacker's rows.
        rate: learning rate, decayed to 0 along half a cosine.
        momentum: of SGD.

    Raises:
        ParameterError: epochs or a rate that are not positive, a momentum outside 0 to 1, or settings
            without names.

    Example:
        >>> Overwrite(settings={"layer": "fc1.weight", "strength": 0.2}).scheme
        'uchida'
    """

    scheme: str = "uchida"
    settings: dict[str, Any] | None = None
    epochs: int = 5
    rate: float = 0.01
    momentum: float = 0.9

    card = AttackCard(
        title="Overwriting by another mark of the same kind",
        citation="Y. Uchida et al., ICMR 2017; T. Wang, F. Kerschbaum, Attacks on Digital Watermarks for Deep "
        "Neural Networks, ICASSP 2019",
        goal="remove a mark, or add one that disputes it",
        knowledge="the weights, the scheme, labeled rows of the task; the layer for the strong form",
        level=1,
        needs_data=True,
        parameters="scheme, settings (its parameters: layer, strength x1 and x10), epochs, rate, momentum",
    )

    def __post_init__(self) -> None:
        named = self.settings is None or isinstance(self.settings, dict)
        if self.epochs < 1 or not self.rate > 0 or not 0 <= self.momentum < 1 or not named:
            raise ParameterError(
                "bad parameters of overwrite",
                expected="epochs >= 1, rate > 0, momentum from 0 to under 1, settings by name",
                found=self.parameters,
            )

    def __hash__(self) -> int:
        return hash((self.scheme, self.epochs, self.rate, self.momentum))  # settings are no part: a dict has none

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            UnsupportedError: the scheme is no watermark.
            UnknownNameError: there is no such scheme, or no such layer.
            ParameterError: the scheme does not know a setting, or does not fit the model.
            MarkFailedError: the training diverged.
        """
        marked, rows = self.embed(copies[0], resources, rng)
        return marked.model, rows

    def embed(self, model: nn.Module, resources: Resources, rng: np.random.Generator) -> tuple[Marked, int]:
        """The model, changed in place, with the thief's own secret, and how many rows went through training."""
        scheme = registry.scheme(self.scheme, **(self.settings or {}))
        if not isinstance(scheme, Watermark):
            raise UnsupportedError("only a watermark overwrites", expected="a watermark", found=self.scheme)
        task = dataclasses.replace(resources.task, owner=resources.rows)
        secret = scheme.keygen(model, task, rng=rng)
        task = scheme.lesson(model, secret, task)
        run = scheme.embedding(model.requires_grad_(True), secret, task, rng)
        report = train(
            model,
            task.owner,
            loss=task.loss,
            recipe=self._recipe(task.recipe, rate=self.rate, momentum=self.momentum),
            rng=rng,
            terms=run.terms,
            extras=run.extras,
            augment=task.augment,
        )
        with contextlib.suppress(MarkFailedError):  # a thief takes what he gets
            secret = run.finish(model)
        return Marked(model.eval(), secret), report.rows

    def scratch(self, resources: Resources, rng: np.random.Generator) -> nn.Module:
        """A fresh model, trained on the same rows for as many epochs, at the task's own rate."""
        recipe = self._recipe(resources.task.recipe)
        return train_task(
            resources.task, rng=rng, rows=resources.rows, recipe=recipe, device=resources.device
        ).eval()

    def _recipe(self, usual: Recipe, **changes: float) -> Recipe:
        return dataclasses.replace(usual, epochs=self.epochs, **changes)  # type: ignore[arg-type]
