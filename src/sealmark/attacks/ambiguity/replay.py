"""Replay: somebody else's credential, shown as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sealmark.attacks.ambiguity._stolen import stolen_rows
from sealmark.core.attack import Resources
from sealmark.core.card import AttackCard
from sealmark.core.impersonation import Impersonation, Spoils


@dataclass(frozen=True)
class Replay(Impersonation):
    """The rows of the first stolen credential; where queries carry it, the thief's own rows as its user's.

    A credential is a bearer's secret, so this passes as its user wherever nothing else is asked for. What is
    left to the owner: it names whom it was stolen from, and ends when he is revoked. Signatures prevent it.
    """

    card = AttackCard(
        title="Replay of a stolen credential",
        citation="P. Syverson, A Taxonomy of Replay Attacks, CSFW 1994",
        goal="be served as somebody else",
        knowledge="one user's credential",
        level=3,
        needs_data=False,
        copies=1,
    )

    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        """See `Impersonation.pretend`.

        Raises:
            ParameterError: queries carry the credential, and the thief has none to ask.
        """
        return stolen_rows(spoils, resources)[0].clone()
