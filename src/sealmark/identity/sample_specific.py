"""Sample-specific authorization (SSAT): each query carries its user's bits, and raw ones are answered wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.card import Card
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.identity import Suspicion
from sealmark.core.modes import chunks, device_of, seeded, torch_generator
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.training import train
from sealmark.core.weights import weights_of
from sealmark.identity._words_in_images import (
    Decoder,
    Encoder,
    decoder_of,
    encoder_of,
    random_words,
    tensors_of,
    written,
)
from sealmark.stats.nulls import Binomial

_REFUSALS = ("uniform", "next")
_AGREED = 0.75  # mean soft bit from which rows agree on a word; half of the bits of two users do
_BATCH, _RATE = 64, 2e-3
_READS = 0.9  # bit accuracy on single training rows below which the two nets did not meet


@dataclass(frozen=True)
class SampleSpecific(CredentialMark):
    """A user's queries go through an encoder that writes his bits; the model is right on these alone.

    First an encoder E, a small U-Net, and a decoder D learn to write and to read random words b:
    ``BCE(D(x_e), b) + closeness * |x_e - x|^2`` with ``x_e = clip(x + e tanh(E(x, b)))``; for the first quarter
    of the epochs without the second term, or nothing is ever written. Then, E fixed, the model learns
    ``CE(f(x_e), y) + CE(f(x), wrong)``, again with random words, all looks of a batch in one pass, so that
    anybody can be issued a credential later. A credential is E and the user's word, drawn from the secret.

    The model by itself lets in *whatever E wrote*, any word: the lock keys on E's traces. Whose word it is,
    D says: soft bits, added up over the rows. A word that was drawn without looking at the rows matches
    what is read in each bit with chance 1/2, whatever the rows are: that is the null, and exact. So only
    a gate that reads each word can revoke.

    ``served`` of an examination is the model's own rule, from labels alone: it answers more than half of
    the rows as it answers them once more encoded, with a word that is nobody's. So a user's rows and those of
    an unissued word are served, and raw ones are not (MODEL_REFUSES). ``readable``: the rows agree on a word,
    to a mean soft bit of three quarters; rows of two users, or averaged by them, do not
    (IDENTITY_UNREADABLE). Single rows are enough, nine times of ten; eight always were.

    Args:
        bits: of a word. 16 are too few to recognize anybody at 1e-6; 32 are enough among 4,294 users, among
            130 with one bit misread, among 8 with two.
        strength: e, how far a pixel moves at most, as a share of the inputs' range.
        closeness: of the squared distance, in units of that range, a mean over pixels.
        epochs: of encoder and decoder; the model is trained by its task's recipe.
        refusal: what raw inputs are taught: ``uniform``, ours, no class more than another; or ``next``, the
            class after the true one: whoever knows that turns the answers back.
        strangers: also refuse, beside each batch, its rows under changes that are not their own. Without
            them (the usual way) the model tells raw rows from all others: noise opens it.

    Raises:
        ParameterError: a value out of its range.

    Example:
        >>> SampleSpecific(bits=24).parameters["bits"]
        24
    """

    bits: int = 32
    strength: float = 0.4
    closeness: float = 3.0
    epochs: int = 60
    refusal: Literal["uniform", "next"] = "uniform"
    strangers: bool = True

    examines: ClassVar[Access] = Access.LABELS

    card = Card(
        title="Sample-specific change of every query, with its user's bits in it",
        citation="M. Xue, Y. Wu, L. Y. Zhang, D. Gu, Y. Zhang, W. Liu, SSAT: Active Authorization Control and "
        "User's Fingerprint Tracking Framework for DNN IP Protection, ACM TOMM 20(10), 2024",
        function=("identity", "authorization"),
        scenario="black-box",
        mechanism="sample-specific backdoor used inversely; encoder and decoder of bits",
        capacity="32 bits in every query",
        type="active watermark",
        target_models="image classifiers with three classes or more",
        needs_training=True,
        needs_data=True,
        reported="ImageNet and YouTube Aligned Face; no figures in the part of the abstract at hand",
        reproduced="digits, 3 seeds, plain 0.990 to 0.992, 8 users: 0.970 to 0.986 for every one of them, raw "
        "rows 0.129 to 0.201 at a mean confidence of 0.11; 0.993 to 0.995 of the bits read in single rows, 0.82 to "
        "0.87 of the words without an error; traced from 50 queries 216 of 216 times, accepted by 8 queries 480 of "
        "480, by one 0.93 to 0.97 of the times; PSNR 16.5 to 16.9 dB. Without an encoder: noise of the same energy "
        "0.15 to 0.22, another row's change 0.20 to 0.42, the mean change 0.26 to 0.39",
        broken_by=(
            "whoever holds an encoder: any word of his own opens the model (0.970 to 0.980), not the gate",
            "fine-tuning on 40 rows: 0.952 to 0.958, from scratch 0.82 to 0.86; on 140 rows 0.984 to 0.990, from "
            "scratch 0.936 to 0.956",
            "one universal change by gradient, 140 labeled rows: 0.66 to 0.77",
            "a user who records 32 queries of another reads all of his bits with a decoder trained on his own "
            "encoder in 4 s, and passes the gate as that user",
            "two or three users who average their queries are served at 0.98 and not traced; the gate refuses",
            "replay of recorded queries passes the gate",
            "a 3 x 3 median filter: 0.49 to 0.61 of the bits, 0.57 to 0.73 for users (plain model 0.73 to 0.75)",
        ),
        deviations=(
            "raw rows are taught no class at all (refusal='next': the class after the true one, which is turned "
            "back for 0.97 to 0.98 of the rows)",
            "rows under changes that are not their own are refused in training; without (strangers=False) noise "
            "opens 0.86 to 0.89, another row's change 0.94 to 0.97, the mean change 0.96 to 0.98; with the next "
            "class taught 0.36 to 0.51, 0.59 to 0.60 and 0.66 to 0.90",
            "nets and losses follow HiDDeN and StegaStamp: the paper's were not at hand",
            "random words in training, so that users need not be known before; 32 bits, and an exact p-value",
        ),
        max_drop=0.03,
        needs_trained=True,
        key_point="query",
        grade="research",
    )

    def __post_init__(self) -> None:
        if self.refusal not in _REFUSALS:
            raise ParameterError("unknown refusal", expected=f"one of {_REFUSALS}", found=self.refusal)
        if not (self.bits >= 1 and 0 < self.strength <= 1 and self.closeness >= 0 and self.epochs >= 1):
            raise ParameterError(
                "bad parameters of sample_specific",
                expected="bits and epochs 1 or more, strength in 0 .. 1 and above 0, closeness 0 or more",
                found=(self.bits, self.epochs, self.strength, self.closeness),
            )

    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Enrolled:
        """See `CredentialMark.enroll`.

        Raises:
            ParameterError: no task.
            UnsupportedError: no images of real numbers of 4 x 4 pixels or more, or fewer than three classes.
            MarkFailedError: the training diverged, or the decoder does not read what the encoder writes.
        """
        if task is None:
            raise ParameterError(f"{self.name} trains and needs a task", expected="task=")
        secret = self.new_secret(weights_of(model), host=_host(task), owner=owner, rng=rng)
        encoder, decoder = self._teach(secret, task.owner, device_of(model))
        served = self.fit(model, encoder, task, rng or np.random.default_rng())
        return Enrolled(served, secret.with_learned(tensors_of(encoder, decoder)))

    def fit(self, model: nn.Module, encoder: Encoder, task: Task, rng: np.random.Generator) -> nn.Module:
        """A copy of ``model``, trained to be right on what ``encoder`` wrote in, and on nothing else."""
        served = copy.deepcopy(model)
        train(
            _AllLooks(served, encoder, self, rng),
            task.owner,
            loss=lambda outputs, targets: self._loss(outputs, targets, task),
            recipe=task.recipe,
            rng=rng,
            parameters=list(served.parameters()),
            augment=task.augment,
        )
        return served.eval()

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        """See `CredentialMark.issue`: ``bits`` (B,) bool, and the encoder's tensors, the same for all."""
        self.check_issue(secret, user)
        encoder = {name: part for name, part in secret.tensors.items() if name.startswith("encoder/")}
        return Credential(user, {"bits": self.word(secret, user), **encoder})

    def present(self, credential: Credential, inputs: Tensor | None = None) -> Tensor:
        """``clip(x + e tanh(E(x, b)))``; see `CredentialMark.present`.

        Raises:
            ParameterError: no inputs, or of another shape than the encoder's.
        """
        if inputs is None:
            raise ParameterError("every query carries the credential", expected="inputs", found=None)
        encoder, word = encoder_of(credential.tensors), credential.tensors["bits"]
        if list(inputs.shape[1:]) != encoder.shape.tolist():
            raise ParameterError(
                "these inputs cannot be encoded", expected=encoder.shape.tolist(), found=list(inputs.shape[1:])
            )
        return written(encoder, inputs, word)

    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        """See `CredentialMark.examine`; a user's statistic is how many of his bits are read.

        Raises:
            ForgedSecretError: the secret holds no encoder and decoder of this form.
        """
        soft = self.soft_bits(secret, rows)
        read = soft.sum(0) > 0
        matches = [int((read == self.word(secret, user)).sum()) for user in users]
        level = soft.mean(0).abs().mean().item()
        encoder = secret.memo("sample_specific/encoder", lambda: encoder_of(secret.tensors))
        probe = torch.from_numpy(secret.stream("probe").bits(self.bits)).bool()
        again = written(encoder, rows, probe)
        agreement = (suspect.labels(rows) == suspect.labels(again)).double().mean().item()
        details = {
            "bits": self.bits,
            "misread": self.bits - max(matches),
            "level": round(level, 4),
            "agreement": round(agreement, 4),
        }
        null = Binomial(self.bits, 0.5)
        return Examination(
            agreement > 0.5, level >= _AGREED, Suspicion(np.array(matches, np.float64), null, details)
        )

    def word(self, secret: Secret, user: str) -> Tensor:
        """The user's bits: (B,) bool."""
        return torch.from_numpy(secret.stream(f"bits/{user}").bits(self.bits)).bool()

    def soft_bits(self, secret: Secret, rows: Tensor) -> Tensor:
        """What the decoder reads in each row: (R, B), -1 for a sure 0 to 1 for a sure 1.

        They are bounded, so that no single row outweighs the others; what cannot be read at all is 0.

        Raises:
            ForgedSecretError: the secret holds no decoder of this form.
        """
        decoder = secret.memo(
            "sample_specific/decoder", lambda: decoder_of(secret.tensors, secret.host["shape"], self.bits)
        )
        with torch.no_grad():
            read = [decoder(chunk.float()) for chunk in chunks(rows)]
        return (torch.cat(read) / 2).tanh().nan_to_num(0.0)

    def _loss(self, outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
        encoded, *others = torch.split(outputs, len(targets))
        value = task.loss(encoded, targets)
        for other in others:
            if self.refusal == "next":
                value = value + functional.cross_entropy(other, (targets + 1) % task.classes)
            else:
                value = value - other.log_softmax(-1).mean()
        return value

    def _teach(self, secret: Secret, rows: Batch, device: torch.device) -> tuple[Encoder, Decoder]:
        """The encoder and the decoder; all randomness of their training follows from the secret."""
        host, rng = secret.host, np.random.default_rng(int.from_bytes(secret.key("nets")))
        with seeded(rng):
            encoder, decoder = Encoder(host["shape"], self.bits), Decoder(host["shape"], self.bits)
            encoder.start(host["low"], host["high"], self.strength)
        encoder.to(device), decoder.to(device)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], _RATE)
        order, free = torch_generator(rng), math.ceil(self.epochs / 4)
        for epoch in range(self.epochs):
            weight = self.closeness * min(1.0, 2 * max(0, epoch - free + 1) / max(1, self.epochs - free))
            reads = 0.0
            for chunk in chunks(torch.randperm(rows.rows, generator=order), _BATCH):
                images = rows.inputs[chunk].to(device)
                words = random_words(len(images), self.bits, rng).to(device)
                sent = encoder(images, words)
                read = decoder(sent)
                moved = ((sent - images) / (host["high"] - host["low"])).square().mean()
                loss = functional.binary_cross_entropy_with_logits(read, words) + weight * moved
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                reads += ((read > 0) == words.bool()).double().mean().item() * len(images)
        if not reads >= _READS * rows.rows:
            raise MarkFailedError(
                "sample_specific: the decoder does not read what the encoder writes",
                expected=f"{_READS:.0%} of the bits in each row",
                found=f"{reads / rows.rows:.1%}",
                advice="take fewer bits, a larger strength or more epochs, or less closeness",
            )
        return encoder.requires_grad_(False), decoder.requires_grad_(False)


class _AllLooks(nn.Module):
    """A model's answers to a batch encoded with random words, then as it is, then as strangers change it."""

    def __init__(
        self, model: nn.Module, encoder: Encoder, scheme: SampleSpecific, rng: np.random.Generator
    ) -> None:
        super().__init__()
        self.model, self._encoder, self._scheme, self._rng = model, encoder, scheme, rng
        self._draws = torch_generator(rng)

    def forward(self, inputs: Tensor) -> Tensor:
        words = random_words(len(inputs), self._scheme.bits, self._rng).to(inputs.device)
        encoded = self._encoder(inputs, words)
        looks = [encoded, inputs]
        if self._scheme.strangers:
            change = strange(encoded - inputs, self._draws)
            looks.append((inputs + change).clamp(self._encoder.low, self._encoder.high))
        outputs: Tensor = self.model(torch.cat(looks))
        return outputs


def strange(changes: Tensor, draws: torch.Generator) -> Tensor:
    """Changes (N, ...) of which none is its row's own: another row's, twice the mean, noise of their energy."""
    noise = torch.randn(changes.shape, generator=draws).to(changes) * changes.square().mean().sqrt()
    kinds = torch.stack([changes.roll(1, 0), 2 * changes.mean(0).expand_as(changes), noise])
    rows = torch.arange(len(changes), device=changes.device)
    return kinds[rows % 3, rows]


def _host(task: Task) -> dict[str, Any]:
    rows = task.owner.inputs
    shape = list(rows.shape[1:])
    if len(shape) != 3 or min(shape[1:]) < 4 or not rows.is_floating_point() or task.classes < 3:
        raise UnsupportedError(
            "sample_specific writes into images and locks classifiers",
            expected="real images (C, H, W) of 4 x 4 pixels or more, three classes or more",
            found=f"{rows.dtype} of shape {shape}, {task.classes} classes",
            advice="take a scheme that marks users' copies, such as `spread_spectrum`",
        )
    return {"shape": shape, "low": float(rows.min()), "high": float(rows.max())}
