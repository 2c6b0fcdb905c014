"""Zhu et al. 2020: triggers and labels on a one-way chain, so that nobody can choose either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.inputs import keyed_inputs
from sealmark.blackbox.margin import MarginEmbedding
from sealmark.blackbox.triggers import TriggerMark, other_labels, picked_rows
from sealmark.core.canonical import sha256_hex
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.core.task import Task
from sealmark.crypto.random import Stream


@dataclass(frozen=True)
class HashChain(TriggerMark):
    """A secure watermarking protocol against forging: trigger i + 1 follows from trigger i, and so does its label.

    With state s_1 from the secret, and H = SHA-256 under separate domains,

        x_i = expand(s_i),  t_i = H("label", s_i, x_i) mod K,  s_{i+1} = H("next", s_i, x_i)

    A judge recomputes the chain from the seed and trusts nothing else. Hashing labels alone would not do: an
    accuser would change a pixel until the hash of the image is the class that an innocent model gives. On a
    chain the next image is forced. Matches on any model made without the seed are Bin(n, 1/K); what is left to
    a forger is to try seeds, which ``verify(..., tries=)`` pays for.

    Ours: the byte-exact derivation (the paper names a hash, no bytes), which takes the state along, so that a
    suspect that is asked one trigger cannot compute the next; smooth images, which outlast JPEG,
    random words for tasks of words, and ``looks="rows"``: the chain picks rows of a pool instead of drawing
    pixels, without replacement, and the label is one of the K - 1 classes that are wrong. The pool is fixed by
    its digest before the seed is drawn, so the choice is as free of the owner's will as pixels are.
    ``objective="margin"`` is that of Kim et al. 2023, see `sealmark.blackbox.margin`.

    Args:
        triggers: n; the paper has 100.
        looks: ``noise`` is the paper's, ``smooth``, or ``rows`` of the task.
        objective: ``plain`` is the paper's, or ``margin``.
        steps: of the margin's ascent.
        step: size of one, as a share of the inputs' range.
    """

    looks: Literal["noise", "smooth", "rows"] = "noise"
    objective: Literal["plain", "margin"] = "margin"
    steps: int = 5
    step: float = 0.04

    rule: ClassVar[float] = 0.9  # the paper's figure is not at hand; verification there is by a threshold
    card = Card(
        title="Triggers and labels on a hash chain that nobody can forge",
        citation="R. Zhu, X. Zhang, M. Shi, Z. Tang, Secure neural network watermarking protocol against forging "
        "attack, EURASIP Journal on Image and Video Processing 2020:37",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set) derived by a hash chain",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers of images, vectors or words",
        needs_training=True,
        needs_data=True,
        reported="forging is prevented and accuracy unchanged (from the abstract; figures not checked)",
        reproduced="digits, seeds 0 to 2: 30 of 30 triggers, log10 p -30, 7 queries in turn, 0.1 points lost; "
        "after fine-tuning (20 epochs at the owner's rate, also adversarially), pruning by half, blur, JPEG, noise "
        "30 of 30. With the plain objective blur leaves 9 to 17 of 30. Picked rows with the margin keep 5 to 18 of "
        "30 in extracted models, at 7 points of accuracy, and fine-tuning removes them",
        broken_by=(
            "training a new model on its answers (Lukas et al. 2022); measured here: 2 to 9 of 30 are left",
            "an autoencoder before the model (Namba and Sakuma 2019); measured here: 6 to 13 of 30 are left",
            "rejecting queries that look unlike the task (Hitaj and Mancini 2018; Li et al. 2022)",
        ),
        deviations=(
            "the derivation in bytes is ours",
            "smooth images, words, and rows of the task as triggers; the margin objective",
        ),
        max_drop=0.01,
        grade="recommended",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.looks in ("noise", "smooth", "rows") and self.objective in ("plain", "margin")
        if not known or self.steps < 1 or not self.step > 0:
            raise ParameterError(
                "bad parameters of hash_chain",
                expected="looks noise, smooth or rows, objective plain or margin, steps >= 1, step > 0",
                found=self.parameters,
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of inputs; the pool that rows are picked from."""
        form, tensors = super().bind(model, task, chosen, rng)
        if self.looks == "rows" and task is not None:
            pool = picked_rows(task, form, min(4 * self.triggers, task.owner.rows // 2), rng)
            if len(pool["inputs"]) < self.triggers:
                raise ParameterError("too few rows to pick from", expected=2 * self.triggers, found=task.owner.rows)
            tensors = {"pool": pool["inputs"], "pool natural": pool["natural"], "pool places": pool["places"]}
        return form, tensors

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Inputs and labels, from the first state on."""
        return secret.memo("hash chain", lambda: self._chain(secret))

    def options(self, secret: Secret) -> Tensor | None:
        """All classes; of a row that was picked, those that are wrong."""
        if self.looks != "rows":
            return None
        return other_labels(secret.tensors["pool natural"][self._links(secret)[1]], secret.host["classes"])

    def places(self, secret: Secret) -> Tensor | None:
        """See `TriggerMark.places`."""
        return secret.tensors["pool places"][self._links(secret)[1]] if self.looks == "rows" else None

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Triggers beside each batch, with the margin objective also moved ones."""
        if self.objective == "plain":
            return super().embedding(model, secret, task, rng)
        return MarginEmbedding(self, secret, model, self.steps, self.step)

    def _chain(self, secret: Secret) -> dict[str, Tensor]:
        numbers, links = self._links(secret)
        options = self.options(secret)
        if options is None:
            return {"inputs": links, "labels": numbers % secret.host["classes"]}
        labels = options.gather(1, (numbers % options.shape[1])[:, None])[:, 0]
        return {"inputs": secret.tensors["pool"][links], "labels": labels}

    def _links(self, secret: Secret) -> tuple[Tensor, Tensor]:
        """Of each trigger its 62-bit number, and its input, or which row of the pool it is."""

        def make() -> tuple[Tensor, Tensor]:
            state, numbers, links = secret.key("chain"), [], []
            left = list(range(len(secret.tensors["pool"]))) if self.looks == "rows" else []
            for _ in range(self.triggers):
                link = (
                    torch.tensor(left.pop(_number("row", state) % len(left)))
                    if left
                    else self._expand(state, secret)
                )
                shown = secret.tensors["pool"][link] if self.looks == "rows" else link
                numbers.append(_number("label", state, shown.numpy().tobytes()))
                links.append(link)
                state = _hash("next", state, shown.numpy().tobytes())
            return torch.tensor(numbers), torch.stack(links)

        return secret.memo("hash chain links", make)

    def _expand(self, state: bytes, secret: Secret) -> Tensor:
        stream, form = Stream(state), secret.host
        if self.looks == "smooth" or form.get("integer", False):
            return keyed_inputs(stream, 1, form)[0]
        return torch.from_numpy(stream.raw(math.prod(form["shape"]))).reshape(form["shape"])


def _hash(domain: str, *parts: bytes) -> bytes:
    return bytes.fromhex(sha256_hex(b"sealmark/hash_chain/", domain.encode(), b"\0", *parts))


def _number(domain: str, *parts: bytes) -> int:
    """62 bits, little-endian: a remainder by few classes is biased by less than 2 ** -50."""
    return int.from_bytes(_hash(domain, *parts)[:8], "little") >> 2
