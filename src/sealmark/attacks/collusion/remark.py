"""Remarking: the thief issues the stolen copy to somebody else, with a secret of his own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from sealmark.attacks.collusion._copies import combined
from sealmark.core import registry
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.identity import UserMark
from sealmark.core.secret import Secret


@dataclass(frozen=True)
class Remark(Modification):
    """A user mark of the thief's own over the owner's; several copies are averaged first.

    The surrogate carries two marks, and each traces by its own secret against its own original. The thief's
    original is the copy that was issued to him, so the owner's trace names him on that one too: who
    committed first is decided there. `embed` gives the thief's secret and original as well.

    `overwrite` does this with watermarks, which are trained in; a user mark has its own way to be issued.

    Args:
        scheme: a user mark; against the owner's own, the thief knows how the copies were marked.
        settings: its parameters, where they are not the usual ones; ``strength`` is the lever.
        user: whom the thief pretends to have issued the copy to.

    Raises:
        ParameterError: settings without names, or an empty user.

    Example:
        >>> Remark(settings={"strength": 0.3}).scheme
        'spread_spectrum'
    """

    scheme: str = "spread_spectrum"
    settings: dict[str, Any] | None = None
    user: str = "customer"

    card = AttackCard(
        title="Remarking: another user mark over the first",
        citation="I. Cox, J. Kilian, F. T. Leighton, T. Shamoon, Secure spread spectrum watermarking for "
        "multimedia, IEEE TIP 6, 1997 (watermarking what is watermarked)",
        goal="hide a user's mark under another, or dispute whose model it is",
        knowledge="the copy of one user or more, and the scheme; labeled rows where the scheme trains",
        level=3,
        needs_data=False,
        parameters="scheme, settings (its parameters: strength x1 to x30), user",
    )

    def __post_init__(self) -> None:
        if not (self.settings is None or isinstance(self.settings, dict)) or not self.user:
            raise ParameterError(
                "bad parameters of remark", expected="settings by name, a user", found=(self.settings, self.user)
            )

    def __hash__(self) -> int:
        return hash((self.scheme, self.user))  # settings are no part: a dict has none

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
            UnsupportedError: the scheme is no user mark, or finds no room in the model.
            UnknownNameError: there is no such scheme.
            ParameterError: the scheme does not know a setting, or trains and there are no rows.
            MarkFailedError: the thief's mark did not take.
        """
        model, _, _, rows = self.embed(copies, resources, rng)
        return model, rows

    def embed(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, nn.Module, Secret, int]:
        """The surrogate, the thief's original and secret, and how many rows went through training."""
        scheme = registry.scheme(self.scheme, **(self.settings or {}))
        if not isinstance(scheme, UserMark):
            raise UnsupportedError("only a user mark remarks", expected="a user mark", found=self.scheme)
        if scheme.card.needs_data and resources.rows.rows == 0:
            raise ParameterError(f"remarking by {self.scheme} trains", expected="at least one row", found=0)
        own = combined(copies, lambda stack: stack.mean(0)) if len(copies) > 1 else copies[0]
        trained = 0

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            nonlocal trained
            trained += len(targets)
            return resources.task.loss(outputs, targets)

        task = dataclasses.replace(resources.task, owner=resources.rows, loss=loss)
        secret = scheme.enroll(own, task, users=[self.user], rng=rng)
        return scheme.issue(own, secret, self.user, task=task).model, own, secret, trained
