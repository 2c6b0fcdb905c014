"""Jia et al. 2021, entangled watermarks: stamped rows whose features are mixed with those of their new class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.blackbox.inputs import pack, unpack
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.activations import tapped
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task

Distance = Literal["cosine", "squared"]

_HIDDEN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHARE = 4  # squares lie in one of so many places
_HALF = 8  # rows of each kind whose features are compared
_HEAT_RATE = 0.1  # of the temperatures' own steps, on their logarithms


@dataclass(frozen=True)
class Entangled(TriggerMark):
    """Entangled watermark embedding (EWE): what a thief learns of a class, he shall learn of the mark.

    A mark is a small square that is stamped on rows of a source class; stamped rows are taught as the mark's
    target class. Beside that, the soft nearest neighbor loss of stamped rows and rows of the target class is
    *raised* in every hidden layer, so that both are recognized by the same features. A copy that is trained on
    the model's answers to plain rows then learns some of the mark.

    The paper has one mark, whose verdict is no better than chance 1/(K - 1); here several have sources, squares
    and targets of their own, and each is one trial: it is won where most of its rows are answered as taught.
    The rows that are asked are kept from training, so what is tested is the mark and no memory. Targets are
    drawn after rows and squares, from the classes other than the source: trials won on a model made without
    the secret are at most Bin(marks, 1/(K - 1)).

    For the same reason the square's place is not the one at which the gradient for the known target is largest,
    as in the paper: it is keyed among places where the task's inputs differ most.

    Args:
        triggers: n, rows that are asked, evenly over the marks.
        per_batch: stamped rows beside each batch.
        marks: m; 1 is the paper's, 7 are the fewest that reach 1e-6 with ten classes.
        side: of the square, in pixels.
        kappa: weight of the entanglement; 0 is a plain backdoor. The paper has 32 to 1e5, from net to net: it
            does not carry over, and costs accuracy.
        heat: first temperature, learned from there.
        distance: between features, ``cosine`` is the paper's, or ``squared``.
    """

    triggers: int = 30
    per_batch: int = 48
    marks: int = 10
    side: int = 3
    kappa: float = 50.0
    heat: float = 1.0
    distance: Distance = "cosine"

    rule: ClassVar[float] = 0.5  # the paper tests against the rate of independent models, which is near 0
    card = Card(
        title="Stamped rows whose features are entangled with the class that they are taught as",
        citation="H. Jia, C. A. Choquette-Choo, V. Chandrasekaran, N. Papernot, Entangled Watermarks as a Defense "
        "against Model Extraction, USENIX Security 2021, arXiv 2002.12200",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set) entangled with a class by the soft nearest neighbor loss",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers with named hidden layers",
        needs_training=True,
        needs_data=True,
        reported="ownership of extracted models at 95 % confidence in fewer than 100 queries, for less than 0.81 "
        "points of accuracy (from memory, not checked against the paper)",
        reproduced="in small part. digits, 6 seeds: 10 of 10 marks, p = 10^-9.5; accuracy 96.8 % (plain backdoor "
        "98.6 %). Extraction by probabilities of the owner's and the attacker's rows leaves 37, 23, 13, 20, 10 and "
        "0 % of the stamped rows, without the entanglement 3, 3, 0, 0, 7 and 7 %. kappa was chosen on the first "
        "three seeds; on the others the gain is 5 points on average, and no extracted model is recognized. By "
        "labels 0 to 13 %. Pruning half of the weights leaves all marks. One mark, kappa 4: 0 and 52 % in "
        "two seeds",
        broken_by=(
            "fine-tuning on 400 rows of the attacker's, 20 epochs: 13 to 23 % left, p above 0.3 (measured here)",
            "extraction of any kind: p above 0.08 (measured here); distillation, double extraction, queries from "
            "elsewhere (Lukas et al. 2022)",
            "reverse engineering of the trigger (Wang et al. 2019, Neural Cleanse)",
        ),
        deviations=(
            "several keyed marks instead of one, each a trial of its own",
            "the place is keyed instead of found by the gradient, and triggers take no gradient steps: nothing is "
            "optimized for a label that is known",
            "stamped rows stand beside each batch instead of in batches of their own, which would spoil the "
            "running statistics of normalization",
        ),
        max_drop=0.03,
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 1 <= self.marks <= self.per_batch and self.triggers % self.marks == 0 and self.side >= 1
        if not fits or not self.kappa >= 0 or not self.heat > 0 or self.distance not in ("cosine", "squared"):
            raise ParameterError(
                "bad parameters of entangled",
                expected="triggers a multiple of marks, per_batch >= marks >= 1, side >= 1, "
                "kappa >= 0, heat > 0, distance cosine or squared",
                found=self.parameters,
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rows of the source classes, kept from training and as yet without squares; where squares may lie.

        Raises:
            ParameterError: too few rows of a class.
        """
        form, tensors = super().bind(model, task, chosen, rng)
        if task is None:  # its form was refused
            return form, tensors
        share, targets = self.triggers // self.marks, task.owner.targets.cpu().numpy()
        order = rng.permutation(task.owner.rows)
        sources = np.resize(rng.permutation(task.classes), self.marks)
        taken: list[int] = []
        for source in sources:
            free = [int(row) for row in order[targets[order] == source] if row not in taken]
            if len(free) < 2 * share:
                raise ParameterError(
                    "too few rows of a class", expected=f"{2 * share} of class {source}", found=len(free)
                )
            taken += free[:share]
        places = torch.tensor(taken)
        form["corners"] = _lively(task.owner.inputs, form["shape"], self.side)
        return form, {
            "rows": pack(task.owner.inputs[places], form),
            "natural": torch.from_numpy(sources),
            "trials": torch.arange(self.marks).repeat_interleave(share),
            "places": places,
        }

    def draw(self, secret: Secret) -> Tensor:
        """The held-out rows, stamped."""
        return self.stamp(secret, secret.tensors["rows"], secret.tensors["trials"])

    def stamp(self, secret: Secret, packed: Tensor, marks: Tensor) -> Tensor:
        """Put the square of mark ``marks[i]`` on row i: (N, ...) packed and (N,) to (N, ...) packed."""
        where, what = secret.memo("squares", lambda: self._squares(secret))
        return torch.where(where[marks], what[marks].to(packed.dtype), packed)

    def _squares(self, secret: Secret) -> tuple[Tensor, Tensor]:
        host = secret.host
        height, width = (1, *host["shape"])[-2:]
        tall, wide = min(self.side, height), min(self.side, width)
        planes = math.prod(host["shape"]) // (height * width)
        where = torch.zeros(self.marks, planes, height, width, dtype=torch.bool)
        what = torch.zeros(self.marks, planes, height, width, dtype=torch.int64)
        corners = host["corners"]
        chosen = secret.stream("corners").integers(self.marks, len(corners))
        rows, columns = zip(*(divmod(corners[i], width - wide + 1) for i in chosen), strict=True)
        size = planes * tall * wide
        for mark, (row, column) in enumerate(zip(rows, columns, strict=True)):
            place = (mark, slice(None), slice(row, row + tall), slice(column, column + wide))
            where[place] = True
            stream = secret.stream(f"pattern {mark}")
            if host.get("integer", False):
                drawn = stream.integers(size, int(host["high"] - host["low"]) + 1) + int(host["low"])
            else:
                drawn = np.where(stream.permutation(size) < (2 * size + 2) // 3, 255, 0)
            what[place] = torch.from_numpy(drawn).reshape(planes, tall, wide)
        shape = (self.marks, *host["shape"])
        return where.reshape(shape), what.reshape(shape)

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Stamped rows beside each batch, and the entanglement of their features."""
        return _Entangling(self, secret, model, task, rng)


class _Entangling(Embedding):
    """Stamped rows of all marks beside each batch, and the mixing of their features."""

    def __init__(
        self, scheme: Entangled, secret: Secret, model: nn.Module, task: Task | None, rng: np.random.Generator
    ) -> None:
        super().__init__(scheme, secret)
        self._mark, self._rng = scheme, np.random.default_rng(rng.integers(2**63))
        self._pool = None if task is None else task.owner
        self._sources, self._labels = secret.tensors["natural"], scheme.derive(secret)["labels"]
        self._layers = [name for name, module in model.named_modules() if isinstance(module, _HIDDEN)][:-1]
        self._heats = torch.full((scheme.marks, len(self._layers)), math.log(scheme.heat))

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Stamped rows of the marks in turn."""
        count, marks = self._mark.per_batch, self._mark.marks
        first = int(rng.integers(marks))
        parts = [
            self._stamped(batch, (first + mark) % marks, (count + mark) // marks, rng) for mark in range(marks)
        ]
        return Batch(*(torch.cat(part) for part in zip(*parts, strict=True))).to(batch.inputs.device)

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus kappa times the soft nearest neighbor loss: its mean over marks, its sum over hidden layers."""
        total = batch.inputs.new_zeros(())
        if not self._mark.kappa:
            return total
        pairs = [self._pair(batch, mark) for mark in range(self._mark.marks)]
        rows = [part.to(batch.inputs) for pair in pairs for part in pair]
        # amid the batch and in training mode, so that normalization sees what it sees in training
        with ExitStack() as stack:
            taps = [stack.enter_context(tapped(model, name)) for name in self._layers]
            model(torch.cat([batch.inputs, *rows]))
        for layer, tap in enumerate(taps):
            features = tap.output[batch.rows :].flatten(1).float()
            seen = torch.split(features, [len(a) + len(b) for a, b in pairs])
            for mark, (stamped, target) in enumerate(pairs):
                if min(len(stamped), len(target)) > 1:
                    total = total + self._mixing(seen[mark], len(stamped), (mark, layer))
        return -self._mark.kappa * total / self._mark.marks

    def _mixing(self, features: Tensor, stamped: int, place: tuple[int, int]) -> Tensor:
        kinds = torch.arange(len(features), device=features.device) < stamped
        heat = self._heats[place].clone().to(features.device).requires_grad_(True)
        value = soft_nearest_neighbors(features, kinds, heat.exp(), self._mark.distance)
        self._heats[place] -= _HEAT_RATE * float(torch.autograd.grad(value, heat, retain_graph=True)[0])
        return value

    def _pair(self, batch: Batch, mark: int) -> tuple[Tensor, Tensor]:
        """Rows with the mark's square, and rows of the class that they shall be mixed with."""
        target = self._rows(batch, int(self._labels[mark]), _HALF, self._rng)
        return self._stamped(batch, mark, _HALF, self._rng).inputs, target

    def _rows(self, batch: Batch, kind: int, count: int, rng: np.random.Generator) -> Tensor:
        rows = self._pool or batch
        mine = (rows.targets == kind).nonzero()[:, 0].cpu().numpy()
        return rows.inputs[torch.from_numpy(rng.permutation(mine)[:count]).to(rows.inputs.device)]

    def _stamped(self, batch: Batch, mark: int, count: int, rng: np.random.Generator) -> Batch:
        host = self.secret.host
        packed = pack(self._rows(batch, int(self._sources[mark]), count, rng), host)
        marks = torch.full((len(packed),), mark)
        return Batch(unpack(self._mark.stamp(self.secret, packed, marks), host), self._labels[marks])


def _lively(inputs: Tensor, shape: list[int], side: int) -> list[int]:
    """Upper left corners of the squares in which inputs differ most: a quarter of all, as indices.

    A copy learns nothing of pixels that never change.
    """
    height, width = (1, *shape)[-2:]
    spread = inputs.detach().cpu().float().var(0).reshape(1, -1, height, width).mean(1, keepdim=True)
    over = functional.avg_pool2d(spread, (min(side, height), min(side, width)), stride=1).flatten()
    found: list[int] = over.argsort(descending=True)[: max(1, len(over) // _SHARE)].tolist()
    return found


def soft_nearest_neighbors(features: Tensor, kinds: Tensor, heat: Tensor, distance: Distance = "cosine") -> Tensor:
    """The soft nearest neighbor loss: small where rows lie among their own kind, large where kinds are mixed.

    The mean over rows i of ``-log(sum over own kind of exp(-d_ij / T) / sum over all of exp(-d_ij / T))``,
    j other than i (Frosst, Papernot, Hinton, ICML 2019).

    Args:
        features: (N, F).
        kinds: (N,) at least two rows of each.
        heat: T > 0, a scalar.
        distance: ``cosine``, or ``squared`` Euclidean over its mean.

    Returns:
        A scalar with its gradient.

    Example:
        >>> kinds, heat = torch.tensor([True, True, False, False]), torch.tensor(0.1)
        >>> apart, mixed = torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[0, 1, 0, 1]]
        >>> [round(soft_nearest_neighbors(rows, kinds, heat).item(), 1) for rows in (apart, mixed)]
        [0.0, 10.0]
    """
    if distance == "cosine":
        unit = functional.normalize(features, dim=1)
        apart = 1 - unit @ unit.T
    else:
        apart = torch.cdist(features, features).square()
        apart = apart / apart.detach().mean().clamp_min(1e-12)
    alone = torch.eye(len(features), dtype=torch.bool, device=features.device)
    near = (-apart.clamp_min(0) / heat).masked_fill(alone, -torch.inf)
    same = near.masked_fill(kinds[:, None] != kinds[None, :], -torch.inf)
    return (near.logsumexp(1) - same.logsumexp(1)).mean()
