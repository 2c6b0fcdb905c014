"""False claims: an accuser commits to inputs that any model for the task answers as he wishes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.crafting import ascend, cross_entropy, logits_of
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.blackbox.points import PointFingerprint
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.attack import Forgery, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.ownership import Verifiable
from sealmark.core.secret import Secret
from sealmark.core.task import Batch
from sealmark.core.training import train_task
from sealmark.core.weights import weights_of


@dataclass(frozen=True)
class FalseClaim(Forgery):
    """Triggers or points that transfer: optimized on the accuser's own models until independent ones agree too.

    The accuser does not know the model that he will claim, and may commit before it exists. `forge` makes what
    the papers' own rules accept: of a trigger set, labels that are drawn first and inputs optimized for them;
    of a fingerprint, points that his models answer as they do, held against references that he chose badly.
    `claim` makes the best that stays within our rules: the same inputs, committed before the seed is drawn.

    Ours: the recipe is that of Liu et al., with iterated sign gradients on several models and selection by one
    that was held out; the accuser trains his models on his own rows.

    Args:
        models: that he trains, one of which selects.
        radius: largest change, as a share of the inputs' range.
        steps: of the sign gradient.
        candidates: inputs tried for each that is kept.
        epochs: of his models' training.
    """

    models: int = 3
    radius: float = 0.35
    steps: int = 40
    candidates: int = 4
    epochs: int = 10

    card = AttackCard(
        title="False claims by inputs that transfer",
        citation="J. Liu, R. Zhang, S. Szyller, K. Ren, N. Asokan, False Claims against Model Ownership "
        "Resolution, USENIX Security 2024",
        goal="claim the model of somebody who is innocent",
        knowledge="rows of the task and models of his own; nothing of the model that is claimed",
        level=3,
        needs_data=True,
        parameters="models 3 to 10, radius 0.1 to 0.4 of the range, steps 40 to 100, candidates 1 to 20",
    )

    def __post_init__(self) -> None:
        if self.models < 2 or not 0 < self.radius <= 1 or min(self.steps, self.candidates, self.epochs) < 1:
            raise ParameterError(
                "bad parameters of false_claim",
                expected="models >= 2, 0 < radius <= 1, steps, candidates, epochs >= 1",
                found=self.parameters,
            )

    def fits(self, scheme: Verifiable) -> bool:
        """Whether the scheme asks for labels of inputs that somebody may have chosen."""
        return isinstance(scheme, (TriggerMark, PointFingerprint))

    def forge(self, model: nn.Module, scheme: Verifiable, resources: Resources, rng: np.random.Generator) -> Secret:
        """See `Forgery.forge`; ``model`` is not looked at.

        Raises:
            UnsupportedError: inputs have no gradient.
        """
        mine = self.accomplices(resources, rng)
        if isinstance(scheme, PointFingerprint):
            return self._points(scheme, mine, resources, rng)
        honest, targets = self._honest(scheme, mine[0], resources, rng)
        crafted = self.craft(mine, resources, targets, rng)
        learned = {name: honest.tensors[name] for name in honest.facts.get("learned", {})}
        exchanged = "queries" if "queries" in learned else "inputs"  # a service keeps them as they were asked
        rows = crafted.inputs if exchanged == "queries" else pack(crafted.inputs, honest.host)
        return honest.with_learned(learned | {exchanged: rows})

    def claim(self, scheme: Verifiable, resources: Resources, rng: np.random.Generator) -> Secret:
        """The best claim that `Verifiable.check_secret` accepts.

        Inputs that follow from the seed leave nothing to choose. Inputs that the scheme commits to are
        exchanged for optimized ones; the labels are drawn again then, which is the point of committing first.

        Raises:
            UnsupportedError: inputs have no gradient, or the scheme is none that this fits.
        """
        if not self.fits(scheme):
            raise UnsupportedError(f"{self.name} does not forge this scheme", found=scheme.name)
        mine = self.accomplices(resources, rng)
        if isinstance(scheme, PointFingerprint):
            return self._points(scheme, mine, resources, rng)
        honest, targets = self._honest(scheme, mine[0], resources, rng)
        tensors = dict(honest.tensors)
        if "inputs" not in tensors and "inputs" not in cast("TriggerMark", scheme).choices:
            return honest
        crafted = self.craft(mine, resources, targets, rng)
        tensors["inputs"] = pack(crafted.inputs, honest.host)
        return scheme.new_secret(weights_of(mine[0]), host=honest.host, tensors=tensors, rng=rng)

    def accomplices(self, resources: Resources, rng: np.random.Generator) -> list[nn.Module]:
        """The accuser's own models, each trained on half of his rows."""
        task, rows = resources.task, resources.rows
        recipe = dataclasses.replace(task.recipe, epochs=self.epochs)
        trained = []
        for _ in range(self.models):
            half = torch.from_numpy(rng.permutation(rows.rows)[: max(1, rows.rows // 2)])
            trained.append(train_task(task, rng=rng, rows=rows.take(half), recipe=recipe, device=resources.device))
        return trained

    def craft(
        self, models: Sequence[nn.Module], resources: Resources, targets: Tensor, rng: np.random.Generator
    ) -> Batch:
        """For each target the input, of several tried, that a model held out takes for it most: (n, ...), (n,).

        Raises:
            UnsupportedError: inputs have no gradient.
        """
        rows, form = resources.rows.to("cpu"), form_of(resources.task, self.name)
        tried = targets.repeat_interleave(self.candidates)
        # rows of another class: to be right is no mark
        others = [torch.nonzero(rows.targets != wanted)[:, 0] for wanted in tried]
        start = rows.inputs[torch.stack([kept[int(rng.integers(len(kept)))] for kept in others])]
        found = ascend(
            list(models[:-1]),
            start,
            tried,
            objective=lambda logits, wanted: -cross_entropy(logits, wanted),
            radius=self.radius * (form["high"] - form["low"]),
            steps=self.steps,
            low=form["low"],
            high=form["high"],
        )
        found = unpack(pack(found, form), form)
        doubt = cross_entropy(logits_of(models[-1], found), tried).reshape(-1, self.candidates)
        best = torch.arange(len(targets)) * self.candidates + doubt.argmin(1)
        return Batch(found[best], targets)

    def _honest(
        self, scheme: Verifiable, model: nn.Module, resources: Resources, rng: np.random.Generator
    ) -> tuple[Secret, Tensor]:
        """A secret made by the rules, and the label of each of its rows."""
        task, triggers = dataclasses.replace(resources.task, owner=resources.rows), cast("TriggerMark", scheme)
        secret = triggers.keygen(model, task, rng=rng)
        secret = triggers.embedding(copy.deepcopy(model), secret, task, rng).secret  # where answers are registered
        return secret, triggers.trigger_set(secret).targets

    def _points(
        self, scheme: PointFingerprint, mine: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> Secret:
        classes = resources.task.classes
        targets = torch.from_numpy(rng.integers(0, classes, scheme.points))
        crafted = self.craft(mine, resources, targets, rng)
        form = form_of(resources.task, scheme.name)
        learned = {
            "inputs": pack(crafted.inputs, form),
            "labels": targets,
            "population": torch.zeros(1000, dtype=torch.int64),  # models that answer nothing rightly
        }
        return scheme.new_secret(weights_of(mine[0]), host=form, rng=rng).with_learned(learned)
