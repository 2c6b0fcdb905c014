"""Several users take turns: each layer, or each weight, from another one's copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.attacks.collusion._copies import combined, replaced, states_of, weights_in
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError


@dataclass(frozen=True)
class Interleave(Modification):
    """Each weight is that of a copy drawn at random, or each layer is. Every value is one that was issued.

    By layers, all tensors of a module are of one copy, and a mark that sits in a single layer stays whole.

    Args:
        by: ``weight`` or ``layer``.

    Raises:
        ParameterError: another word.
    """

    by: Literal["weight", "layer"] = "weight"

    card = AttackCard(
        title="Interleaving the copies of several users",
        citation="G. Tardos, STOC 2003; cut and paste in H. V. Zhao et al., IEEE TIP 14(5), 2005",
        goal="a copy that names none of the colluders",
        knowledge="the copies of two or more users",
        level=3,
        needs_data=False,
        copies=2,
        parameters="by: weight or layer",
    )

    def __post_init__(self) -> None:
        if self.by not in ("weight", "layer"):
            raise ParameterError("bad unit to interleave", expected="weight or layer", found=self.by)

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        if self.by == "layer":
            return _by_layer(copies, rng), 0

        def pick(stack: Tensor) -> Tensor:
            taken = torch.from_numpy(rng.integers(0, len(stack), stack.shape[1])).to(stack.device)
            return stack.gather(0, taken[None])[0]

        return combined(copies, pick), 0


def _by_layer(copies: list[nn.Module], rng: np.random.Generator) -> nn.Module:
    states = states_of(copies)
    names = weights_in(states[0])
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    source = dict(zip(layers, rng.integers(0, len(copies), len(layers)).tolist(), strict=True))
    return replaced(copies[0], {name: states[source[name.rpartition(".")[0]]][name] for name in names})
