"""What an endpoint is asked and may answer: the documented JSON shape, adapters for others, no nonsense.

The documented shape, see ``docs/endpoint.md``::

    POST {"inputs": [...]}  ->  {"labels": [...]}  or  {"probabilities": [[...]]}  or  {"logits": [[...]]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.suspect import Returns
from sealmark.runtime.models import imported

KEYS: dict[Returns, str] = {
    "logits": "logits",
    "probabilities": "probabilities",
    "label": "labels",
}  # richest first
ROUNDING = 0.01  # services round probabilities to few digits


@dataclass(frozen=True)
class Adapter:
    """How inputs become a request, and its answer becomes labels, probabilities or logits.

    Attributes:
        encode: inputs (N, ...) to a body and further headers; a body that is not bytes is sent as JSON.
        decode: the parsed JSON of the answer to labels (N,) or to probabilities or logits (N, K); or to a
            mapping from ``label``, ``probabilities``, ``logits`` to what the answer offers of these.

    Example:
        >>> ours = Adapter(lambda rows: ({"pixels": nested(rows)}, {}), lambda answer: answer["result"]["class"])
        >>> ours.encode(torch.tensor([[0.5, 0.25]]))
        ({'pixels': [[0.5, 0.25]]}, {})
    """

    encode: Callable[[Tensor], tuple[Any, Mapping[str, str]]]
    decode: Callable[[Any], Any]

    def read(self, answer: Any, wanted: Returns | None) -> tuple[Returns, Any]:
        """What kind of answer it is, and its values, unchecked.

        Args:
            answer: parsed JSON.
            wanted: the kind that must be there; None takes the richest.

        Raises:
            FormatError: it holds none, or not the wanted one.
        """
        try:
            found = self.decode(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                "the answer does not have its shape", found=type(error).__name__, advice="see docs/endpoint.md"
            ) from None
        if not isinstance(found, Mapping):
            return wanted or _kind_of(found), found
        for kind in KEYS if wanted is None else [wanted]:
            if kind in found:
                return kind, found[kind]
        raise FormatError(
            "the endpoint answers something else",
            expected=" or ".join(KEYS.values()) if wanted is None else KEYS[wanted],
            found=", ".join(found) or "none of these",
            advice="say what it returns, or write an adapter; see docs/endpoint.md",
        )


def _offered(answer: Any) -> dict[Returns, Any]:
    if not isinstance(answer, dict):
        raise TypeError("not an object")
    return {kind: answer[key] for kind, key in KEYS.items() if key in answer}


DOCUMENTED = Adapter(lambda rows: ({"inputs": nested(rows)}, {}), _offered)


def load_adapter(reference: str) -> Adapter:
    """The adapter that ``package.module:factory`` makes; importing runs the module's code.

    Raises:
        ParameterError: not of this form, or the factory gives no adapter.
        UnknownNameError: no such module, or no such name in it.
    """
    adapter = imported(reference)()
    if not isinstance(adapter, Adapter):
        raise ParameterError(
            f"{reference} gives no adapter",
            expected="a sealmark.runtime.answers.Adapter",
            found=type(adapter).__name__,
        )
    return adapter


def nested(rows: Tensor) -> Any:
    """Nested lists for JSON: each number in the fewest digits that give the same float32 back.

    Example:
        >>> nested(torch.tensor([[0.1, 1.0]])), nested(torch.tensor([7]))
        ([[0.1, 1.0]], [7])
    """
    if not rows.is_floating_point() or rows.dtype == torch.float64:
        return rows.tolist()
    # one row at a time: as text, a number takes 128 bytes
    return [row.astype(str).astype(np.float64).tolist() for row in rows.to("cpu", torch.float32).numpy()]


def checked(values: Any, kind: Returns, *, rows: int, classes: int | None) -> Tensor:
    """An answer as a tensor, if it is one.

    Args:
        values: nested lists or a tensor.
        kind: what they are meant to be.
        rows: N, how many were asked.
        classes: K where it is known.

    Returns:
        Labels (N,) int64, or probabilities or logits (N, K) float32.

    Raises:
        FormatError: not numbers, not finite, of another shape; labels that are no classes; probabilities that
            are negative or do not sum to 1.
    """
    answer = _numbers(values)
    if answer.ndim != (1 if kind == "label" else 2):
        raise FormatError(
            "the endpoint's answer has a wrong shape",
            expected=f"({rows},)" if kind == "label" else f"({rows}, classes)",
            found=tuple(answer.shape),
            advice="check what it returns: label, probabilities or logits",
        )
    if len(answer) != rows:
        raise FormatError("the endpoint's answer does not fit", expected=f"{rows} rows", found=len(answer))
    if kind == "label":
        return _labels(answer, classes)
    if answer.shape[1] < 2 or answer.shape[1] != (classes or answer.shape[1]):
        raise FormatError("a wrong number of classes", expected=classes or "two or more", found=answer.shape[1])
    if kind == "probabilities" and not _is_distribution(answer):
        raise FormatError("no probabilities", expected="0 to 1 each, a sum of 1", found=_worst(answer))
    return answer.float()


def _numbers(values: Any) -> Tensor:
    try:
        answer = torch.as_tensor(values).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise FormatError(
            "the endpoint's answer is not numbers", expected="one list, or lists of one length"
        ) from None
    if answer.dtype == torch.bool or answer.is_complex():
        raise FormatError("the endpoint's answer is not numbers", found=answer.dtype)
    answer = answer.double()
    if not bool(torch.isfinite(answer.float()).all()):  # also what float32 cannot hold
        raise FormatError("the endpoint's answer is not finite", expected="finite numbers")
    return answer


def _labels(answer: Tensor, classes: int | None) -> Tensor:
    labels = answer.to(torch.int64)
    wrong = (labels != answer) | (labels < 0) | (labels >= (classes or 2**53))
    if bool(wrong.any()):
        raise FormatError(
            "a label that is no class",
            expected=f"whole numbers from 0 to {classes - 1}" if classes else "whole numbers from 0",
            found=f"{answer[wrong][0].item():g}",
        )
    return labels


def _is_distribution(answer: Tensor) -> bool:
    sums = (answer.sum(1) - 1).abs().max() if len(answer) else torch.zeros(())
    return bool((answer >= 0).all() and (answer <= 1 + ROUNDING).all() and sums <= ROUNDING)


def _worst(answer: Tensor) -> str:
    sums = answer.sum(1)
    return f"a sum of {sums[(sums - 1).abs().argmax()].item():.4g}, least {answer.min().item():.4g}"


def _kind_of(values: Any) -> Returns:
    """What the values of an adapter that does not say so look like."""
    answer = _numbers(values)
    if answer.ndim == 1:
        return "label"
    return "probabilities" if answer.ndim == 2 and _is_distribution(answer) else "logits"
