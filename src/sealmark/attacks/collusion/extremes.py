"""Several users take the least or the largest of their copies, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.attacks.collusion._copies import Rule, combined
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError

_SIDES = ("low", "high", "either", "middle")


@dataclass(frozen=True)
class Extremes(Modification):
    """The minimum, the maximum, one of the two at random, or the mean of the two.

    What all copies share stays, and every weight is one that a colluder has, but for ``middle``. Copies
    that were trained apart move far from their mean: the more of them, the more accuracy that costs.

    Args:
        side: ``low``, ``high``, ``either`` (drawn for each weight) or ``middle``.

    Raises:
        ParameterError: another side.
    """

    side: Literal["low", "high", "either", "middle"] = "low"

    card = AttackCard(
        title="The extremes of the copies of several users",
        citation="H. V. Zhao, M. Wu, Z. J. Wang, K. J. R. Liu, Forensic analysis of nonlinear collusion attacks "
        "for multimedia fingerprinting, IEEE TIP 14(5), 2005 (minimum, maximum, min-max, randomized negative)",
        goal="a copy that names none of the colluders",
        knowledge="the copies of two or more users",
        level=3,
        needs_data=False,
        copies=2,
        parameters="side: low, high, either at random, middle (the mean of both)",
    )

    def __post_init__(self) -> None:
        if self.side not in _SIDES:
            raise ParameterError("bad side", expected=f"one of {', '.join(_SIDES)}", found=self.side)

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """

        def either(stack: Tensor) -> Tensor:
            low = torch.from_numpy(rng.random(stack.shape[1]) < 0.5).to(stack.device)
            return torch.where(low, stack.amin(0), stack.amax(0))

        rules: dict[str, Rule] = {
            "low": lambda stack: stack.amin(0),
            "high": lambda stack: stack.amax(0),
            "either": either,
            "middle": lambda stack: (stack.amin(0) + stack.amax(0)) / 2,
        }
        return combined(copies, rules[self.side]), 0
