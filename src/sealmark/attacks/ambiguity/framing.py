"""Framing: a coalition makes a copy that shall name somebody else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sealmark.attacks.collusion._copies import State, replaced, states_of, weights_in
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.modes import torch_generator


@dataclass(frozen=True)
class Framing(Modification):
    """Guess at another user's mark: random mixtures of the copies, and beyond them on either side.

    Each weight is that of one colluder moved by ``-reach`` to ``+reach`` times its difference from another's.
    Of several tries, the coalition keeps the one in which it recognizes its own copies least. It cannot do
    better: an innocent's mark is drawn for his name from the owner's secret, so whatever the coalition
    makes of its copies is independent of it, and the bound of `accuse` holds with the biases of the code
    known as well. It falls with the secret itself (an owner can frame), with a stolen copy, and where the
    coalition may ask for the scores of others as often as it likes.

    Args:
        reach: how far beyond the copies to go, in units of their differences.
        tries: mixtures to choose from.

    Raises:
        ParameterError: a negative reach, or no tries.
    """

    reach: float = 1.0
    tries: int = 8

    card = AttackCard(
        title="Framing: mixtures of copies that shall name somebody else",
        citation="D. Boneh, J. Shaw, Collusion-secure fingerprinting for digital data, IEEE Trans. Inf. Theory 44, "
        "1998 (frameproof codes)",
        goal="have somebody innocent accused",
        knowledge="the copies of two or more users; nothing of the owner's secret",
        level=3,
        needs_data=False,
        copies=2,
        parameters="reach 0 to 3, tries 1 to 100",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.reach < math.inf or self.tries < 1:
            raise ParameterError(
                "bad parameters of framing", expected="reach >= 0, tries >= 1", found=(self.reach, self.tries)
            )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        states = [{name: state[name] for name in weights_in(state)} for state in states_of(copies)]
        mixtures = (self._mixture(states, torch_generator(rng)) for _ in range(self.tries))
        kept: State = min(mixtures, key=lambda mixture: _recognized(mixture, states))
        return replaced(copies[0], kept), 0

    def _mixture(self, states: list[State], generator: torch.Generator) -> State:
        """One guess; vectors, which are touchy and carry no mark, are those of one of the copies."""
        result = {}
        for name, first in states[0].items():
            stack = torch.stack([state[name] for state in states])
            shape = first.shape if first.ndim >= 2 else (1,) * first.ndim
            one, other = (torch.randint(len(stack), shape, generator=generator) for _ in range(2))
            beyond = self.reach * (2 * torch.rand(shape, generator=generator) - 1) * (first.ndim >= 2)
            near, far = (stack.gather(0, i.expand(first.shape)[None].to(stack.device))[0] for i in (one, other))
            result[name] = (near + beyond.to(stack.device) * (near - far)).to(first.dtype)
        return result


def _recognized(mixture: State, states: list[State]) -> float:
    """The largest correlation with what is a colluder's own: his difference from the mean of all."""
    products, powers, power = torch.zeros(len(states)).double(), torch.zeros(len(states)).double(), 0.0
    for name, tensor in mixture.items():
        stack = torch.stack([state[name] for state in states]).double().reshape(len(states), -1)
        mean = stack.mean(0)
        own, made = stack - mean, tensor.double().reshape(-1) - mean
        products += (own @ made).cpu()
        powers += own.square().sum(1).cpu()
        power += float(made.square().sum())
    return float((products.abs() / (powers * power).sqrt().clamp_min(1e-300)).max())
