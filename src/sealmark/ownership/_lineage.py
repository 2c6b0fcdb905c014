"""What fingerprints of lineage share: a similarity to the original, held against unrelated models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Fingerprint
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Task
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.nulls import Population

Source = nn.Module | Weights | Path | str


@dataclass(frozen=True)
class Lineage(Fingerprint):
    """Is the suspect derived from this model? Write `record` and `similarity`.

    Nothing here is secret: whoever has the original can verify, and a match says that one model comes from
    the other, not which came first; only a published commitment tells that. The law is learned from
    models that have nothing to do with the original, and cannot be surer than their number.
    """

    has_key = False

    @abstractmethod
    def record(self, model: Source, task: Task | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is kept of the original: plain JSON, and tensors."""

    @abstractmethod
    def similarity(self, suspect: Suspect, host: Mapping[str, Any], kept: Mapping[str, Tensor]) -> float:
        """How much of the original is in the suspect; large is suspicious."""

    def enroll(
        self,
        model: Source,
        task: Task | None = None,
        *,
        references: Sequence[Source] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `Fingerprint.enroll`; takes weight files as well where the scheme reads weights."""
        if not references:
            raise ParameterError(
                f"{self.name} learns its law from unrelated models", expected="references=", found="none"
            )
        host, kept = self.record(model, task)
        host["null"] = [self.similarity(_suspect(other), host, kept) for other in references]
        return self.new_secret(weights_of(model), host=host, tensors=kept, owner=owner, rng=rng)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """The similarity against those of the unrelated models."""
        null = secret.host["null"]
        found = self.similarity(suspect, secret.host, secret.tensors)
        details = {"similarity": found, "unrelated_models": len(null), "largest_unrelated": max(null)}
        return Score(found, Population.of(null), details)


class _Stored(Suspect):
    access = Access.WEIGHTS

    def __init__(self, weights: Weights) -> None:
        self._named = weights


def _suspect(model: Source) -> Suspect:
    return WhiteBox(model) if isinstance(model, nn.Module) else _Stored(weights_of(model))
