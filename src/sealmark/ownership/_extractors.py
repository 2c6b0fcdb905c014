"""What schemes with a learned extractor share: a bank of clean nets, a small extractor, an honest null.

An extractor that is trained to say the owner's bits says related bits of clean models too, so the
number of matches is not binomial on a model that was made without the secret. What it says of clean
nets that it never saw is kept with it, and a suspect is ranked among them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Null, Score
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.task import Recipe, Task
from sealmark.core.training import train_task
from sealmark.core.weights import weights_of
from sealmark.crypto.random import Stream
from sealmark.stats.nulls import Binomial, Population

_BANK = 0x5EA1  # net i of every bank is trained from the generator of (_BANK, i)


@dataclass(frozen=True)
class _Source:
    """Where clean nets come from, compared by content, so that equal tasks share one bank."""

    how: tuple[Callable[..., Any] | None, ...]
    rows: tuple[str, str]
    recipe: Recipe
    task: Task = field(compare=False)


@functools.lru_cache(maxsize=128)
def _clean_net(source: _Source, index: int) -> nn.Module:
    rng = np.random.default_rng([_BANK, index])
    return train_task(source.task, rng=rng, recipe=source.recipe).eval().requires_grad_(False)


def clean_nets(task: Task | None, model: nn.Module, count: int, epochs: int) -> list[nn.Module]:
    """Unmarked nets of the task, each from a seed of its own; a process trains each of them once.

    The seeds are public and fixed: the bank says what clean nets look like and owes nothing to a secret.

    Args:
        task: the owner's; the nets are trained on its rows, by its recipe.
        model: about to be marked, of the same architecture.
        count: how many; the first ``count`` of the bank.
        epochs: instead of the recipe's.

    Returns:
        On the CPU, in evaluation mode, shared by all who ask: do not change them.

    Raises:
        UnsupportedError: there is no task, or the model is not of the task's architecture.
    """
    if task is None:
        raise UnsupportedError(
            "a learned extractor needs clean nets of the same task",
            expected="a task",
            found="a training loop without one",
            advice="embed with a task instead of attaching",
        )
    recipe = dataclasses.replace(task.recipe, epochs=epochs)
    rows = tensor_digest(task.owner.inputs), tensor_digest(task.owner.targets)
    source = _Source((task.make, task.loss, task.augment), rows, recipe, task)
    nets = [_clean_net(source, index) for index in range(count)]
    if weights_of(nets[0]).info != weights_of(model).info:
        raise UnsupportedError(
            "the model is not the task's", expected=type(nets[0]).__name__, found=type(model).__name__
        )
    return nets


class Extractor:
    """Two linear layers with a tanh between; rows to bits.

    Standardized rows, no biases and an odd activation: what it learns to say of one row it does not say
    of an unrelated one, which a common offset of all rows would make it do.

    Args:
        inner: (H, M).
        outer: (T, H).
        rate: of its own optimizer, AdamW.
    """

    def __init__(self, inner: Tensor, outer: Tensor, rate: float = 1e-3) -> None:
        self.inner, self.outer = inner.clone().requires_grad_(), outer.clone().requires_grad_()
        self._optimizer = torch.optim.AdamW([self.inner, self.outer], rate)

    @classmethod
    def fresh(cls, stream: Stream, sizes: tuple[int, int, int], rate: float, device: torch.device) -> Extractor:
        """Untrained, from a keyed stream; ``sizes`` are M, H and T."""
        inputs, hidden, bits = sizes
        drawn = torch.from_numpy(stream.normal(hidden * (inputs + bits))).float().to(device)
        inner, outer = torch.split(drawn, [hidden * inputs, hidden * bits])
        return cls(inner.reshape(hidden, inputs) / inputs**0.5, outer.reshape(bits, hidden) / hidden**0.5, rate)

    @classmethod
    def of(cls, secret: Secret, inputs: int, bits: int) -> Extractor:
        """The one that embedding learned.

        Raises:
            ParameterError: the secret is that of `keygen`, before embedding.
            ForgedSecretError: what it holds does not fit ``inputs`` and ``bits``.
        """
        if not {"inner", "outer", "clean"} <= secret.tensors.keys():
            raise ParameterError(
                "the secret holds no extractor",
                expected="the secret that embed returned",
                found="one from before embedding",
            )
        inner, outer, clean = (secret.tensors[name].float() for name in ("inner", "outer", "clean"))
        hidden, nets = inner.numel() // inputs, clean.numel() // bits
        found = [tuple(tensor.shape) for tensor in (inner, outer, clean)]
        if found != [(hidden, inputs), (bits, hidden), (nets, bits)] or nets < 2:
            raise ForgedSecretError("the learned extractor does not fit", expected=(inputs, bits), found=found)
        return cls(inner, outer)

    def __call__(self, rows: Tensor) -> Tensor:
        """(..., M) to logits (..., T)."""
        centered = rows - rows.mean(-1, keepdim=True)
        rows = centered / (centered.std(-1, keepdim=True) + 1e-12)
        return torch.tanh(rows @ self.inner.T) @ self.outer.T

    def teach(self, rows: Tensor, targets: Tensor) -> None:
        """One step towards ``targets`` (N, T) of 0 and 1 on ``rows`` (N, M), which must be detached."""
        self._optimizer.zero_grad()  # also drops what the model's own loss left here
        functional.binary_cross_entropy_with_logits(self(rows), targets).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def learned(self, clean: Tensor) -> dict[str, Tensor]:
        """What verification needs: the layers, and the logits (n, T) of clean nets that were held out."""
        return {"inner": self.inner, "outer": self.outer, "clean": clean}


@dataclass(frozen=True)
class LearnedNull(Null):
    """The larger p-value of two laws of the number of matching bits.

    ``clean`` ranks the suspect among independent nets, for the bits that the extractor was trained for.
    ``coins`` holds for any other bits, whatever the suspect: they are keyed, and the extractor never met
    them. A secret that was put together from both kinds passes one of them and not the other.
    """

    coins: Binomial
    clean: Population
    basis = Basis.POPULATION

    def __str__(self) -> str:
        return f"{self.clean}, and no less than {self.coins}"

    def log_p(self, statistic: float) -> float:
        """See `Null.log_p`."""
        return max(self.coins.log_p(statistic), self.clean.log_p(statistic))

    @property
    def floor(self) -> float:
        """That of the weaker law."""
        return max(self.coins.floor, self.clean.floor)


def score_bits(logits: Tensor, message: Tensor, clean: Tensor) -> Score:
    """Matches of what was read, ranked two-sided among what is read of clean nets.

    Args:
        logits: (T,) of the suspect.
        message: (T,) of 0 and 1.
        clean: (n, T) logits of nets that neither mark nor extractor has seen.
    """
    bits = len(message)
    read, others = (logits >= 0).double(), (clean >= 0).double()
    wrong = float((read != message).double().mean())
    rates = (others != message).double().mean(1)
    statistics = [_either_way(float(rate), bits) for rate in rates]
    details: dict[str, Any] = {
        "bits": bits,
        "ber": wrong,
        "effective_bits": effective_bits(others, message),
        "clean_ber": [float(rates.min()), float(rates.max())],
        "clean_below_quarter": int((rates < 0.25).sum()),
    }
    return Score(
        _either_way(wrong, bits),
        LearnedNull(Binomial(bits, 0.5, two_sided=True), Population.of(statistics)),
        details,
    )


def effective_bits(read: Tensor, message: Tensor) -> float:
    """How many fair coins would vary as much as what is read of clean nets; at most T.

    ``.25 / mean((BER - .5)**2)``, of each net against the message and of each against each other, the
    smaller: nets that all decode alike hold one bit, however far that is from the message.

    Args:
        read: (n, T) of 0 and 1, n >= 2.
        message: (T,) of 0 and 1.

    Example:
        >>> effective_bits(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 1.0]))
        1.0
    """
    nets, bits = read.shape
    signs = 2 * read.double() - 1
    overlaps = (signs @ signs.T / bits).square()
    between = (overlaps.sum() - overlaps.trace()) / (nets * (nets - 1))
    against = (signs @ (2 * message.double() - 1) / bits).square().mean()
    return round(1 / max(float(between), float(against), 1 / bits), 2)


def _either_way(rate: float, bits: int) -> float:
    wrong = round(rate * bits)
    return float(max(wrong, bits - wrong))
