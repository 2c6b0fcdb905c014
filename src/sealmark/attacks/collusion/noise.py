"""Noise on what is left of several users' marks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.attacks.collusion._copies import combined, replaced, weights_in
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.modes import torch_generator


@dataclass(frozen=True)
class Noise(Modification):
    """The average of all copies, of which one will do, with Gaussian noise on top of every matrix and filter.

    Vectors (biases, normalizations, their running statistics) carry no mark, are touchy, and are left alone.

    Args:
        level: standard deviation of the noise, in those of the tensor.

    Raises:
        ParameterError: a level that is not positive.
    """

    level: float = 0.1

    card = AttackCard(
        title="Noise on the average of the copies of several users",
        citation="I. Cox, J. Kilian, F. T. Leighton, T. Shamoon, Secure spread spectrum watermarking for "
        "multimedia, IEEE TIP 6, 1997",
        goal="a copy that names none of the colluders",
        knowledge="the copy of one user or more",
        level=3,
        needs_data=False,
        parameters="level: 0.05 to 1 standard deviations of the tensor",
    )

    def __post_init__(self) -> None:
        if not 0 < self.level < float("inf"):
            raise ParameterError("bad level of noise", expected="a positive number", found=self.level)

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        model = combined(copies, lambda stack: stack.mean(0)) if len(copies) > 1 else copies[0]
        generator, state = torch_generator(rng), model.state_dict()
        matrices = [name for name in weights_in(state) if state[name].ndim >= 2]
        return replaced(model, {name: self._noisy(state[name], generator) for name in matrices}), 0

    def _noisy(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        return (tensor + self.level * tensor.float().std(correction=0) * noise).to(tensor.dtype)
