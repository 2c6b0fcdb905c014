"""Hidden units on another scale, which ReLU and batch normalization let pass: the same function."""

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
class Rescale(Modification):
    """Multiply each hidden unit by a positive factor of its own, and take it back where it is read: NeuronScale.

    Where a unit is normalized, it gets one factor before and another after. A layer norm takes up no
    factor before it. Functions that are not positively homogeneous, as GELU, keep their inputs.

    Args:
        spread: standard deviation of the natural logarithm of the factors, which are lognormal.

    Raises:
        ParameterError: a spread that is not positive, or so large that float32 suffers.

    Example:
        >>> Rescale(spread=0.5)
        Rescale(spread=0.5)
    """

    spread: float = 1.0

    card = AttackCard(
        title="Rescaling of hidden units",
        citation="Y. Yan, X. Pan, Y. Wang, M. Zhang, M. Yang, Cracking White-box DNN Watermarks via Invariant "
        "Neuron Transforms, arXiv 2205.00199 (NeuronScale)",
        goal="make a mark in the weights unreadable, at no cost in accuracy",
        knowledge="the weights and the architecture",
        level=1,
        needs_data=False,
        parameters="spread of the log factors, 0.1 to 2",
    )

    def __post_init__(self) -> None:
        if not 0 < self.spread <= 4:
            raise ParameterError("bad spread of factors", expected="above 0, at most 4", found=self.spread)

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
                    factors = np.exp(self.spread * rng.standard_normal(units.size))
                    scale(tensors, stretch, torch.from_numpy(factors))
        return model, 0
