"""ActiveGuard (Xue et al. 2023): users hold adversarial examples of a class and a confidence that are theirs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sealmark.blackbox.crafting import frozen, require_real
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.core.card import Card
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.hosts import choose_host, filter_length, mean_filter, read_mean_filter, without_mean_filter
from sealmark.core.identity import Suspicion
from sealmark.core.modes import device_of
from sealmark.core.ownership import Verifiable
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Task
from sealmark.core.training import train
from sealmark.core.weights import TensorMap, weights_of
from sealmark.stats.nulls import Binomial, score_of_bits

_LOOK = 10  # steps from one look at the rounded images to the next
_ADAM = 0.02  # of the inputs' range


@dataclass(frozen=True)
class ActiveGuard(CredentialMark, Verifiable):
    """A user's images are adversarial: the model takes them for his class, with his confidence.

    The answer to one image lies in at most one cell (class, confidence): there is a grid of confidences
    from ``least`` to ``most`` in steps of twice the ``tolerance``. A user's cells are drawn for him from
    the secret. His images are made from the owner's rows of other classes by minimizing
    ``(logit f(x + d)_c - logit p)^2 + closeness |d|^2``, cut to the range and rounded to 8 bits. An owner
    finds his model again by bits in a layer's mean filter, put there by a regularizer while it is tuned.

    Ours: the paper takes an image for a user's where its cell is anybody's, which noise and natural rows
    hit as often as there are cells given out. Here a user has several images and is recognized by how
    many lie each in its cell. For rows made without the draw that is at most Bin(images, 1 / cells),
    whatever was searched: 3 images tell 91 users apart at one in a million, 4 tell 41,000.

    Images fit one model: after any change of it they must be issued again, for the same cells. A
    credential holds beside ``images`` the SHA-256 of the weights that they were made for, ``model``.

    Args:
        images: of one user.
        tolerance: how far a confidence may be off.
        least: the lowest confidence that is given out; from one half on the class is the likeliest by itself.
        most: the highest.
        objective: ``logit``, or ``probability``: the squared distance of confidences, where ``closeness``
            weighs more than what is left of the distance, and few images come near enough.
        closeness: weight of the squared length of the change, in units of the range.
        steps: of Adam, for one attempt; it stops where all rounded images fit.
        attempts: each from other rows.
        layer: of the watermark: name of a weight tensor; empty for the largest host.
        bits: of the watermark.
        strength: of its regularizer.
        epochs: of tuning the model.
        rate: of tuning the model.

    Raises:
        ParameterError: a value out of its range.

    Example:
        >>> ActiveGuard().levels, ActiveGuard(tolerance=0.01).levels
        (45, 22)
    """

    images: int = 3
    tolerance: float = 0.005
    least: float = 0.5
    most: float = 0.95
    objective: Literal["logit", "probability"] = "logit"
    closeness: float = 0.01
    steps: int = 600
    attempts: int = 5
    layer: str = ""
    bits: int = 64
    strength: float = 0.1
    epochs: int = 5
    rate: float = 0.01

    examines = Access.PROBABILITIES
    access = Access.WEIGHTS
    card = Card(
        title="ActiveGuard: adversarial examples of a given class and confidence as users' fingerprints",
        citation="M. Xue, S. Sun, C. He, D. Gu, Y. Zhang, J. Wang, W. Liu, ActiveGuard: An active intellectual "
        "property protection technique for deep neural networks by leveraging adversarial examples as users' "
        "fingerprints, IET Computers & Digital Techniques 2023, arXiv 2103.01527",
        function=("identity", "authorization", "ownership"),
        scenario="black-box",
        mechanism="adversarial examples, control layer, weight regularizer",
        capacity="91 users at one in a million, 41,000 with a fourth image",
        type="active fingerprint",
        target_models="classifiers of real inputs",
        needs_training=True,
        needs_data=True,
        reported="LeNet-5 99.15 % for authorized users and 8.92 % for others, Wide ResNet 91.46 % and 10 %; up to "
        "100 % of fingerprints authenticated (abstract)",
        reproduced="digits, 3 seeds, 20 users of 3 images: 60 of 60 users got them at the first attempt and were "
        "accepted, p = 2.2e-7; accuracy 0.990, plain 0.990 to 0.992, of a closed gate 0.095 to 0.097; 64 bits at "
        "BER 0, also after fine-tuning, pruning of 50 % and 4-bit weights, by wrong secrets 0.50. By the paper's "
        "rule, with 60 users, noise is somebody in 6.6 to 10.9 % of tries with one image, in at most 0.15 % with "
        "three; test rows in 0.4 to 0.8 % and never. With objective=probability 2 to 5 of 24 images fit, 20 to 24 "
        "without closeness",
        broken_by=(
            "taking the model from behind its control layer, which is a rule of whoever runs it and no lock: 0.990",
            "any change of the model locks its users out: of 60 images 14 to 22 are left after one epoch of "
            "fine-tuning at a rate of 1e-4, none to 4 after five at 0.01, 26 to 40 in int8, 8 to 11 after pruning "
            "30 % (3 seeds)",
            "copying: whoever has a user's images is taken for him",
            "by the paper's rule alone: noise, and images of several users put together",
        ),
        deviations=(
            "several images a user, in cells that are drawn from the committed secret, by a proven bound",
            "confidences from one half on: below it another class can be likelier, and the loss does not mind",
            "a closed gate gives the scores to classes at random, in another keyed order for each answer",
            "keyed projection and bits of the watermark, two-sided exact test",
        ),
        needs_trained=True,
        grade="research",
    )

    def __post_init__(self) -> None:
        counts = min(self.images, self.steps, self.attempts, self.bits, self.epochs) >= 1
        band = self.tolerance > 0 and self.least >= 0.5 and self.most < 1 and self.levels >= 1
        weights = self.closeness >= 0 and self.strength > 0 and self.rate > 0
        if not (counts and band and weights and self.objective in ("logit", "probability")):
            raise ParameterError(
                f"bad parameters of {self.name}",
                expected="counts from 1, tolerance > 0, room for it in 0.5 <= least < most < 1, closeness >= 0, "
                "strength and rate > 0, objective logit or probability",
                found=self.parameters,
            )

    @property
    def levels(self) -> int:
        """How many confidences there are."""
        return int((self.most - self.least) / (2 * self.tolerance) + 1e-9) if self.tolerance > 0 else 0

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
            UnsupportedError: inputs are whole numbers, such as words.
            UnknownNameError: no such layer.
            ParameterError: also where the layer has less room than ``bits``.
            MarkFailedError: the watermark cannot be read back whole.
        """
        form = form_of(task, self.name)
        task = cast("Task", task)  # form_of refuses None
        require_real(task.owner.inputs)
        layer, info = choose_host(model, self.layer, room=filter_length, need=self.bits)
        host = form | {"layer": layer, "length": filter_length(info)}
        rng = np.random.default_rng() if rng is None else rng
        secret = self.new_secret(weights_of(model), host=host, owner=owner, rng=rng)
        served = copy.deepcopy(model)
        train(
            served,
            task.owner,
            loss=task.loss,
            recipe=dataclasses.replace(task.recipe, epochs=self.epochs, rate=self.rate),
            rng=rng,
            terms=[lambda model, _: self._pull(model, secret)],
            augment=task.augment,
        )
        read = self.score(WhiteBox(served), secret)
        if read.statistic < self.bits:
            raise MarkFailedError(
                f"{self.name}: the watermark did not take",
                expected="no bit error",
                found=dict(read.details),
                advice="raise the strength or the epochs, or choose a larger layer",
            )
        return Enrolled(served.train(model.training), secret)

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        """See `CredentialMark.issue`; after a change of the model: other images for the same cells.

        Raises:
            MarkFailedError: an image came near enough in none of the attempts.
        """
        self.check_issue(secret, user)
        if task is None:
            raise ParameterError(f"{self.name} makes images of the owner's rows", expected="a task", found=None)
        cells = torch.from_numpy(self._cells(secret, user))
        starts = self._starts(secret, user, task, cells // self.levels)
        images, left = torch.empty(self.images, *secret.host["shape"]), torch.arange(self.images)
        for start in starts:
            made, fit = self._crafted(model, start[left], cells[left], secret)
            images[left[fit]], left = made[fit], left[~fit]
            if not len(left):
                digest = bytearray.fromhex(weights_of(model).digest())
                return Credential(user, {"images": images, "model": torch.frombuffer(digest, dtype=torch.uint8)})
        raise MarkFailedError(
            f"{self.name}: no image for a user",
            expected=f"confidences within {self.tolerance / 2:g}",
            found=f"{len(left)} of {self.images} images farther off after {self.attempts} attempts",
            advice="raise the attempts or the tolerance; is this the served model?",
        )

    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        """How many of the rows lie in the cells of each user, the first in his first and so on.

        The paper's rule, for as many rows as a user has images: each lies in somebody's cell.
        """
        form = secret.host
        shown = unpack(pack(rows[: self.images].double().nan_to_num(), form), form)
        answers = suspect.probabilities(shown)
        read = self._read(answers).numpy()
        theirs = np.stack([self._cells(secret, user) for user in users])[:, : len(read)]
        hits = theirs == read
        whole = len(rows) == self.images
        details: dict[str, Any] = {
            "images": len(rows),
            "cells": form["classes"] * self.levels,
            "answers": [[int(top), round(float(p), 4)] for p, top in zip(*answers.max(-1), strict=True)],
        }
        law = Binomial(self.images, 1 / details["cells"], bound=True)
        return Examination(
            served=whole and bool(hits.any(0).all()),
            readable=whole and bool((read >= 0).all()),
            suspicion=Suspicion(hits.sum(1).astype(np.float64), law, details),
        )

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """The watermark's ``projection`` X, (bits, M) float32, and ``message`` b, (bits,) float32 of 0 and 1."""

        def draw() -> dict[str, Tensor]:
            length = int(secret.host["length"])
            normals = secret.stream("projection").normal(self.bits * length)
            return {
                "projection": torch.from_numpy(normals).float().reshape(self.bits, length),
                "message": torch.from_numpy(secret.stream("message").bits(self.bits)).float(),
            }

        return secret.memo(self.name, draw)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits of the watermark against Bin(bits, 1/2), two-sided."""
        parts, host = self.parts(secret), secret.host
        read = parts["projection"] @ read_mean_filter(suspect, host["layer"], host["length"]) >= 0
        return score_of_bits(int((read == parts["message"].bool()).sum()), self.bits)

    def blind(self, secret: Secret) -> TensorMap:
        """The layer without its mean filter, which is all that is read of it."""
        return without_mean_filter(secret.host["layer"])

    def _pull(self, model: nn.Module, secret: Secret) -> Tensor:
        """The regularizer: ``strength`` times the sum over the bits of the cross-entropy."""
        weight = model.get_parameter(secret.host["layer"])
        parts = self.derive_on(secret, weight.device)
        logits = parts["projection"] @ mean_filter(weight).float()
        return self.strength * functional.binary_cross_entropy_with_logits(
            logits, parts["message"], reduction="sum"
        )

    def _cells(self, secret: Secret, user: str) -> NDArray[np.int64]:
        """(images,) ``class * levels + level``: independent and uniform."""

        def draw() -> NDArray[np.int64]:
            return secret.stream(f"cells/{user}").integers(self.images, secret.host["classes"] * self.levels)

        return secret.memo((self.name, "cells", user), draw)

    def _confidences(self, cells: Tensor) -> Tensor:
        """The middle of each cell."""
        return self.least + self.tolerance * (2 * (cells % self.levels) + 1)

    def _read(self, answers: Tensor) -> Tensor:
        """The cell that each of (N, K) probabilities lies in, (N,); -1 for none."""
        confidence, top = answers.double().max(-1)
        level = ((confidence - self.least) / (2 * self.tolerance)).floor().long()
        return torch.where((level >= 0) & (level < self.levels), top * self.levels + level, -1)

    def _starts(self, secret: Secret, user: str, task: Task, classes: Tensor) -> list[Tensor]:
        """For each attempt, (images, ...) rows of the owner's, of other classes than those wanted."""
        order = torch.from_numpy(secret.stream(f"start/{user}").permutation(task.owner.rows))
        labels = task.owner.targets.to("cpu")[order]
        chosen = torch.empty(self.attempts, self.images, dtype=torch.int64)
        for image, wanted in enumerate(classes):
            rows = torch.cat([order[labels != wanted], order])  # others first, any where they do not suffice
            chosen[:, image] = rows[(torch.arange(self.attempts) * self.images + image) % len(rows)]
        return list(task.owner.inputs.to("cpu")[chosen])

    def _crafted(self, model: nn.Module, start: Tensor, cells: Tensor, secret: Secret) -> tuple[Tensor, Tensor]:
        """Rounded images made from ``start`` (R, ...), and which of them fit their cells (R,)."""
        form, device = secret.host, device_of(model)
        span = form["high"] - form["low"]
        wanted, target = (part.to(device) for part in (cells // self.levels, self._confidences(cells)))
        origin, images, fit = start.to(device), start.clone(), torch.zeros(len(start), dtype=torch.bool)
        change = torch.zeros_like(origin, requires_grad=True)
        adam = torch.optim.Adam([change], lr=_ADAM * span)
        with frozen(model):
            for step in range(self.steps + 1):
                moved = (origin + change).clamp(form["low"], form["high"])
                if step % _LOOK == 0 or step == self.steps:
                    rounded = unpack(pack(moved, form), form)
                    with torch.no_grad():
                        answers = model(rounded.to(device)).softmax(-1)
                    confidence, top = answers.max(-1)
                    good = ((top == wanted) & ((confidence - target).abs() < self.tolerance / 2)).to("cpu") & ~fit
                    images[good], fit = rounded[good], fit | good
                    if fit.all():
                        break
                off = self._distance(model(moved), wanted, target)
                loss = off.square().sum() + self.closeness * (change / span).square().sum()
                change.grad = torch.autograd.grad(loss, change)[0]
                adam.step()
        return images, fit

    def _distance(self, outputs: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
        """How far each of (R, K) logits is from the confidence that its image shall have."""
        logs = outputs.log_softmax(-1)
        log_p = logs.gather(-1, wanted[:, None])[:, 0]
        if self.objective == "probability":
            return log_p.exp() - target
        others = logs.scatter(-1, wanted[:, None], -torch.inf).logsumexp(-1)
        return log_p - others - target.logit()
