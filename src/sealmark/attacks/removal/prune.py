"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError


@dataclass(frozen=True)
class Prune(Modification):
    """Set the share ``rate`` of the weights with the smallest magnitude to zero; no fine-tuning after.

    Weight tensors alone are pruned: parameters of two or more dimensions. Biases, normalization layers
    and running statistics stay, whatever they are called; zeroing those breaks a model for nothing.

    Args:
        rate: the share, 0 to 1; the number of zeros is rounded.
        scope: ``global`` ranks all weights together, ``tensor`` those of each tensor.

    Raises:
        ParameterError: a rate outside 0 to 1, or another scope.

    Example:
        >>> Prune(rate=0.9, scope="tensor")
        Prune(rate=0.9, scope='tensor')
    """

    rate: float = 0.5
    scope: Literal["global", "tensor"] = "global"

    card = AttackCard(
        title="Magnitude pruning",
        citation="S. Han, J. Pool, J. Tran, W. Dally, NIPS 2015; M. Zhu, S. Gupta, 2017",
        goal="remove a mark",
        knowledge="the weights",
        level=1,
        needs_data=False,
        parameters="rate 0.1 to 0.95, scope global or tensor",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.scope not in ("global", "tensor"):
            raise ParameterError(
                "bad parameters of prune",
                expected="rate 0 to 1, scope global or tensor",
                found=(self.rate, self.scope),
            )

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`."""
        model = copies[0]
        weights = [p.data for p in model.parameters() if p.dim() >= 2 and p.is_floating_point()]
        for group in [weights] if self.scope == "global" else [[weight] for weight in weights]:
            self._prune(group)
        return model, 0

    def _prune(self, group: list[Tensor]) -> None:
        if not group:
            return
        sizes = torch.cat([weight.abs().float().reshape(-1) for weight in group])
        keep = torch.ones_like(sizes, dtype=torch.bool)
        # by rank, not by a threshold, which would take all of many equal weights
        keep[sizes.argsort(stable=True)[: round(self.rate * len(sizes))]] = False
        for weight, kept in zip(group, torch.split(keep, [weight.numel() for weight in group]), strict=True):
            weight.masked_fill_(~kept.reshape(weight.shape), 0)
