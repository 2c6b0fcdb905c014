"""Several users take the median of their copies, weight by weight: no copy's excess counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from sealmark.attacks.collusion._copies import combined
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard


@dataclass(frozen=True)
class Median(Modification):
    """The median of all copies; of an even number the lower one of the middle two.

    It takes three: the median of two copies is their mean, or a minimum that `extremes` gives.
    Where marks leave two values a weight, as in spread-spectrum copies, it is the vote of the majority.
    """

    card = AttackCard(
        title="The median of the copies of several users",
        citation="H. V. Zhao, M. Wu, Z. J. Wang, K. J. R. Liu, Forensic analysis of nonlinear collusion attacks "
        "for multimedia fingerprinting, IEEE TIP 14(5), 2005",
        goal="a copy that names none of the colluders",
        knowledge="the copies of three or more users",
        level=3,
        needs_data=False,
        copies=3,
    )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        return combined(copies, lambda stack: stack.median(0).values), 0
