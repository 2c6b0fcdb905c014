"""Adi et al. 2018: abstract images that the model was taught to label at random, and the public protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from sealmark.blackbox.inputs import keyed_inputs, unpack
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.card import Card
from sealmark.core.errors import ForgedSecretError
from sealmark.core.evidence import DEFAULT_ALPHA, Evidence, Score, judge
from sealmark.core.secret import Secret
from sealmark.core.suspect import Suspect
from sealmark.crypto.random import Stream
from sealmark.stats.nulls import Binomial

_SALT = 32
_UNIFORM = 1e-3  # opened labels less likely than this were not drawn at random


@dataclass(frozen=True)
class Opening:
    """One trigger laid open: what a judge needs to check it against the published commitments.

    Attributes:
        index: which trigger.
        packed: the exact bytes that were committed to, uint8 or int64.
        label: its class.
        salts: 32 random bytes for the input, 32 for the label.
    """

    index: int
    packed: Tensor
    label: int
    salts: tuple[bytes, bytes]

    def commitments(self) -> tuple[str, str]:
        """SHA-256 over kind, salt, form and bytes: hiding for want of the salt, binding."""
        kind = str(self.packed.dtype).removeprefix("torch.")
        form = canonical_json({"dtype": kind, "shape": list(self.packed.shape)})
        image = sha256_hex(b"sealmark/adi/image\0", self.salts[0], form, self.packed.numpy().tobytes())
        return image, sha256_hex(b"sealmark/adi/label\0", self.salts[1], self.label.to_bytes(8, "little"))


@dataclass(frozen=True)
class Published:
    """The verification key of the paper: what the owner publishes before release.

    Attributes:
        form: of inputs and labels, see `sealmark.blackbox.inputs.form_of`.
        commitments: to the input and the label of each trigger.
    """

    form: Mapping[str, Any]
    commitments: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all of it: what a time stamp is taken of."""
        return sha256_hex(b"sealmark/adi/published\0", canonical_json([dict(self.form), self.commitments]))

    def inspected(self, beacon: bytes) -> list[int]:
        """The half that is opened for inspection: drawn from public randomness that nobody could foresee.

        Args:
            beacon: public and random, from after the publication: both sides must trust it.
        """
        key = bytes.fromhex(sha256_hex(b"sealmark/adi/beacon\0", self.digest.encode(), beacon))
        order = Stream(key).permutation(len(self.commitments))
        return sorted(int(index) for index in order[: len(order) // 2])


@dataclass(frozen=True)
class Adi(TriggerMark):
    """Watermarking by backdooring, with commitments.

    KeyGen draws abstract images and labels; training sees ``per_batch`` triggers beside each batch, in
    order from a random place (section 4 of the paper). *FromScratch* and *PreTrained* differ in the
    model that `embed` starts from. Verification asks for labels alone.

    The labels are drawn from the committed seed after the images are fixed, uniformly and independently
    of everything a suspect could know. So matches on a model made without the secret are exactly
    Bin(triggers, 1/K), however strangely it answers.

    Ours: images are keyed patterns made with integer arithmetic, so that every machine gets the same
    bytes. ``keygen(..., chosen={"inputs": ...})`` is the paper's way, in which the owner picks the
    images, packed as `sealmark.blackbox.inputs.pack` does. Tasks of words get random words. The verdict is
    the exact p-value, where the paper accepts at an error of at most epsilon.

    Verification in public is `Published` and `verify_publicly`. Whoever may see the secret should verify
    with it instead: then labels are checked to be random, not only to look it.

    Args:
        triggers: n; the paper has 100.
        per_batch: the paper has 2 beside 100 images for 60 epochs.
    """

    choices = frozenset({"inputs"})
    rule: ClassVar[float] = 0.9  # the paper leaves epsilon open and reports 100 %
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

    def draw(self, secret: Secret) -> Tensor:
        """Keyed patterns, or random words."""
        return keyed_inputs(secret.stream("images"), self.triggers, secret.host)

    def publish(self, secret: Secret) -> Published:
        """The verification key: commitments to input and label of every trigger, in order."""
        opened = self.open(secret, range(self.triggers))
        return Published(dict(secret.host), tuple(opening.commitments() for opening in opened))

    def open(self, secret: Secret, indices: Iterable[int]) -> list[Opening]:
        """Lay some triggers open; an opened trigger is spent as evidence."""
        packed = secret.tensors["inputs"] if "inputs" in secret.tensors else self.derive(secret)["inputs"]
        labels = self.derive(secret)["labels"]
        salts = secret.stream("salts").raw(2 * _SALT * self.triggers).tobytes()
        pairs = [salts[i : i + 2 * _SALT] for i in range(0, len(salts), 2 * _SALT)]
        return [Opening(i, packed[i], int(labels[i]), (pairs[i][:_SALT], pairs[i][_SALT:])) for i in indices]


def check_openings(published: Published, openings: Iterable[Opening]) -> None:
    """Every opening must fit what was published before.

    Raises:
        ForgedSecretError: one does not.
    """
    for opening in openings:
        known = 0 <= opening.index < len(published.commitments)
        if not known or published.commitments[opening.index] != opening.commitments():
            raise ForgedSecretError(
                "an opening does not fit the published commitment", found=f"trigger {opening.index}"
            )


def verify_publicly(
    suspect: Suspect,
    published: Published,
    openings: Sequence[Opening],
    *,
    beacon: bytes,
    alpha: float = DEFAULT_ALPHA,
) -> Evidence:
    """The judge's side, without the secret: cut and choose, then count (section 5 of the paper).

    Half of the triggers, which ``beacon`` chooses, is inspected: inputs must differ, labels must look drawn
    at random. The other half is put to the suspect. All of them are spent afterwards.

    That labels look random does not prove that they are, and inspection cannot see that images were optimized
    to be answered so by every model (Liu et al. 2024). A verdict that withstands that needs the secret.

    Args:
        suspect: answers with labels.
        published: from before the model was released.
        openings: of every trigger.
        beacon: see `Published.inspected`.
        alpha: largest accepted chance of a false claim.

    Raises:
        ForgedSecretError: an opening does not fit, one is missing, inputs repeat, or the inspected labels
            do not look random.
    """
    check_openings(published, openings)
    by_index = {opening.index: opening for opening in openings}
    inspected = published.inspected(beacon)
    asked = [index for index in range(len(published.commitments)) if index not in set(inspected)]
    if len(by_index) != len(published.commitments) or len(openings) != len(by_index) or not inspected:
        raise ForgedSecretError(
            "not every trigger was opened once", expected=len(published.commitments), found=len(openings)
        )
    inputs = torch.stack([by_index[index].packed for index in range(len(by_index))])
    if len(torch.unique(inputs, dim=0)) != len(inputs):
        raise ForgedSecretError("two of the triggers are the same")
    classes = int(published.form["classes"])
    counts = np.bincount([by_index[index].label for index in inspected], minlength=classes)
    if len(counts) > classes or chisquare(counts).pvalue < _UNIFORM:
        raise ForgedSecretError("the inspected labels do not look random", found=counts.tolist())
    before = suspect.queries
    answers = suspect.labels(unpack(inputs[asked], published.form))
    matches = sum(int(answer) == by_index[index].label for answer, index in zip(answers, asked, strict=True))
    return judge(
        Score(matches, Binomial(len(asked), 1 / classes), {"inspected": len(inspected), "asked": len(asked)}),
        alpha=alpha,
        scheme="adi",
        commitment=published.digest,
        queries=suspect.queries - before,
    )
