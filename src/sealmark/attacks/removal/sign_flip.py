"""Hidden units with the other sign, which normalization lets pass: the same function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.symmetry.rewriting import rewriting, scale


@dataclass(frozen=True)
class SignFlip(Modification):
    """Negate hidden units before a batch normalization, whose mean and factor are negated along: SignFlip.

    So are those between two linear maps, for instance between a layer norm and what reads it. Units that
    pass a nonlinear function in between stay: a model without such places comes back as it is.

    Args:
        rate: probability that a unit is negated.

    Raises:
        ParameterError: a rate outside 0 to 1.

    Example:
        >>> SignFlip()
        SignFlip(rate=0.5)
    """

    rate: float = 0.5

    card = AttackCard(
        title="Sign flips of hidden units",
        citation="Y. Yan, X. Pan, Y. Wang, M. Zhang, M. Yang, Cracking White-box DNN Watermarks via Invariant "
        "Neuron Transforms, arXiv 2205.00199 (SignFlip)",
        goal="make a mark in the weights unreadable, at no cost in accuracy",
        knowledge="the weights and the architecture",
        level=1,
        needs_data=False,
        parameters="rate 0 to 1",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ParameterError("bad rate of flips", expected="0 to 1", found=self.rate)

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`."""
        model = copies[0]
        with rewriting(model) as (groups, tensors):
            for units in groups:
                for stretch in units.stretches:
                    if stretch.signs:
                        signs = np.where(rng.random(units.size) < self.rate, -1.0, 1.0)
                        scale(tensors, stretch, torch.from_numpy(signs))
        return model, 0
