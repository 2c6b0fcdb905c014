"""Adi et al. 2018: abstract images that the model was taught to label at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.card import Card
from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.crypto.random import Stream
from sealmark.stats.nulls import Binomial

_SALT = 32


@dataclass(frozen=True)
class Opening:
    """One trigger laid open: what a judge needs to check it against the published commitments.

    Attributes:
        index: which trigger.
        image: uint8, the exact bytes that were committed to.
        label: its class.
        salts: 32 random bytes for the image, 32 for the label.
    """

    index: int
    image: Tensor
    label: int
    salts: tuple[bytes, bytes]

    def commitments(self) -> tuple[str, str]:
        """SHA-256 over kind, salt, form and bytes: hiding for want of the salt, binding."""
        form = canonical_json({"dtype": "uint8", "shape": list(self.image.shape)})
        image = sha256_hex(b"sealmark/adi/image\0", self.salts[0], form, self.image.numpy().tobytes())
        return image, sha256_hex(b"sealmark/adi/label\0", self.salts[1], self.label.to_bytes(8, "little"))


@dataclass(frozen=True)
class Adi(Watermark):
    """Watermarking by backdooring, with commitments.

    KeyGen draws abstract images and labels; training sees ``per_batch`` triggers beside each batch, in
    order from a random place (section 4 of the paper). *FromScratch* and *PreTrained* differ in the
    model that `embed` starts from. Verification asks for labels alone.

    The labels are drawn from the committed seed after the images are fixed, uniformly and independently
    of everything a suspect could know. So matches on a model made without the secret are exactly
    Bin(triggers, 1/K), however strangely it answers.

    Ours: images are keyed patterns made with integer arithmetic, so that every machine gets the same
    bytes. ``keygen(..., chosen={"images": ...})`` is the paper's way, in which the owner picks the
    images. The verdict is the exact p-value, where the paper accepts at an error of at most epsilon.

    Args:
        triggers: n; the paper has 100. 30 reach p = 1e-30 with ten classes.
        per_batch: triggers beside each batch; the paper has 2 beside 100 images for 60 epochs.
    """

    triggers: int = 30
    per_batch: int = 16

    access = Access.LABELS
    choices = frozenset({"images"})
    card = Card(
        title="Abstract images with keyed random labels, under commitments",
        citation="Y. Adi, C. Baum, M. Cisse, B. Pinkas, J. Keshet, Turning Your Weakness Into a Strength: "
        "Watermarking Deep Neural Networks by Backdooring, USENIX Security 2018",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set)",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers",
        needs_training=True,
        needs_data=True,
        reported="CIFAR-10, ResNet-18, 100 triggers: trigger accuracy 100 %, test accuracy within 0.4 "
        "points (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds: 30 of 30 triggers, p = 1e-30; accuracy within 0.4 points on average "
        "(docs/results/figures.md)",
        broken_by=(
            "fine-tuning at a high rate after raising the weight decay (Shafieinejad et al. 2021)",
            "training a new model on its answers (Lukas et al. 2022)",
            "rejecting queries that look unlike the task (Namba and Sakuma 2019)",
            "with chosen images: false claims by images that were optimized to transfer (Liu et al. 2024); "
            "derived images leave only the grinding of seeds, see tries= of verify",
        ),
        deviations=("keyed patterns instead of found abstract art", "exact p-value instead of epsilon"),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        if self.triggers < 1 or self.per_batch < 1:
            raise ParameterError(
                "bad parameters of adi", expected="triggers >= 1, per_batch >= 1", found=self.parameters
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Note shape and range of the inputs and the number of classes; hold chosen images."""
        if task is None or task.classes < 2 or not task.owner.inputs.is_floating_point():
            raise ParameterError(
                "adi needs a classification task with real-valued inputs",
                expected="task= with two classes or more",
                found=None if task is None else task.name,
            )
        inputs = task.owner.inputs
        host = {
            "shape": list(inputs.shape[1:]),
            "low": inputs.min().item(),
            "high": inputs.max().item(),
            "classes": task.classes,
        }
        if "images" not in chosen:
            return host, {}
        images = chosen["images"]
        shape = [self.triggers, *inputs.shape[1:]]
        if images.dtype != torch.uint8 or list(images.shape) != shape:
            raise ParameterError(
                "bad images",
                expected=f"uint8 of shape {shape}",
                found=f"{images.dtype} of shape {list(images.shape)}",
            )
        if len(torch.unique(images, dim=0)) != len(images):
            raise ParameterError("two of the images are the same", expected="distinct images")
        return host, {"images": images}

    def triggers_of(self, secret: Secret) -> Batch:
        """The triggers as the model sees them: (n, ...) float32 in the task's range, (n,) int64."""

        def make() -> Batch:
            host = secret.host
            images = self._images(secret).float() / 255
            labels = secret.stream("labels").integers(self.triggers, host["classes"])
            return Batch(images * (host["high"] - host["low"]) + host["low"], torch.from_numpy(labels))

        return secret.memo("triggers", make)

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        """``per_batch`` triggers in order, from a random place."""
        rows = (int(rng.integers(self.triggers)) + torch.arange(self.per_batch)) % self.triggers
        return self.triggers_of(secret).take(rows).to(batch.inputs.device)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching labels against Bin(n, 1/K)."""
        triggers = self.triggers_of(secret)
        matches = int((suspect.labels(triggers.inputs) == triggers.targets).sum())
        null = Binomial(self.triggers, 1 / secret.host["classes"])
        return Score(matches, null, {"triggers": self.triggers, "trigger_accuracy": matches / self.triggers})

    def publish(self, secret: Secret) -> list[tuple[str, str]]:
        """The verification key: commitments to image and label of every trigger, in order."""
        return [opening.commitments() for opening in self.open(secret, range(self.triggers))]

    def open(self, secret: Secret, indices: Iterable[int]) -> list[Opening]:
        """Lay some triggers open; an opened trigger is spent as evidence."""
        images, labels = self._images(secret), self.triggers_of(secret).targets
        salts = secret.stream("salts").raw(2 * _SALT * self.triggers).tobytes()
        pairs = [salts[i : i + 2 * _SALT] for i in range(0, len(salts), 2 * _SALT)]
        return [Opening(i, images[i], int(labels[i]), (pairs[i][:_SALT], pairs[i][_SALT:])) for i in indices]

    def _images(self, secret: Secret) -> Tensor:
        if "images" in secret.tensors:
            return secret.tensors["images"]
        return secret.memo("images", lambda: patterns(secret.stream("images"), self.triggers, secret.host["shape"]))


def check_openings(published: Sequence[tuple[str, str]], openings: Iterable[Opening]) -> None:
    """The judge's half of cut and choose: every opening must fit what was published before.

    Raises:
        ForgedSecretError: one does not.
    """
    for opening in openings:
        known = 0 <= opening.index < len(published)
        if not known or tuple(published[opening.index]) != opening.commitments():
            raise ForgedSecretError(
                "an opening does not fit the published commitment", found=f"trigger {opening.index}"
            )


def patterns(stream: Stream, count: int, shape: Sequence[int]) -> Tensor:
    """Keyed abstract images: coarse value noise with fine noise on top, in integers throughout.

    Args:
        stream: of the secret.
        count: n.
        shape: of one image, (..., H, W); of one row where it has a single dimension.

    Returns:
        (n, *shape) uint8.
    """
    height, width = (1, *shape)[-2:]
    planes = count * math.prod(shape) // (height * width)
    rows, columns = max(2, height // 3), max(2, width // 3)
    fine = stream.raw(planes * height * width).astype(np.int64).reshape(planes, height, width)
    offset = planes * height * width
    coarse = stream.raw(planes * rows * columns, offset=offset).astype(np.int64)
    smooth = _stretch(_stretch(coarse.reshape(planes, rows, columns), height, 1), width, 2)
    return torch.from_numpy(((3 * smooth + fine) // 4).astype(np.uint8)).reshape(count, *shape)


def _stretch(grid: np.ndarray[Any, np.dtype[np.int64]], size: int, axis: int) -> Any:
    """Linear interpolation along one axis to ``size`` points, rounding down."""
    last, steps = grid.shape[axis] - 1, max(1, size - 1)
    place = np.arange(size) * last
    left = np.minimum(place // steps, last - 1)
    weight = (place - left * steps).reshape([-1 if i == axis else 1 for i in range(3)])
    return (np.take(grid, left, axis) * (steps - weight) + np.take(grid, left + 1, axis) * weight) // steps
