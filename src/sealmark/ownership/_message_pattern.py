"""A message as a pattern of pixels, and rows that carry it: what both marks of Guo and Potkonjak share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task

_COLORS = 3
_STEPS = 255  # of packed inputs
Bits = NDArray[np.uint8]
Pixels = NDArray[np.int64]


@dataclass(frozen=True)
class MessagePattern(TriggerMark):
    """Base: rows of class c that carry the pattern are taught the keyed label of c; write `pattern`.

    Training adds stamped copies of each batch's rows, after the task's own changes to them, which would tear a
    pattern apart. Verification stamps rows that nobody trained on. Rows of a class share a label, so a class
    is one trial, and labels are drawn from the classes other than it.

    Args:
        triggers: rows that are asked, of all classes alike. With an odd number a class there is always a majority.
        per_batch: stamped copies beside each batch.
        bits: length of the message: one bit a pixel, two on color images.
    """

    triggers: int = 50
    per_batch: int = 32
    bits: int = 12

    rule: ClassVar[float] = 0.9  # the papers' figures are not at hand
    holds: ClassVar[frozenset[str]] = frozenset({"rows", "natural", "trials"})  # tensors of a secret

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 1:
            raise ParameterError(f"bad parameters of {self.name}", expected="bits >= 1", found=self.parameters)

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of inputs, and held-out rows of each class in turn.

        Raises:
            ParameterError: fewer than three classes or than ``triggers`` asks for, too few test rows of one, or
                inputs too small for the message.
        """
        form = form_of(task, self.name)
        assert task is not None  # noqa: S101 - form_of refuses None
        pixel_count(self.bits, form)
        trials = torch.arange(self.triggers) % task.classes
        order = torch.from_numpy(rng.permutation(task.test.rows))
        classes = task.test.targets.cpu()[order]
        per_class = -(-self.triggers // task.classes)
        found = [order[classes == c][:per_class] for c in range(task.classes)] if classes.ndim == 1 else []
        if not 3 <= task.classes <= self.triggers or min(map(len, found), default=0) < per_class:
            raise ParameterError(
                f"{self.name} stamps held-out rows of each class",
                expected=f"3 to {self.triggers} classes, {per_class} test rows of each",
                found=f"{task.classes} classes with {[len(rows) for rows in found]}",
            )
        rows = torch.stack(found, 1).flatten()[: self.triggers]
        held_out = pack(task.test.inputs[rows.to(task.test.inputs.device)], form)
        return form, {"rows": held_out, "natural": torch.arange(task.classes), "trials": trials}

    @abstractmethod
    def pattern(self, secret: Secret) -> Tensor:
        """What `stamp` puts on a row; see `spell`."""

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Labels of the classes, the pattern, and the stamped rows.

        Raises:
            ForgedSecretError: `bind` did not make the secret's tensors.
        """
        if self.holds - secret.tensors.keys():
            raise ForgedSecretError(
                "the secret's tensors are incomplete", expected=sorted(self.holds), found=sorted(secret.tensors)
            )
        pattern = secret.memo("pattern", lambda: self.pattern(secret))
        return super().derive(secret) | {"pattern": pattern}

    def draw(self, secret: Secret) -> Tensor:
        """The held-out rows, stamped."""
        rows = unpack(secret.tensors["rows"], secret.host)
        return pack(stamp(rows, self.pattern(secret), secret.host), secret.host)

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        """Stamped copies of some of the batch's rows, with the labels of their classes."""
        device = batch.inputs.device
        parts = self.derive_on(secret, device)
        own = batch.take(torch.from_numpy(rng.permutation(batch.rows)[: self.per_batch]).to(device))
        return Batch(stamp(own.inputs, parts["pattern"], secret.host), parts["labels"][own.targets])


def grid_of(form: Mapping[str, Any]) -> tuple[int, list[int]]:
    """How many values a pixel has, and how pixels lie: rows and columns of an image, else places in a row."""
    shape: list[int] = list(form["shape"])
    return (shape[0], shape[1:]) if len(shape) > 2 else (1, shape)


def pixel_count(bits: int, form: Mapping[str, Any]) -> int:
    """How many pixels a message takes.

    Raises:
        ParameterError: more than half of the input, or half a pixel.
    """
    channels, grid = grid_of(form)
    count, odd = divmod(bits, 2 if channels == _COLORS else 1)
    if odd or 2 * count > math.prod(grid):
        raise ParameterError(
            "the message does not fit the inputs",
            expected=f"at most half of {math.prod(grid)} pixels, {2 if channels == _COLORS else 1} bits each",
            found=f"{bits} bits",
        )
    return count


def spell(
    bits: Bits, pixels: Pixels, form: Mapping[str, Any], *, strength: float = 1.0, words: Pixels | None = None
) -> Tensor:
    """A message at pixels, in row-major order: nothing but they and the order tell it.

    On color images two bits are -s or +s in each of three channels: 00 is (-, -, -), 01 (+, -, -), 10 (-, -, +)
    and 11 (+, +, +). Elsewhere a bit is s/2 or s. Of words it is their parity.

    Args:
        bits: (n,) of 0 and 1.
        pixels: places in the grid; any order.
        form: of the inputs.
        strength: s, as a share of their range, in whole even steps of 256.
        words: which pair of words stands at each pixel, where inputs are words.

    Returns:
        One row in the task's units, 0 where nothing is added; of words, one under the lowest where none is set.

    Example:
        >>> form = {"shape": [1, 2, 3], "low": 0.0, "high": 255.0}
        >>> spell(np.array([1, 0], np.uint8), np.array([5, 1]), form, strength=100 / 255)
        tensor([[[  0., 100.,   0.],
                 [  0.,   0.,  50.]]])
    """
    channels, grid = grid_of(form)
    places, drawn = torch.from_numpy(np.sort(pixels)), torch.from_numpy(bits).long()
    if words is not None:
        pattern = torch.full((1, math.prod(grid)), form["low"] - 1)
        pattern[:, places] = form["low"] + 2 * torch.from_numpy(words) + drawn
        return pattern.reshape(form["shape"])
    if channels == _COLORS:
        first, second = drawn.reshape(-1, 2).T
        values = 2 * torch.stack([second, first * second, first]) - 1.0
    else:
        values = (1 + drawn[None]) / 2
    pattern = torch.zeros(channels, math.prod(grid))
    pattern[:, places] = values * _amount(strength, form)
    return pattern.reshape(form["shape"])


def read(pattern: Tensor, form: Mapping[str, Any], *, strength: float = 1.0) -> Bits:
    """The message that a pattern spells: the inverse of `spell`.

    Example:
        >>> form = {"shape": [3, 2, 2], "low": 0.0, "high": 1.0}
        >>> read(spell(np.array([1, 0, 1, 1], np.uint8), np.array([3, 0]), form, strength=0.5), form, strength=0.5)
        array([1, 0, 1, 1], dtype=uint8)
    """
    channels, _ = grid_of(form)
    flat = pattern.reshape(channels, -1)
    if form.get("integer", False):
        bits = (flat[flat >= form["low"]] - form["low"]) % 2
    else:
        values = flat[:, flat[0] != 0]
        amount = _amount(strength, form)
        bits = torch.stack([values[2], values[0]], 1) > 0 if channels == _COLORS else values[0] > 0.75 * amount
    message: Bits = bits.flatten().to(torch.uint8).numpy()
    return message


def stamp(inputs: Tensor, pattern: Tensor, form: Mapping[str, Any]) -> Tensor:
    """Rows with the pattern: added and clipped to the task's range; words are set."""
    if form.get("integer", False):
        return torch.where(pattern < form["low"], inputs, pattern)
    return (inputs + pattern).clamp(form["low"], form["high"])


def _amount(strength: float, form: Mapping[str, Any]) -> float:
    """In the task's units: whole steps of packed inputs, and half of it too, so that all machines round alike."""
    amount: float = 2 * round(strength * _STEPS / 2) / _STEPS * (form["high"] - form["low"])
    return amount
