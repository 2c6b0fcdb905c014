"""Uchida et al. 2017: bits in the mean filter of one layer, put there by a regularizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Score
from sealmark.core.hosts import choose_host, filter_length, mean_filter, read_mean_filter, without_mean_filter
from sealmark.core.modes import chunks, evaluating
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap
from sealmark.crypto.random import Stream
from sealmark.stats.nulls import score_of_bits


@dataclass(frozen=True)
class Uchida(Watermark):
    """Weight regularizer with a secret random projection.

    The host vector w is the layer's weight averaged over its output filters, so that their order does
    not matter. The loss gains ``strength * sum_j BCE(sigmoid(X w)_j, b_j)`` (eq. 4 of the paper; a sum
    over bits, not a mean). A bit is read as ``(X w)_j >= 0``.

    Embedding from scratch, by fine-tuning, or in the user's own loop (`sealmark.attach`) differ in the
    model that one starts from and in nothing else. Distilling needs no labels: see ``distill``.

    Ours: X and b are derived from the committed seed, where the paper draws X at will and its code sets
    every b to one. So the number of matching bits is exactly Bin(bits, 1/2) on any suspect made without
    the secret, whatever X: the bits of b are the coins. The test is two-sided: weight shifting inverts
    the mean filter, and with it every bit of every kind of X, instead of erasing the mark.

    Args:
        layer: name of the weight tensor; empty for the largest host that has room for ``bits``.
        bits: T, the length of the message; at most the host's length M, and BER 0 wants T well under M.
        strength: lambda. The paper's 0.01 suits 576 hosts and 200 epochs; small nets want more. ``direct``
            and ``diff`` move one or two entries a bit where ``random`` moves all of them, and want about
            1: at 0.02 a tenth to a third of the bits stays wrong on the digits.
        projection: ``random``: X is standard normal. ``direct``: a one in each row, in distinct columns.
            ``diff``: a one and a minus one in each row, all in distinct columns, so that 2 T <= M.
        objective: ``bce`` is the paper's and never stops pushing, which widens the weights for all to
            see. ``hinge`` is ours: ``strength * sum_j max(0, margin - (2 b_j - 1) (X w)_j)`` stops at the
            margin, so that few bits hide in the distribution of the weights. It is covert, not stubborn:
            a stronger mark on top displaces it, see ``broken_by``.
        margin: of the hinge; about half of the standard deviation of (X w)_j in unmarked models.
        distill: train against the answers of the model that embedding starts from, which must be
            trained, instead of the labels; those are not read.
    """

    layer: str = ""
    bits: int = 256
    strength: float = 0.02
    projection: Literal["random", "direct", "diff"] = "random"
    objective: Literal["bce", "hinge"] = "bce"
    margin: float = 0.03
    distill: bool = False

    access = Access.WEIGHTS
    carries_payload = True
    card = Card(
        title="Bits in a layer's mean filter, by a regularizer",
        citation="Y. Uchida, Y. Nagai, S. Sakazawa, S. Satoh, Embedding Watermarks into Deep Neural Networks, "
        "ICMR 2017; Y. Nagai et al., Digital watermarking for deep neural networks, IJMIR 7, 2018",
        function=("ownership",),
        scenario="white-box",
        mechanism="weight regularizer, secret random projection",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with a convolutional or linear layer",
        needs_training=True,
        needs_data=True,
        reported="256 bits in WRN-10-4 on CIFAR-10; survives fine-tuning and pruning of 65 % of the "
        "weights (abstract)",
        reproduced="digits, 3 seeds: 256 bits at BER 0 and p = 2e-77, from scratch, by fine-tuning, in an own "
        "loop (docs/results/figures.md), by distilling, and with direct and diff at strength 1; accuracy .988 to "
        ".991 on average, .991 without a mark; BER 0 after 20 epochs of fine-tuning, pruning of 50 % and int8; "
        "overwriting at the same and at ten times the strength: BER .05 and .25 (p <= 1e-13), direct 0 and .15, "
        "diff 0 and 0. Kolmogorov-Smirnov distance of the mean filter to unmarked models: random .43, direct "
        ".13, diff .25, the hinge .10, unmarked .03 to .04; 64 bits in conv3: bce .47, the hinge .04 to .06, "
        "unmarked .03 to .06. ResNet-9 on CIFAR-10, one seed: BER 0 at 1.4 points for the paper's lambda, at 0.1 "
        "with the hinge (experiments)",
        broken_by=(
            "permuting the input channels of the layer, or dummy neurons, at no cost in accuracy "
            "(Yan et al. 2022, 2023), unless the suspect is aligned to the original first",
            "training a new model on its answers (Lukas et al. 2022)",
            "detection and overwriting through the weights' variance (Wang and Kerschbaum 2019); with the hinge "
            "the variance does not show, but overwriting at ten times the strength takes 64 bits in conv3 to BER "
            ".41 to .52 and 256 in fc1 to .31 to .40, at no cost in accuracy (measured, 3 seeds)",
        ),
        deviations=("keyed X and b", "two-sided exact test instead of BER = 0", "the hinge, as a mode"),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        numbers = self.bits >= 1 and self.strength > 0 and self.margin > 0
        if not numbers or self.projection not in _ENTRIES or self.objective not in ("bce", "hinge"):
            raise ParameterError(
                "bad parameters of uchida",
                expected="bits >= 1, strength and margin > 0, projection random, direct or diff, "
                "objective bce or hinge",
                found=self.parameters,
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer and note its form."""
        layer, info = choose_host(
            model, self.layer, room=lambda info: filter_length(info) // _ENTRIES[self.projection], need=self.bits
        )
        return {"layer": layer, "length": filter_length(info)}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``projection`` X: (T, M) float32; ``message`` b: (T,) float32 of 0 and 1."""

        def draw() -> dict[str, Tensor]:
            stream, length = secret.stream("projection"), int(secret.host["length"])
            return {
                "projection": _projection(self.projection, stream, self.bits, length),
                "message": torch.from_numpy(payload_bits(secret, self.bits)).float(),
            }

        return secret.memo("uchida", draw)

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """``strength`` times the sum over the bits of the objective."""
        weight = model.get_parameter(secret.host["layer"])
        key = self.derive_on(secret, weight.device)
        logits = key["projection"] @ mean_filter(weight).float()
        if self.objective == "hinge":
            return self.strength * (self.margin - (2 * key["message"] - 1) * logits).relu().sum()
        return self.strength * functional.binary_cross_entropy_with_logits(logits, key["message"], reduction="sum")

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """See `Watermark.embedding`.

        Raises:
            ParameterError: ``distill``, in a loop whose loss is another's.
        """
        if self.distill and (task is None or task.loss is not soft_cross_entropy):
            raise ParameterError(
                "uchida that distills cannot share a loop with labels",
                expected="Uchida.embed, or a task of `distilled`",
                found="a loop of your own" if task is None else f"the task {task.name}",
                advice="pass distill=False",
            )
        return super().embedding(model, secret, task, rng)

    def lesson(self, model: nn.Module, secret: Secret, task: Task) -> Task:
        """See `Watermark.lesson`: the model's own answers are the targets where it distills."""
        return distilled(task, model) if self.distill else task

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits against Bin(bits, 1/2), two-sided."""
        read = self._read(suspect, secret)
        matches = int((read == self.parts(secret)["message"].numpy()).sum())
        return score_of_bits(matches, self.bits)

    def blind(self, secret: Secret) -> TensorMap:
        """The layer without its mean filter, which is all that is read of it."""
        return without_mean_filter(secret.host["layer"])

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        self.check_secret(secret)
        return payload_bytes(secret, self._read(suspect, secret))

    def _read(self, suspect: Suspect, secret: Secret) -> np.ndarray[Any, np.dtype[np.uint8]]:
        layer, length = secret.host["layer"], secret.host["length"]
        bits = (self.parts(secret)["projection"] @ read_mean_filter(suspect, layer, length)) >= 0
        return bits.numpy().astype(np.uint8)


_ENTRIES = {"random": 1, "direct": 1, "diff": 2}  # of the host, that a bit needs at the least


def soft_cross_entropy(outputs: Tensor, soft: Tensor) -> Tensor:
    """Cross-entropy of logits (..., K) against probabilities (..., K), averaged over all but the last."""
    return -(soft * outputs.log_softmax(-1)).sum(-1).mean()


def distilled(task: Task, teacher: nn.Module) -> Task:
    """The same task with the teacher's soft answers in place of the owner's labels, which are not read.

    Args:
        task: with classes.
        teacher: answers with logits (..., K); is left as it is.

    Raises:
        ParameterError: the task has no classes.
    """
    if not task.classes:
        raise ParameterError("nothing to distill", expected="a task with classes", found=task.name)
    inputs = task.owner.inputs
    with evaluating(teacher) as device:
        soft = torch.cat([teacher(chunk.to(device)).softmax(-1).to(inputs.device) for chunk in chunks(inputs)])
    return dataclasses.replace(task, owner=Batch(inputs, soft), loss=soft_cross_entropy)


def _projection(kind: str, stream: Stream, bits: int, length: int) -> Tensor:
    """X of that kind: (bits, length) float32."""
    if kind == "random":
        return torch.from_numpy(stream.normal(bits * length)).float().reshape(bits, length)
    rows, columns = torch.arange(bits), torch.from_numpy(stream.permutation(length))
    matrix = torch.zeros(bits, length)
    matrix[rows, columns[:bits]] = 1
    if kind == "diff":
        matrix[rows, columns[bits : 2 * bits]] = -1
    return matrix
