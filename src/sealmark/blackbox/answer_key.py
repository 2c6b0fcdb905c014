"""What a watermarked service does with a query: a mapping to bits, and a key that decides by them."""

from __future__ import annotations

import copy
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.core.activations import activations
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.crypto.random import Stream

_STEPS = 65535  # real inputs are counted in so many steps, so that sums are whole numbers on every machine
_ENTROPY = 0.9
_ACTIVE = (0.05, 0.95)
_NEAR = 0.05
_T = TypeVar("_T")


@dataclass(frozen=True)
class Answered:
    """One query whose answer was falsified: what the evidence store keeps.

    Attributes:
        client: who asked.
        bits: the query under the mapping, packed; one client's queries of equal bits are the same query.
        query: its exact bytes, float32 or int64, little-endian.
        natural: the class that the model really answered.
        time: seconds since 1970, for people and for caps; it proves nothing.
    """

    client: str
    bits: bytes
    query: bytes
    natural: int
    time: float = 0.0


class AnswerKey:
    """What a prediction service does with each query: decided by the key and the mapping, by nothing else.

    So every worker, restart and batch gives the same answer.

    Args:
        secret: of `Dawn.keygen`.
        model: where the mapping reads a layer of it; a copy is kept.
    """

    def __init__(self, secret: Secret, model: nn.Module | None = None) -> None:
        scheme, host = secret.facts["parameters"], secret.host
        self.mark = secret.key("the service's evidence").hex()  # names the mark in a store, and tells nothing
        self.classes: int = host["classes"]
        self.shape: tuple[int, ...] = tuple(host["shape"])
        self.dtype: type[np.generic] = np.int64 if host.get("integer", False) else np.float32
        self._host, self._grid, self._layer = host, scheme["grid"], scheme["layer"]
        if self._layer and model is None:
            raise ParameterError("the mapping reads a layer", expected=f"the model, for its {self._layer}")
        self._model = copy.deepcopy(model).eval() if self._layer and model is not None else None
        self._places = secret.tensors["places"].numpy()
        self._thresholds = secret.tensors["thresholds"].numpy()
        self._below = int(Fraction(repr(scheme["rate"])) * 2**128)
        self._key = lru_cache(4096)(lambda client: secret.key(f"client {client}"))

    def read(self, rows: object) -> NDArray[Any]:
        """Queries as an array (N, *shape) of the task's type, from nested lists or an array.

        Raises:
            ParameterError: they do not have that form, or are not finite.
        """
        try:
            inputs = np.asarray(rows, self.dtype)
            inputs = inputs.reshape(len(inputs), *self.shape)
        except (TypeError, ValueError, OverflowError) as error:
            raise ParameterError("bad queries", expected=f"rows of shape {self.shape}", found=error) from None
        if not np.isfinite(inputs).all():
            raise ParameterError("bad queries", expected="finite numbers")
        return inputs

    def bits(self, inputs: NDArray[Any]) -> list[bytes]:
        """The mapping of each query, packed: (N, *shape) of `read` to N strings."""
        if self._model is None:
            values = coarse(inputs, self._host, self._grid)
        else:  # row by row: the rounding of a batch depends on its size
            rows = torch.from_numpy(inputs)
            single = (layer_values(self._model, self._layer, rows[i : i + 1]) for i in range(len(rows)))
            values = np.concatenate(list(single))
        packed = np.packbits(values[:, self._places] > self._thresholds, axis=1)
        return [row.tobytes() for row in packed]

    def selects(self, client: str, bits: bytes) -> bool:
        """Whether this client gets a wrong answer to this query: with exactly the published rate."""
        drawn = hmac.digest(self._key(client), b"select" + bits, "sha256")
        return int.from_bytes(drawn[:16], "big") < self._below

    def label(self, client: str, bits: bytes, natural: int) -> int:
        """The wrong class, uniform over the classes other than ``natural``."""
        step = Stream(hmac.digest(self._key(client), b"label" + bits, "sha256")).integers(1, self.classes - 1)
        return (natural + 1 + int(step[0])) % self.classes

    def order(self, client: str, bits: bytes, natural: int) -> list[int]:
        """Which class each place of the answer is taken from: a keyed permutation with `label` on top."""
        label = self.label(client, bits, natural)
        stream = Stream(hmac.digest(self._key(client), b"order" + bits, "sha256"))
        others = [kind for kind in range(self.classes) if kind != natural]
        shuffled = [others[i] for i in stream.permutation(self.classes - 1)]
        return [*shuffled[:label], natural, *shuffled[label:]]

    def answer(self, client: str, bits: bytes, scores: Sequence[_T]) -> list[_T]:
        """The whole class vector as this client gets it; see `selects`.

        Example:
            >>> # scores [0.1, 0.7, 0.2] may become [0.7, 0.2, 0.1], the same each time
        """
        natural = max(range(len(scores)), key=lambda kind: scores[kind])  # type: ignore[arg-type, return-value]
        return [scores[kind] for kind in self.order(client, bits, natural)]


def coarse(inputs: NDArray[Any], form: dict[str, Any], grid: int) -> NDArray[np.int64]:
    """What the mapping sees of an input: sums over grid x grid blocks of each plane, in whole numbers.

    Whole numbers add up to the same sum in any order, so that neither batching nor the machine matters.

    Args:
        inputs: (N, ...) finite; with fewer than two dimensions a row is taken as it is.
        form: ``low`` and ``high`` of its entries, and ``integer`` where they are whole numbers.
        grid: blocks a side.

    Returns:
        (N, coordinates) int64.
    """
    low, high = form["low"], form["high"]
    if form.get("integer", False):
        steps = np.clip(inputs, low, high).astype(np.int64)
    else:
        share = (inputs.astype(np.float64) - low) / ((high - low) or 1.0)
        steps = np.rint(np.minimum(np.maximum(share, 0), 1) * _STEPS).astype(np.int64)
    for axis in (-1, -2) if steps.ndim > 2 else ():
        size = steps.shape[axis]
        if size > grid:
            steps = np.add.reduceat(steps, np.arange(grid) * size // grid, axis=axis)
    return np.asarray(steps.reshape(len(steps), -1), np.int64)


def layer_values(model: nn.Module, layer: str, inputs: Tensor) -> NDArray[np.float64]:
    """What a layer says of each input: (N, ...) to (N, coordinates)."""
    return np.asarray(activations(model, layer, inputs).flatten(1).double().numpy())


def choose(values: NDArray[Any], bits: int, distinct: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which coordinates are mapped and where each is cut: (N, coordinates) to (d,) and (d,).

    The cut lies in the gap nearest to the median, so that coordinates of few levels are cut between two of
    them. Coordinates with the fewest rows near the cut come first: there noise changes least.

    Raises:
        ParameterError: too few rows stay apart: whole groups of queries would be selected together.
    """
    count = len(values)
    ordered = np.sort(values, axis=0).astype(np.float64)
    apart = ordered[1:] > ordered[:-1]
    off = np.abs(np.arange(1, count) / count - 0.5)[:, None]
    place = np.where(apart, off, np.inf).argmin(axis=0)
    columns = np.arange(values.shape[1])
    cuts = (ordered[place, columns] + ordered[place + 1, columns]) / 2
    share = (values > cuts).mean(axis=0)
    near = (np.abs(values - cuts) <= _NEAR * (ordered[-1] - ordered[0])).mean(axis=0)
    active = columns[apart.any(axis=0) & (share >= _ACTIVE[0]) & (share <= _ACTIVE[1])]
    active = active[np.argsort(near[active], kind="stable")]
    found = 0.0
    for width in range(max(1, min(bits, len(active))), len(active) + 1):
        chosen = active[:width]
        strings = np.packbits(values[:, chosen] > cuts[chosen], axis=1)
        found = len({row.tobytes() for row in strings}) / max(1, distinct)
        if found > _ENTROPY:
            return chosen.astype(np.int64), cuts[chosen]
    raise ParameterError(
        "the mapping cannot tell queries apart",
        expected=f"distinct bits for more than {_ENTROPY:.0%} of distinct rows",
        found=f"{found:.1%} with {len(active)} coordinates",
        advice="raise the grid, or name a layer with more active units",
    )
