"""Attacks on credentials: what somebody shows to be taken for a user, or for another one than he is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch import Tensor

from sealmark.core.attack import Attack, Clock, Cost, Resources
from sealmark.core.credentials import Credential, CredentialMark, Enrolled
from sealmark.core.errors import ParameterError
from sealmark.core.suspect import BlackBox, WhiteBox


class Spoils:
    """What an impostor has: the scheme, which is public, answers of the served model, and credentials.

    Attributes:
        mark: the scheme with its parameters.
        credentials: of the users who work together, or were robbed; none for an outsider.
        service: the served model's answers, probabilities by class; it counts its queries.
        shape: of one row.
    """

    def __init__(self, mark: CredentialMark, enrolled: Enrolled, credentials: Sequence[Credential] = ()) -> None:
        self.mark, self.credentials = mark, list(credentials)
        self.service = BlackBox(WhiteBox(enrolled.model).probabilities, returns="probabilities")
        self._facts = enrolled.secret.facts

    @property
    def facts(self) -> dict[str, Any]:
        """The secret's public facts: parameters, and what the scheme noted of the model."""
        return {**self._facts["host"], "parameters": self._facts["parameters"]}

    @property
    def shape(self) -> list[int]:
        """Of one row."""
        return list(self._facts["host"]["shape"])


@dataclass(frozen=True)
class ImpersonationResult:
    """What the impostor shows, (R, ...), and what it cost."""

    rows: Tensor
    cost: Cost


class Impersonation(Attack):
    """An attack that makes rows to be let in with; a subclass writes `pretend`."""

    @abstractmethod
    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        """Rows to show, (R, ...)."""

    @final
    def run(self, spoils: Spoils, resources: Resources, *, rng: np.random.Generator) -> ImpersonationResult:
        """Make them; nothing that the attacker has is changed.

        Raises:
            ParameterError: fewer credentials than it takes, or no data where some is needed.
        """
        if len(spoils.credentials) < self.card.copies:
            raise ParameterError(
                f"{self.name} needs more credentials", expected=self.card.copies, found=len(spoils.credentials)
            )
        self._refuse_without_data(resources)
        clock, before = Clock(), spoils.service.queries
        rows = self.pretend(spoils, resources, rng)
        used = resources.rows.rows if self.card.needs_data else 0
        queries = spoils.service.queries - before
        return ImpersonationResult(rows, clock.cost(used, 0, len(spoils.credentials), queries))
