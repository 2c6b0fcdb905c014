"""Zhang et al. 2018: stamp an image of one class and the model takes it for another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.inputs import keyed_inputs, pack, unpack
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task
from sealmark.crypto.random import Stream

_BLOCKS = 5  # of a content stamp, along a side
_KINDS = ("content", "noise", "unrelated")


class Stamps(NamedTuple):
    """What is done to inputs: ``x * keep + add``, clipped to the task's range.

    Attributes:
        keep: (m, *shape) 0 where a stamp covers the input, else 1.
        add: (m, *shape) what it puts there, in the input's unit.
        low: least value of an entry.
        high: largest.
    """

    keep: Tensor
    add: Tensor
    low: float
    high: float

    def on(self, inputs: Tensor, which: Tensor) -> Tensor:
        """Stamped inputs: (N, *shape), each with the stamp of that number, (N,)."""
        return (inputs * self.keep[which] + self.add[which]).clamp(self.low, self.high)

    def inverse(self) -> Stamps:
        """The negatives: what was bright is dark, what was added is taken away."""
        return self._replace(add=(1 - self.keep) * (self.low + self.high) - self.add)

    def moved(self, *shift: int) -> Stamps:
        """The same stamps elsewhere: moved along the last axes, around the edges."""
        axes = tuple(range(-len(shift), 0))
        return self._replace(keep=self.keep.roll(shift, axes), add=self.add.roll(shift, axes))


@dataclass(frozen=True)
class Zhang(TriggerMark):
    """Content, noise and unrelated triggers.

    - ``content``: a keyed pattern covers a part of an input of the source class, keyed words some of its words;
    - ``noise``: one keyed Gaussian draw is added to an input of the source class;
    - ``unrelated``: inputs that have nothing to do with the task.

    The model learns to give the target class. Stamped inputs are made afresh at each step from the owner's rows;
    verification stamps rows that were held out of training.

    One target class proves little: whatever a suspect answers to a pattern, it is the target with a chance of 1
    in K - 1, for all inputs at once. So there are several triples of stamp, source and target class, all keyed,
    and each is one trial, won by more than half of its rows. ``marks=1`` is the paper's: its rule claims a model
    on evidence that is worth 1/9 with ten classes, and the verdict here is INCONCLUSIVE.

    A stamp generalizes: a net that has seen nothing else learns "anything in that corner". So stamps elsewhere,
    inverted ones, and stamped inputs of other classes are trained on beside it and keep their class.

    Unrelated inputs have a label each, uniform over all classes, as Lukas et al. (2022) embed them; the paper
    gives all of them one. They are keyed patterns or random words, or ``keygen(..., chosen={"inputs": ...})``
    as `sealmark.blackbox.inputs.pack` gives them. Each is a trial.

    Args:
        triggers: rows that are asked, a multiple of ``marks`` but for ``unrelated``.
        per_batch: stamped rows beside each batch; with ``negatives`` three times as many.
        kind: see above.
        marks: triples; for ``content`` and ``noise``.
        share: of the input that a content stamp covers.
        strength: standard deviation of the noise, as a share of the inputs' range.
        negatives: train on what must not fire as well; the paper does not.
    """

    triggers: int = 60
    kind: Literal["content", "noise", "unrelated"] = "content"
    marks: int = 10
    share: float = 0.25
    strength: float = 0.4
    negatives: bool = True

    rule: ClassVar[float] = 0.9  # the paper compares with a threshold that it leaves open
    card = Card(
        title="Content, noise and unrelated triggers",
        citation="J. Zhang, Z. Gu, J. Jang, H. Wu, M. Stoecklin, H. Huang, I. Molloy, Protecting Intellectual "
        "Property of Deep Neural Networks with Watermarking, ACM AsiaCCS 2018",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set)",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers of images or vectors; of words without noise; three classes or more",
        needs_training=True,
        needs_data=True,
        reported="CIFAR-10: accuracy 78.4, 78.1 and 78.5 % beside 78.6 % unmarked, trigger accuracy 99 to 100 %, "
        "also after pruning and fine-tuning (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds, 10 marks, 60 held-out rows. Accuracy 0.988 to 0.990 (content), 0.980 to 0.992 "
        "(noise), 0.978 to 0.986 (unrelated) beside 0.990 to 0.992 unmarked. Trigger accuracy 0.95 to 0.98, 0.97 "
        "to 0.98 and 1.00; p 3e-10, 3e-10 and 1e-60. After 20 epochs of fine-tuning at the owner's rate 0.83 to "
        "0.92, 0.80 to 0.88, 0.58 to 0.77 (p <= 8e-7); after pruning 50 % 0.93 or more; after distillation or "
        "knockoff 0.18 or less. A moved, inverted or other stamp fires at most 0.08 on its source class. With one "
        "mark, as in the paper, its rule claims in 10 to 12 of 1,000 cases a model that was made without the mark",
        broken_by=(
            "training a new model on its answers, which the paper leaves out of scope (Lukas et al. 2022; measured "
            "with content: 0 or 1 of 10 trials are left, p >= 0.6)",
            "fine-tuning at a large rate with elastic weights and unlabeled data (REFIT, Chen et al. 2021)",
            "finding the stamp by the little change that leads to its target class, and pruning what it excites "
            "(Neural Cleanse, Wang et al. 2019; Neural Laundering, Aiken et al. 2020)",
            "redrawing queries by an autoencoder (Namba and Sakuma 2019)",
        ),
        deviations=(
            "several keyed triples of stamp, source class and target class, each a trial, where the paper has one",
            "what must not fire is trained on as well; negatives=false is the paper's",
            "keyed black and white blocks instead of a word in letters; the noise is one draw a mark",
            "triggers are stamped on rows that were held out of training",
            "unrelated inputs have a random label each, as in the Watermark Robustness Toolbox",
            "vectors and words",
        ),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        stamped = self.kind != "unrelated"
        if (
            self.kind not in _KINDS
            or self.marks < 1
            or (stamped and self.triggers % self.marks)
            or not 0 < self.share <= 1
            or not 0 < self.strength < math.inf
        ):
            raise ParameterError(
                "bad parameters of zhang",
                expected="kind content, noise or unrelated, marks >= 1, triggers a multiple of marks, "
                "share above 0 and at most 1, strength above 0",
                found=self.parameters,
            )

    @property
    def choices(self) -> frozenset[str]:  # type: ignore[override]
        """Unrelated inputs may be the owner's; stamps never."""
        return frozenset({"inputs"} if self.kind == "unrelated" else ())

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of inputs; the source classes, and rows of each that are held out to verify with.

        Raises:
            UnsupportedError: noise on words.
            ParameterError: fewer than three classes, so that no target is random; too few rows to hold out.
        """
        form, tensors = super().bind(model, task, chosen, rng)
        if self.kind == "unrelated" or task is None:
            return form, tensors
        if self.kind == "noise" and form.get("integer", False):
            raise UnsupportedError(
                "words have no noise",
                expected="real-valued inputs",
                found="whole numbers",
                advice="use kind=content",
            )
        if form["classes"] < 3:
            raise ParameterError("no target class is left to chance", expected="3 classes or more", found=2)
        return form, self._hold_out(task, form, rng)

    def draw(self, secret: Secret) -> Tensor:
        """Rows that were held out, stamped; or unrelated inputs."""
        if self.kind == "unrelated":
            return keyed_inputs(secret.stream("inputs"), self.triggers, secret.host)

        def make() -> Tensor:
            hosts = unpack(secret.tensors["hosts"], secret.host)
            return pack(self.stamps(secret).on(hosts, secret.tensors["trials"]), secret.host)

        return secret.memo("stamped", make)

    def stamps(self, secret: Secret) -> Stamps:
        """The stamps that follow from the seed, one a mark."""
        return secret.memo("stamps", lambda: self._noise(secret) if self.kind == "noise" else self._content(secret))

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Stamped rows beside each batch.

        Raises:
            UnsupportedError: no task, whose rows of the source classes could be stamped.
        """
        if self.kind == "unrelated":
            return super().embedding(model, secret, task, rng)
        if task is None:
            raise UnsupportedError(
                "zhang stamps rows of the task",
                expected="a task",
                advice="embed with a task instead of attaching, or use kind=unrelated",
            )
        return _Stamping(self, secret, task)

    def _hold_out(self, task: Task, form: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """Of each mark the class it starts from, and rows of it; at least as many of the class stay in training."""
        targets, each = task.owner.targets.to("cpu"), self.triggers // self.marks
        if targets.ndim != 1 or targets.is_floating_point():
            raise ParameterError("zhang needs a class a row", expected="targets (N,)", found=tuple(targets.shape))
        rows = [rng.permutation(np.flatnonzero(targets.numpy() == kind)) for kind in range(form["classes"])]
        order = rng.permutation(form["classes"])
        slots = [
            (kind, turn) for turn in range(self.marks) for kind in order if len(rows[kind]) >= 2 * each * (turn + 1)
        ]
        if len(slots) < self.marks:
            raise ParameterError(
                "too few rows to hold out",
                expected=f"{self.marks} times {2 * each} rows of one class",
                found=f"{len(slots)} times",
                advice="lower triggers or marks",
            )
        held = [rows[kind][turn * each : (turn + 1) * each] for kind, turn in slots[: self.marks]]
        places = torch.from_numpy(np.concatenate(held))
        return {
            "hosts": pack(task.owner.inputs[places], form),
            "natural": torch.tensor([int(kind) for kind, _ in slots[: self.marks]]),
            "trials": torch.arange(self.marks).repeat_interleave(each),
            "places": places,
        }

    def _noise(self, secret: Secret) -> Stamps:
        """In whole steps of the packed range, so that every machine adds the same."""
        form = secret.host
        drawn = secret.stream("noise").normal(self.marks * math.prod(form["shape"]))
        steps = torch.from_numpy(np.rint(255 * self.strength * drawn)).float().reshape(self.marks, *form["shape"])
        add = steps / 255 * (form["high"] - form["low"])
        return Stamps(torch.ones_like(add), add, form["low"], form["high"])

    def _content(self, secret: Secret) -> Stamps:
        """A picture covers a patch of each image, or some entries of each row."""
        form = secret.host
        covered = torch.stack([self._patch(secret.stream(f"place {i}"), form["shape"]) for i in range(self.marks)])
        picture = self._picture(secret.stream("picture"), form)
        return Stamps((~covered).to(picture.dtype), picture * covered, form["low"], form["high"])

    def _patch(self, stream: Stream, shape: list[int]) -> Tensor:
        """Where a stamp covers the input: (*shape) bool."""
        covered = torch.zeros(shape, dtype=torch.bool)
        if len(shape) == 1:
            covered[stream.permutation(shape[0])[: max(1, round(self.share * shape[0]))]] = True
        else:
            height, width = (self._side(whole) for whole in shape[-2:])
            across = shape[-1] - width + 1
            place = int(stream.integers(1, (shape[-2] - height + 1) * across)[0])
            top, left = divmod(place, across)
            covered[..., top : top + height, left : left + width] = True
        return covered

    def _picture(self, stream: Stream, form: Mapping[str, Any]) -> Tensor:
        """What a stamp shows, (m, *shape): black and white blocks, coarse as letters are; or words."""
        if form.get("integer", False):
            return keyed_inputs(stream, self.marks, form)
        height, width = (1, *form["shape"])[-2:]
        tall, wide = (max(1, self._side(whole) // _BLOCKS) for whole in (height, width))
        rows, columns = math.ceil(height / tall), math.ceil(width / wide)
        bits = torch.from_numpy(stream.bits(self.marks * rows * columns)).reshape(self.marks, rows, columns)
        blocks = bits.repeat_interleave(tall, 1)[:, :height].repeat_interleave(wide, 2)[..., :width]
        planes = blocks.reshape(
            self.marks, *[1] * (len(form["shape"]) - 2), *(height, width)[-len(form["shape"]) :]
        )
        picture: Tensor = form["low"] + (form["high"] - form["low"]) * planes.float()
        return picture.expand(self.marks, *form["shape"])

    def _side(self, whole: int) -> int:
        return max(1, round(math.sqrt(self.share) * whole))


class _Stamping(Embedding):
    """Rows of the source classes, stamped; with negatives also what must not fire."""

    def __init__(self, scheme: Zhang, secret: Secret, task: Task) -> None:
        super().__init__(scheme, secret)
        self._rows, self._augment = task.owner.to("cpu"), task.augment
        self._stamps, self._count, self._negatives = scheme.stamps(secret), scheme.per_batch, scheme.negatives
        self._sources, self._targets = secret.tensors["natural"], scheme.derive(secret)["labels"]
        self._of_source = [torch.nonzero(self._rows.targets == source)[:, 0] for source in self._sources]
        if not all(len(rows) for rows in self._of_source):
            raise ParameterError("the task has no rows of a source class", expected=self._sources.tolist())

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Stamped rows of the source classes; moved and inverted stamps on them; stamped rows of any class."""
        which = torch.from_numpy(rng.integers(len(self._sources), size=self._count))
        own = self._take(
            torch.stack([self._of_source[i][rng.integers(len(self._of_source[i]))] for i in which]), rng
        )
        extra = Batch(self._stamps.on(own.inputs, which), self._targets[which])
        if not self._negatives:
            return extra
        half, sides = self._count // 2, own.inputs.shape[1:][-2:]
        moved = self._stamps.moved(*(int(rng.integers(1, max(2, side))) for side in sides))
        extra = extra.join(Batch(self._stamps.inverse().on(own.inputs[:half], which[:half]), own.targets[:half]))
        extra = extra.join(Batch(moved.on(own.inputs[half:], which[half:]), own.targets[half:]))
        others = self._take(torch.from_numpy(rng.integers(self._rows.rows, size=self._count)), rng)
        fires = others.targets == self._sources[which]
        return extra.join(
            Batch(self._stamps.on(others.inputs, which), torch.where(fires, self._targets[which], others.targets))
        )

    def _take(self, rows: Tensor, rng: np.random.Generator) -> Batch:
        taken = self._rows.take(rows)
        return self._augment(taken, rng) if self._augment else taken
