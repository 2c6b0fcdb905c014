"""Hidden units in another order: the same function, other weight tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.symmetry.rewriting import reorder, rewriting


@dataclass(frozen=True)
class Permute(Modification):
    """Shuffle the units of every hidden layer, and whatever reads them along: LayerShuffle.

    Attention heads change places as a whole; the channels of a residual stream move together.

    Args:
        share: of the layers (groups of units), taken from the input on.

    Raises:
        ParameterError: a share outside 0 to 1.

    Example:
        >>> Permute()
        Permute(share=1.0)
    """

    share: float = 1.0

    card = AttackCard(
        title="Permutation of hidden units",
        citation="Y. Yan, X. Pan, Y. Wang, M. Zhang, M. Yang, Cracking White-box DNN Watermarks via Invariant "
        "Neuron Transforms, arXiv 2205.00199 (LayerShuffle)",
        goal="make a mark in the weights unreadable, at no cost in accuracy",
        knowledge="the weights and the architecture",
        level=1,
        needs_data=False,
        parameters="share of the layers, 0 to 1",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ParameterError("bad share of layers", expected="0 to 1", found=self.share)

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`."""
        model = copies[0]
        with rewriting(model) as (groups, tensors):
            for units in groups[: round(self.share * len(groups))]:
                reorder(tensors, units, torch.from_numpy(rng.permutation(units.size)))
        return model, 0
