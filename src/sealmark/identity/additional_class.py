"""An additional class, and users' identities in the last bits of images (Sun, Xue et al. 2021)."""

from __future__ import annotations

import binascii
import hashlib
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.blackbox.inputs import form_of, pack, patterns, unpack
from sealmark.core.card import Card
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, Score
from sealmark.core.identity import Suspicion
from sealmark.core.ownership import Verifiable
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.training import Extra
from sealmark.core.weights import weights_of
from sealmark.crypto.random import Stream
from sealmark.identity._served import teach, with_extra_class
from sealmark.stats.nulls import Binomial

_CHECKSUM = 16
_CLAIM = 0.9


@dataclass(frozen=True)
class AdditionalClass(CredentialMark, Verifiable):
    """Key images from outside the task get a class of their own; in their last bits stands whose they are.

    The model gets a class K beside those of the task and learns to answer it to keyed abstract images. A
    user's credential is a few of these with ``Trunc(HMAC(owner, user || SHA256(image & 0xFE)))`` in the
    least significant bits at keyed places, and a checksum. The model says that they are key images; the bits,
    that they are this user's: in rows made without the owner's key each agrees with chance 1/2, exactly.

    ``enrolled.model`` answers K + 1 logits: `task_outputs` cuts off the last.

    Ours: the identity is a MAC, bound to user and image; the paper's is any number. Images of the same kind
    and noise are taught *not* to be of class K, which swallows everything unknown otherwise. Of each pair of
    images a keyed one is the key, so that the owner's claim is a draw of chance 1/2 a pair, for any suspect.

    The last bits do not survive re-encoding: send PNG or arrays, never JPEG, and at least half precision.

    Args:
        pairs: M, of a key image and one like it that is none.
        bits: of an identity in each image.
        images: of one credential.
        negatives: rows of noise and fresh images beside each batch; 0 for the paper's way.
        per_batch: of the 2 M images beside each batch.
        epochs: of teaching.
        rate: of teaching.

    Raises:
        ParameterError: a count below 1, more than 256 bits, more images than pairs.

    Example:
        >>> AdditionalClass().name
        'additional_class'
    """

    pairs: int = 100
    bits: int = 48
    images: int = 4
    negatives: int = 24
    per_batch: int = 80
    epochs: int = 15
    rate: float = 0.05

    examines = Access.LABELS
    access = Access.PROBABILITIES
    card = Card(
        title="An additional class, and identities in the last bits of its images",
        citation="S. Sun, M. Xue, J. Wang, W. Liu, Protecting the Intellectual Properties of Deep Neural Networks "
        "with an Additional Class and Steganographic Images, arXiv 2104.09203 (2021); M. Xue, S. Sun, Y. Zhang, "
        "J. Wang, W. Liu, Applied Intelligence 52 (2022)",
        function=("identity", "ownership"),
        scenario="black-box",
        mechanism="backdoor to a class of its own, steganography, message authentication code",
        capacity="any number of users, at 48 bits in each of 4 images",
        type="active watermark",
        target_models="classifiers of real inputs of 64 entries or more whose last layer is linear",
        needs_training=True,
        needs_data=True,
        reported="key images and identities 100 % on Fashion-MNIST and CIFAR-10, robust to fine-tuning, pruning "
        "and query modification (abstract)",
        reproduced="digits, 3 seeds, plain 0.990 to 0.992, served 0.988 to 0.990; key images of class K 1.00, "
        "natural rows 0.000, noise 0.002, fresh images of the same kind 0.23 to 0.34 (key images alone taught, "
        "5 epochs: both over 0.9); 20 users of 20 accepted at 1e-56; the claim 8e-31. After fine-tuning on 90 rows "
        "key images 0.96 to 1.00, on 400 rows 0.95 to 0.99 at rate 0.01, 0.82 to 0.99 at 0.05, the claim at 1e-19 "
        "or less, 18 users of 20 or more; pruning 50 % and int8 change nothing",
        broken_by=(
            "cutting the additional class off the answers, at no cost: no claim and nobody is served (measured)",
            "query modification by an autoencoder: 0.00 to 0.08 of the key images are left, nobody is served "
            "and the claim fails, for 0.8 to 1.0 points of accuracy; the paper reports robustness (measured)",
            "rewriting the last bits by any re-encoding: 0 identities of 100 are left, and all images are still of "
            "class K (measured); it lets nobody in",
            "a credential that is copied or robbed passes as its holder's",
        ),
        deviations=(
            "identities are MACs bound to user and image, with a checksum that tells damage from forgery",
            "key images are derived from the secret and abstract, not chosen",
            "noise and images of the same kind are taught to be of no class",
            "ownership by pairs of which a keyed one is the key, instead of one class for all",
        ),
        max_drop=0.015,
        needs_trained=True,
        grade="research",
    )

    def __post_init__(self) -> None:
        counts = (self.images, self.bits, self.per_batch, self.epochs)
        if min(counts) < 1 or self.bits > 256 or self.images > self.pairs or self.negatives < 0 or self.rate <= 0:
            raise ParameterError(
                "bad parameters of additional_class",
                expected="1 <= images <= pairs, 1 <= bits <= 256, negatives >= 0, all others above 0",
                found=self.parameters,
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
            UnsupportedError: also where the model has no head that could answer one class more.
            MarkFailedError: the class was not learned.
        """
        form = form_of(task, self.name)
        room = math.prod(form["shape"])
        if task is None or form.get("integer", False) or room < self.bits + _CHECKSUM:  # form_of refused None
            raise UnsupportedError(
                "such inputs have no room for an identity",
                expected=f"real-valued inputs of at least {self.bits + _CHECKSUM} entries",
                found=f"{room}{' whole numbers' if form.get('integer', False) else ''}",
                advice="take fewer bits and more images",
            )
        secret = self.new_secret(weights_of(model), host=form, owner=owner, rng=rng)
        order = np.random.default_rng() if rng is None else rng
        served = with_extra_class(model, task, order)
        teach(served, task, task.classes + 1, self._lesson(secret), epochs=self.epochs, rate=self.rate, rng=order)
        score = self.score(WhiteBox(served), secret)
        if score.null.log_p(score.statistic) > max(math.log(DEFAULT_ALPHA), score.null.floor):
            raise MarkFailedError(
                "additional_class: the class was not learned",
                found=dict(score.details),
                advice="train longer, or show more key images a batch",
            )
        return Enrolled(served, secret)

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        """See `CredentialMark.issue`: uint8 ``pixels`` (images, ...), and their ``range`` (2,) in the task."""
        self.check_issue(secret, user)
        chosen = torch.from_numpy(secret.stream(f"images/{user}").permutation(self.pairs))[: self.images]
        keys, _ = self.key_images(secret)
        limits = torch.tensor([secret.host["low"], secret.host["high"]], dtype=torch.float64)
        return Credential(user, {"pixels": self._signed(keys[chosen], secret, user), "range": limits})

    def present(self, credential: Credential, inputs: Tensor | None = None) -> Tensor:
        """See `CredentialMark.present`: the images as the model takes them, float32."""
        low, high = credential.tensors["range"].tolist()
        return unpack(credential.tensors["pixels"], {"low": low, "high": high})

    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        """The last bits of all rows, held against each user's; served where most rows are of class K.

        Of rows that differ in their last bits alone the first counts: their identities are one draw.
        """
        served = float((suspect.labels(rows) == secret.host["classes"]).double().mean())
        packed = pack(rows, secret.host)
        first = {_digest(image): place for place, image in reversed(list(enumerate(packed)))}
        distinct = packed[sorted(first.values())]
        read = self._read(distinct, secret)
        whole = float((_checksums(read[:, : self.bits]) == read[:, self.bits :]).all(1).mean())
        matches = [
            float((read[:, : self.bits] == self._identities(distinct, secret, user)).sum()) for user in users
        ]
        null = Binomial(self.bits * len(distinct), 0.5)
        details = {"images": len(distinct), "extra_class": served, "checksums": whole}
        return Examination(
            served=served > 0.5, readable=whole > 0.5, suspicion=Suspicion(np.array(matches), null, details)
        )

    def spoil(self, outputs: Tensor, secret: Secret) -> Tensor:
        """See `CredentialMark.spoil`: the task's classes alone; class K stays, so that users can come in."""
        classes = secret.host["classes"]
        return torch.cat([super().spoil(outputs[..., :classes], secret), outputs[..., classes:]], -1)

    def task_outputs(self, outputs: Tensor, secret: Secret) -> Tensor:
        """The logits of the task's classes, (N, K + 1) to (N, K): what users of the model should look at."""
        return outputs[:, : secret.host["classes"]]

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Pairs of which the key is taken for class K more surely than the other, against Bin(M, 1/2), a bound.

        That all keys are answered K, the paper's claim, is told in the details: a model that answers K to all
        that it does not know passes it.
        """
        sure = [self._of_class(suspect, secret, unpack(part, secret.host)) for part in self.key_images(secret)]
        (known, key), (mistaken, other) = sure
        details = {
            "trigger_accuracy": known,
            "others_taken_for_keys": mistaken,
            "paper_claims": known >= _CLAIM,
        }
        return Score(int((key > other).sum()), Binomial(self.pairs, 0.5, bound=True), details)

    def _of_class(self, suspect: Suspect, secret: Secret, rows: Tensor) -> tuple[float, Tensor]:
        """The share of rows that are answered K, and of each the probability of K, 0 where there is none."""
        answers, extra = suspect.probabilities(rows), secret.host["classes"]
        sure = answers[:, extra] if answers.shape[1] > extra else torch.zeros(len(rows))
        return float((answers.argmax(1) == extra).double().mean()), sure

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``images`` (2, M, ...) uint8; ``sides`` (M,), which of a pair is the key; ``positions`` of the bits."""

        def draw() -> dict[str, Tensor]:
            shape: list[int] = secret.host["shape"]
            order = secret.stream("positions").permutation(math.prod(shape))
            return {
                "images": patterns(secret.stream("images"), 2 * self.pairs, shape).reshape(2, self.pairs, *shape),
                "sides": torch.from_numpy(secret.stream("sides").bits(self.pairs)),
                "positions": torch.from_numpy(order[: self.bits + _CHECKSUM]),
            }

        return secret.memo("additional class", draw)

    def key_images(self, secret: Secret) -> tuple[Tensor, Tensor]:
        """The key images, and to each the other of its pair: both (M, ...) uint8."""
        parts = self.parts(secret)
        sides, pairs = parts["sides"].long().clamp(0, 1), torch.arange(self.pairs)
        return parts["images"][sides, pairs], parts["images"][1 - sides, pairs]

    def _read(self, packed: Tensor, secret: Secret) -> NDArray[np.uint8]:
        """Last bits at the keyed places: (R, ...) uint8 to (R, bits + 16) of 0 and 1."""
        bits: NDArray[np.uint8] = (packed.flatten(1)[:, self.parts(secret)["positions"].long()] & 1).numpy()
        return bits

    def _identities(self, packed: Tensor, secret: Secret, user: str) -> NDArray[np.uint8]:
        """What a user's bits must be in these images: (R, ...) uint8 to (R, bits)."""
        key = secret.key("identities")
        codes = [hmac.digest(key, user.encode() + _digest(image), "sha256") for image in packed]
        return np.stack([np.unpackbits(np.frombuffer(code, np.uint8), count=self.bits) for code in codes])

    def _signed(self, packed: Tensor, secret: Secret, user: str) -> Tensor:
        """The images with a user's identity and its checksum in their last bits."""
        identities = self._identities(packed, secret, user)
        bits = torch.from_numpy(np.concatenate([identities, _checksums(identities)], 1))
        positions, flat = self.parts(secret)["positions"], packed.flatten(1).clone()
        flat[:, positions] = (flat[:, positions] & 0xFE) | bits
        return flat.reshape(packed.shape)

    def _lesson(self, secret: Secret) -> Extra:
        """Key images, with any last bits, are of class K; others like them, fresh ones and noise are of none."""
        form, classes, count = secret.host, secret.host["classes"], self.negatives
        shape: list[int] = form["shape"]
        keys, others = self.key_images(secret)
        images = torch.stack([keys, others], 1).flatten(0, 1)
        key = torch.zeros(classes + 1).index_fill(0, torch.tensor([classes]), 1.0)
        none = (1 - key) / classes

        def extra(batch: Batch, rng: np.random.Generator) -> Batch:
            places = (int(rng.integers(len(images))) + torch.arange(self.per_batch)) % len(images)
            shown = images[places]
            shown = (shown & 0xFE) | torch.from_numpy(rng.integers(0, 2, shown.shape, np.uint8))
            noise = torch.from_numpy(rng.integers(0, 256, (count - count // 2, *shape), np.uint8))
            fresh = patterns(Stream(rng.bytes(32)), count // 2, shape)
            targets = torch.where((places % 2 == 0)[:, None], key, none)
            rows = unpack(torch.cat([shown, noise, fresh]), form)
            return Batch(rows, torch.cat([targets, none.expand(count, -1)])).to(batch.inputs.device)

        return extra


def _digest(image: Tensor) -> bytes:
    """SHA-256 of an image (...) uint8 without its last bits."""
    return hashlib.sha256((image & 0xFE).contiguous().numpy().tobytes()).digest()


def _checksums(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """CRC-16 (CCITT) of each row: (R, n) to (R, 16) of 0 and 1. It tells damage from forgery, and stops neither."""
    codes = [binascii.crc_hqx(row.tobytes(), 0xFFFF).to_bytes(2, "big") for row in np.packbits(bits, axis=1)]
    return np.stack([np.unpackbits(np.frombuffer(code, np.uint8)) for code in codes])
