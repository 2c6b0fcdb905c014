"""Forging a projection: solve for the secret by which somebody else's model says what the thief wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.attack import Forgery, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import UnsupportedError
from sealmark.core.hosts import mean_filter
from sealmark.core.ownership import Verifiable, Watermark
from sealmark.core.secret import Secret

# scheme -> the host vector w that it reads of its layer. It must note the layer's name in the secret's
# host as "layer", derive "projection" (T, M) and "message" (T,), and read a bit as (X w)_j >= 0.
_HOSTS: dict[str, Callable[[Tensor], Tensor]] = {"uchida": mean_filter}


@dataclass(frozen=True)
class ForgeProjection(Forgery):
    """Any model says anything under some projection, and one that does is found in closed form.

    For a host vector w and any message b,

        X' = X + ((2 b - 1) - X w) w^T / (w^T w)

    gives X' w = 2 b - 1: no bit is wrong, on a model that never had a mark, and the entries of X' look
    as normal as those of X. The forged secret is honest but for that: its seed, its facts and its message
    re-derive, and its projection is committed as if embedding had learned it.

    So a match alone is no claim. The secret is refused because its projection does not follow from its
    seed. What is left to the thief is to grind seeds, which ``verify(..., tries=)`` pays for and a
    commitment from before the release rules out.
    """

    card = AttackCard(
        title="A projection solved for after the fact",
        citation="L. Fan, K. W. Ng, C. S. Chan, Rethinking Deep Neural Network Ownership Verification, NeurIPS "
        "2019 (ambiguity attacks); the closed form is algebra",
        goal="claim a model of somebody else's",
        knowledge="the weights of any model, marked or not, and the scheme",
        level=3,
        needs_data=False,
    )

    def fits(self, scheme: Verifiable) -> bool:
        """Whether the scheme reads the signs of a projection of one layer's host."""
        return isinstance(scheme, Watermark) and scheme.name in _HOSTS

    def forge(self, model: nn.Module, scheme: Verifiable, resources: Resources, rng: np.random.Generator) -> Secret:
        """See `Forgery.forge`.

        Raises:
            ParameterError: the model has no layer with room for the scheme.
            UnsupportedError: the layer's host is all zero, and under every projection.
        """
        honest = cast("Watermark", scheme).keygen(model, resources.task, rng=rng)
        key = scheme.derive(honest)
        weight = model.get_parameter(honest.host["layer"]).detach().to("cpu", torch.float64)
        host = _HOSTS[scheme.name](weight)
        if not host.any():
            raise UnsupportedError("nothing can be read from a host of zeros", found=honest.host["layer"])
        projection = key["projection"].double()
        wanted = 2 * key["message"].double() - 1
        solved = projection + torch.outer(wanted - projection @ host, host) / host.dot(host)
        return honest.with_learned({"projection": solved.float()})
