"""Marking in the user's own training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sealmark.core.embedding import Embedding
from sealmark.core.errors import UnsupportedError
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.task import Batch

Criterion = Callable[[Any, Tensor], Tensor]


class AttachedCriterion:
    """The user's criterion plus a watermark's share; call it as the user's own.

    While it is attached, the model sees the watermark's extra rows behind each training batch and
    answers for the batch alone; in evaluation mode nothing changes. `detach` ends it.
    """

    def __init__(
        self,
        run: Embedding,
        model: nn.Module,
        criterion: Criterion,
        rng: np.random.Generator,
    ) -> None:
        self._run, self._model, self._criterion, self._rng = run, model, criterion, rng
        self._inputs: Tensor | None = None
        self._extra: tuple[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (model.training and torch.is_grad_enabled()):
            return None
        if not args or not isinstance(args[0], Tensor):
            raise UnsupportedError(
                "attach needs a model whose first argument is a tensor",
                found=[type(a).__name__ for a in args],
            )
        inputs = args[0]
        self._inputs = inputs
        batch = Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
        extra = self._run.extra(batch, self._rng)
        self._extra = None
        if extra.rows == 0:
            return None
        self._extra = (torch.empty(0), extra.targets.to(inputs.device))
        return (torch.cat([inputs, extra.inputs.to(inputs)]), *args[1:])

    def _after(self, model: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if self._extra is None or not (model.training and torch.is_grad_enabled()):
            return output
        if not isinstance(output, Tensor):
            raise UnsupportedError("attach needs a model that answers with a tensor", found=type(output).__name__)
        own = len(output) - len(self._extra[1])
        self._extra = (output[own:], self._extra[1])
        return output[:own]

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """The loss of one batch: the user's, averaged with the extra rows', plus the scheme's term."""
        loss = self._criterion(outputs, targets)
        if self._inputs is None:
            return loss
        if self._extra is not None:
            mine, own = len(self._extra[1]), len(targets)
            loss = (own * loss + mine * self._criterion(*self._extra)) / (own + mine)
        batch = Batch(self._inputs, targets)
        for term in self._run.terms:
            loss = loss + term(self._model, batch)
        self._inputs = self._extra = None
        return loss

    def detach(self) -> Secret:
        """End the embedding: the model gets the form that is shipped, and the criterion is yours again.

        Returns:
            The secret to keep: it holds what was learned beside the model, if anything was.
        """
        for handle in self._handles:
            handle.remove()
        self._inputs = self._extra = None
        return self._run.finish(self._model)


def attach(
    scheme: Watermark,
    model: nn.Module,
    criterion: Criterion,
    secret: Secret,
    *,
    rng: np.random.Generator | None = None,
) -> tuple[nn.Module, AttachedCriterion]:
    """Embed a watermark in a training loop of your own.

    Args:
        scheme: which watermark.
        model: the very same object comes back, with hooks.
        criterion: (outputs, targets) to a mean loss.
        secret: of ``scheme.keygen(model, ...)``.
        rng: for schemes that draw while training.

    Returns:
        The model, and the criterion to use instead of yours; call its ``detach()`` when done.

    Raises:
        ParameterError: the secret belongs to another scheme.

    Example:
        >>> from sealmark.ownership.uchida import Uchida
        >>> model = nn.Sequential(nn.Linear(300, 10))
        >>> scheme = Uchida(layer="0.weight", bits=64)
        >>> model, criterion = attach(scheme, model, nn.CrossEntropyLoss(), scheme.keygen(model))
        >>> loss = criterion(model(torch.rand(8, 300)), torch.zeros(8, dtype=torch.int64))
        >>> secret = criterion.detach()
    """
    scheme.check_secret(secret)
    rng = rng or np.random.default_rng()
    return model, AttachedCriterion(scheme.embedding(model, secret, None, rng), model, criterion, rng)
