"""Fingerprints made of points: inputs near a model's boundaries, which its descendants answer alike.

The model stays as it is. Nothing random here is independent of a suspect: points transfer between models that
were trained for the same task, more or less. So there is no exact law, and the match rate is held against those
of models which have nothing to do with the protected one. They must be at least as like it as any innocent
party's: same data, same architecture.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.crafting import logits_of
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Fingerprint
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.nulls import Population
from sealmark.stats.populations import beta_binomial_log_p


@dataclass(frozen=True)
class PointFingerprint(Fingerprint):
    """Base: write `craft`. Points, labels and the references' match counts are learned parts of the secret.

    What is learned can be learned after the fact, for any model: a fingerprint proves nothing without a
    commitment from before, and even then a malicious accuser can choose points that every model answers alike.
    A judge holds it against models of his own: ``verify(..., population=population_of(...))``.

    Args:
        points: how many are kept at most.

    Attributes:
        rule: match rate at which the paper accuses; told in the details, decides nothing.
        crafts_with_references: whether `craft` looks at references. Half of them are kept from it then, and the
            law comes from those.
    """

    points: int = 50

    access = Access.LABELS
    has_key = False
    rule: ClassVar[float]
    crafts_with_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ParameterError(f"bad parameters of {self.name}", expected="points >= 2", found=self.points)

    @abstractmethod
    def craft(
        self,
        model: nn.Module,
        task: Task,
        secret: Secret,
        references: Sequence[nn.Module],
        rng: np.random.Generator,
    ) -> Batch:
        """Points, best first: inputs (N, ...) in the task's range, labels (N,) that ``model`` gives them.

        Random choices that a judge should be able to check, such as targets, come from ``secret``'s streams.
        """

    def enroll(
        self,
        model: nn.Module | Weights | Path | str,
        task: Task | None = None,
        *,
        references: Sequence[nn.Module | Weights | Path | str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `Fingerprint.enroll`; needs live models, and two references or more.

        Raises:
            MarkFailedError: no points with the wanted property were found.
        """
        model, live = live_models(self.name, model, references)
        form, task = form_of(task, self.name), cast("Task", task)
        rng = np.random.default_rng() if rng is None else rng
        secret = self.new_secret(weights_of(model), host=form, owner=owner, rng=rng)
        shown, kept = (live[0::2], live[1::2]) if self.crafts_with_references else ([], live)
        points = self._as_sent(model, self.craft(model, task, secret, shown, rng), form)
        inputs = unpack(points.inputs, form)
        counts = [int((WhiteBox(other).labels(inputs) == points.targets).sum()) for other in kept]
        learned = {"inputs": points.inputs, "labels": points.targets, "population": torch.tensor(counts)}
        return secret.with_learned(learned)

    def _as_sent(self, model: nn.Module, points: Batch, form: dict[str, object]) -> Batch:
        """The first points whose answer survives rounding to bytes, packed."""
        packed = pack(points.inputs, form)
        same = logits_of(model, unpack(packed, form)).argmax(1) == points.targets
        chosen = torch.nonzero(same)[: self.points, 0]
        if len(chosen) < 2:
            raise MarkFailedError(
                f"{self.name} found too few points",
                expected=f"up to {self.points}, and 2 at least",
                found=len(chosen),
                advice="allow larger changes or more candidates",
            )
        return Batch(packed[chosen], points.targets[chosen])

    def queries(self, secret: Secret) -> Batch:
        """The points as a suspect is asked, (n, ...) in the task's range, and the model's labels, (n,) int64."""
        return Batch(unpack(secret.tensors["inputs"], secret.host), secret.tensors["labels"])

    def claims(self, matches: int, rows: int) -> bool:
        """The paper's own decision: for the record, and for the false claims that it allows."""
        return matches >= self.rule * rows

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching points against those of the references."""
        points = self.queries(secret)
        matches = int((suspect.labels(points.inputs) == points.targets).sum())
        population: list[int] = secret.tensors["population"].tolist()
        details = {
            "points": points.rows,
            "match_rate": matches / points.rows,
            "paper_claims": self.claims(matches, points.rows),
            "references": len(population),
            "largest_reference": max(population) / points.rows,
            "extrapolated_log10_p": beta_binomial_log_p(matches, points.rows, population) / math.log(10),
        }
        return Score(matches, Population.of(population), details)


def live_models(scheme: str, model: object, references: Sequence[object]) -> tuple[nn.Module, list[nn.Module]]:
    """The model and its references, for a fingerprint that asks them.

    Raises:
        ParameterError: one is not live, or there are fewer than two references.
    """
    live = [other for other in references if isinstance(other, nn.Module)]
    if not isinstance(model, nn.Module) or len(live) < max(2, len(references)):
        raise ParameterError(
            f"{scheme} asks the model and unrelated models",
            expected="a live model, and two live references or more",
            found=f"{type(model).__name__} and {len(live)} live of {len(references)} references",
        )
    return model, live


def sources(task: Task, model: nn.Module, count: int, rng: np.random.Generator) -> Batch:
    """Test rows that the model answers rightly, in random order: where points begin.

    Test rows, because points that start from training rows tell training rows.
    """
    order = torch.from_numpy(rng.permutation(task.test.rows))
    rows = task.test.take(order)
    right: Tensor = logits_of(model, rows.inputs).argmax(1) == rows.targets
    return rows.take(torch.nonzero(right)[:count, 0])
