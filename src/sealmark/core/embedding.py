"""One run of embedding a watermark: what it adds to the training loop, and what comes out at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from sealmark.core.secret import Secret
from sealmark.core.task import Batch
from sealmark.core.training import Extra, Term

if TYPE_CHECKING:
    from sealmark.core.ownership import Watermark


@dataclass(frozen=True)
class Marked:
    """A marked model and the secret that verifies it: the one of `keygen`, with what embedding learned."""

    model: nn.Module
    secret: Secret


class Embedding:
    """The scheme's `loss` and `extra`, for a training loop that does not know schemes.

    A scheme that rebuilds the model while it trains, that trains something of its own beside it, or that
    writes into the weights at the end, returns a subclass from `Watermark.embedding`. Whatever it trains
    itself has an optimizer of its own and is stepped within `term`, on values that are detached from the
    model.

    Args:
        scheme: which watermark.
        secret: of its `keygen`.
    """

    def __init__(self, scheme: Watermark, secret: Secret) -> None:
        self.scheme, self.secret = scheme, secret

    @property
    def terms(self) -> list[Term]:
        """What is added to the loss; empty where there is nothing to add."""
        from sealmark.core.ownership import Watermark

        plain = type(self).term is Embedding.term and type(self.scheme).loss is Watermark.loss
        return [] if plain else [self.term]

    @property
    def extras(self) -> list[Extra]:
        """What is trained on beside each batch; empty where there is nothing."""
        from sealmark.core.ownership import Watermark

        plain = type(self).extra is Embedding.extra and type(self.scheme).extra is Watermark.extra
        return [] if plain else [self.extra]

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar that is added to the loss of one step; by default `Watermark.loss`."""
        return self.scheme.loss(model, self.secret, batch)

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Rows to train on beside ``batch``; by default those of `Watermark.extra`."""
        return self.scheme.extra(self.secret, batch, rng)

    def finish(self, model: nn.Module) -> Secret:
        """Bring the trained model, in place, into the form that is shipped; the secret to keep."""
        return self.secret
