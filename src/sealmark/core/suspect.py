"""What a verifier may touch: `WhiteBox`, `WeightFile`, `BlackBox`.

A suspect counts the queries it answered, refuses what its access does not allow, and is never changed.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from enum import Flag, auto
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sealmark.core.errors import AccessError, BudgetError, FormatError, ParameterError
from sealmark.core.modes import chunks, evaluating
from sealmark.core.symmetry.alignment import align
from sealmark.core.weights import FileWeights, ModelWeights, TensorMap, Weights

Returns = Literal["label", "probabilities", "logits"]


class Access(Flag):
    """Ways to look at a suspect. A scheme names those that it needs; a suspect those that it grants."""

    WEIGHTS = auto()  # named tensors
    LABELS = auto()  # the predicted class of an input
    PROBABILITIES = auto()  # a probability for each class
    LOGITS = auto()  # what the last layer says
    MODULE = auto()  # the live model: gradients, activations

    def words(self) -> str:
        """The names, for messages.

        Example:
            >>> (Access.LABELS | Access.WEIGHTS).words()
            'weights and labels'
        """
        return " and ".join(str(flag.name).lower() for flag in self)


class Suspect(ABC):
    """Base of all suspects.

    Attributes:
        access: what it grants.
        queries: how many inputs it has been sent so far.
        budget: how many it may answer; None for no limit.
    """

    access: Access
    queries: int = 0
    budget: int | None = None
    _named: Weights | None = None
    _predict: Callable[[Tensor], Tensor] | None = None

    def require(self, needed: Access) -> None:
        """Refuse when ``needed`` is not granted.

        Raises:
            AccessError: it is not.
        """
        if needed & self.access != needed:
            raise AccessError(
                "the suspect does not offer what this scheme must touch",
                expected=needed.words(),
                found=self.access.words(),
                advice="pass WhiteBox(model), WeightFile(path) or BlackBox(predict) as the scheme needs",
            )

    @property
    def weights(self) -> Weights:
        """The suspect's named tensors.

        Raises:
            AccessError: it shows none.
        """
        self.require(Access.WEIGHTS)
        return cast("Weights", self._named)

    def labels(self, inputs: Tensor) -> Tensor:
        """The predicted class of each input: (N, ...) to (N,) int64; counts N queries.

        Raises:
            AccessError: the suspect answers no queries.
            BudgetError: the answers would exceed the budget; none is asked for.
        """
        self.require(Access.LABELS)
        answer = self._ask(inputs)
        return (answer if answer.ndim == 1 else answer.argmax(-1)).to("cpu", torch.int64)

    def probabilities(self, inputs: Tensor) -> Tensor:
        """The class probabilities of each input: (N, ...) to (N, K); counts N queries.

        Raises:
            AccessError: the suspect gives labels at most.
            BudgetError: the answers would exceed the budget; none is asked for.
            FormatError: an answer is not finite.
        """
        self.require(Access.PROBABILITIES)
        answer = _finite(self._ask(inputs))
        return torch.softmax(answer, -1) if Access.LOGITS in self.access else answer

    def logits(self, inputs: Tensor) -> Tensor:
        """The logits of each input: (N, ...) to (N, K); counts N queries.

        Raises:
            AccessError: the suspect does not give them.
            BudgetError: the answers would exceed the budget; none is asked for.
            FormatError: an answer is not finite.
        """
        self.require(Access.LOGITS)
        return _finite(self._ask(inputs))

    def _ask(self, inputs: Tensor) -> Tensor:
        count = len(inputs)
        if self.budget is not None and self.queries + count > self.budget:
            raise BudgetError(
                "the query budget does not suffice",
                expected=f"at most {self.budget - self.queries} more",
                found=count,
                advice="raise the budget or use a scheme with fewer queries",
            )
        self.queries += count
        answer = cast("Callable[[Tensor], Tensor]", self._predict)(inputs)
        if len(answer) != count:
            raise FormatError("the suspect's answer does not fit", expected=f"{count} rows", found=len(answer))
        return answer


def _finite(answer: Tensor) -> Tensor:
    if not bool(torch.isfinite(answer).all()):
        raise FormatError("the suspect's answer is not finite", expected="numbers", found="NaN or infinity")
    return answer


class WhiteBox(Suspect):
    """A live model, fully open. It is used in evaluation mode and left as it was.

    Args:
        model: on any device.
        budget: queries it may answer.
    """

    access = Access.WEIGHTS | Access.LABELS | Access.PROBABILITIES | Access.LOGITS | Access.MODULE

    def __init__(self, model: nn.Module, *, budget: int | None = None) -> None:
        self.model = model
        self.budget = budget
        self._named = ModelWeights(model)
        self._predict = self._forward

    def _forward(self, inputs: Tensor) -> Tensor:
        with evaluating(self.model) as device:
            return torch.cat([self.model(chunk.to(device)).to("cpu") for chunk in chunks(inputs)])


class WeightFile(Suspect):
    """A safetensors file or a sharded folder: weights without an architecture, read lazily.

    Args:
        path: as for `sealmark.core.weights.FileWeights`.
    """

    access = Access.WEIGHTS

    def __init__(self, path: Path | str) -> None:
        self._named = FileWeights(path)


class BlackBox(Suspect):
    """Anything that answers queries.

    Args:
        predict: inputs (N, ...) to labels (N,) or to probabilities or logits (N, K).
        returns: what ``predict`` gives.
        budget: queries it may answer; None for no limit.

    Raises:
        ParameterError: ``returns`` is none of the three.

    Example:
        >>> suspect = BlackBox(lambda x: torch.zeros(len(x)), returns="label", budget=3)
        >>> suspect.labels(torch.rand(2, 4)).tolist(), suspect.queries
        ([0, 0], 2)
    """

    def __init__(
        self, predict: Callable[[Tensor], Tensor], *, returns: Returns = "label", budget: int | None = None
    ) -> None:
        granted = {
            "label": Access.LABELS,
            "probabilities": Access.LABELS | Access.PROBABILITIES,
            "logits": Access.LABELS | Access.PROBABILITIES | Access.LOGITS,
        }
        if returns not in granted:
            raise ParameterError("bad answer type", expected=sorted(granted), found=returns)
        self.access = granted[returns]
        self.budget = budget
        self._ask_outside = predict
        self._predict = self._check

    def _check(self, inputs: Tensor) -> Tensor:
        answer = torch.as_tensor(self._ask_outside(inputs)).detach()
        expected = 1 if self.access == Access.LABELS else 2
        if answer.ndim != expected:
            raise FormatError(
                "the suspect's answer has a wrong shape",
                expected=f"{expected} dimension(s)",
                found=tuple(answer.shape),
                advice="say what predict returns: label, probabilities or logits",
            )
        return answer


def aligned(
    suspect: Suspect, original: nn.Module, blind: TensorMap | None = None
) -> tuple[dict[str, Any], Suspect]:
    """The suspect with its hidden units in the original's order, scale and sign, and what was undone.

    Args:
        suspect: shows its weights; is not changed.
        original: a live model, for its structure and its weights.
        blind: takes from a tensor what must not influence the alignment.

    Raises:
        AccessError: the suspect shows no weights.
        ModelMismatchError: it is not of the original's architecture.
        UnsupportedError: the original's structure cannot be read.
    """
    found = align(suspect.weights, original, blind=blind)
    return found.note, WhiteBox(found.model(original))
