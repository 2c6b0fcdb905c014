"""Several users vote on every weight: with the most of them, or with the fewest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.attacks.collusion._copies import combined
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard


@dataclass(frozen=True)
class Majority(Modification):
    """The mean of the copies on the fuller side of the middle between the least and the largest.

    A code's mark leaves two values a weight, so colluders see each other's bits where they differ, and can
    decide by vote what bit the surrogate shows. Where copies have more than two values, as after training,
    this is the mean of the larger group; where the sides are equal, the mean of all.

    Args:
        minority: take the emptier side instead. Where all agree, there is nothing to take but that.
    """

    minority: bool = False

    card = AttackCard(
        title="A vote of several users on every weight",
        citation="K. Nuida et al., An improvement of discrete Tardos fingerprinting codes, DCC 52, 2009 (majority "
        "and minority vote on the bits of a code)",
        goal="a copy that names none of the colluders",
        knowledge="the copies of three or more users",
        level=3,
        needs_data=False,
        copies=3,
        parameters="minority: what the fewest have",
    )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        return combined(copies, self._vote), 0

    def _vote(self, stack: Tensor) -> Tensor:
        low, high = stack.amin(0), stack.amax(0)
        above = stack > (low + high) / 2
        votes = 2 * above.sum(0) - len(stack)
        wanted = above == ((votes < 0) if self.minority else (votes > 0))
        wanted |= (votes == 0) | (low == high)
        return torch.where(wanted, stack, 0.0).sum(0) / wanted.sum(0)
