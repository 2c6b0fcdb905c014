"""IPGuard (Cao, Jia and Gong 2021): points just beyond the boundaries of a model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.crafting import frozen, logits_of, require_real
from sealmark.blackbox.points import PointFingerprint, sources
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.modes import device_of
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task


@dataclass(frozen=True)
class Ipguard(PointFingerprint):
    """A model's classes meet where no other model's do, and its descendants keep the place.

    From a row x of class i towards a keyed class j, Adam minimizes over x, with logits z,

        relu(z_i - z_j + k) + relu(max of the other classes' z - z_i)

    so that j is ahead of i by k and i ahead of the rest, and a point is kept once the loss is zero. How far
    beyond the boundary is the trade: at k = 0 fine-tuning moves the boundary past the points, with a large k
    every model of the task agrees.

    Ours: k is told relative to the model's own logits, so that one default fits nets of any scale; targets are
    keyed; entries stay in the task's range at each step, which the public port leaves out; a point stops where
    its loss first is zero.

    Args:
        margin: k as a share of the median lead of the first class over the second. On digits that lead is 9.5,
            so 0.3 is about 3; the paper's 5 would be 0.5.
        steps: of Adam at most; the paper has 1000.
        step: its rate, as a share of the inputs' range; the paper has 0.001.
    """

    points: int = 100
    margin: float = 0.3
    steps: int = 400
    step: float = 0.005

    rule: ClassVar[float] = 0.6  # ours, the middle between derived and independent; the paper names no figure
    card = Card(
        title="Points just beyond the boundaries between a model's classes",
        citation="X. Cao, J. Jia, N. Z. Gong, IPGuard: Protecting Intellectual Property of Deep Neural Networks "
        "via Fingerprinting the Classification Boundary, AsiaCCS 2021, arXiv 1910.12903",
        function=("ownership",),
        scenario="black-box",
        mechanism="points at decision boundaries",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="classifiers of images or vectors",
        needs_training=False,
        needs_data=True,
        needs_trained=True,
        reported="tells post-processed models from independent ones; AUC 0.63 on extracted ones (by Lukas et al. "
        "2021, from an abstract)",
        reproduced="digits, three owners (seeds 0 to 2), 20 references trained alike. Match rate 0.83 to 0.91 "
        "after fine-tuning (20 epochs at 0.05; 0.97 to 0.99 after 10 at 0.01), 1.00 after pruning 50 % or 70 %; "
        "independent models 0.10 to 0.28, references up to 0.32, models that were distilled or knocked off 0.14 to "
        "0.27. AUC 1, gaps 0.59 to 0.65, p 0.048, the least that 20 can give. 3 of 72 verifications of "
        "independent models ranked above all references (3.4 expected). False claims: innocent models answer 0.94 "
        "to 1.00 of points that are made to transfer",
        broken_by=(
            "training a new model on its answers: no nearer than an independent one (Lukas et al. 2021; measured)",
            "false claims: points that are made to transfer accuse independent models (Liu et al. 2024; measured)",
        ),
        deviations=(
            "k relative to the model's logits, keyed targets",
            "a larger step, and fewer",
            "rank among unrelated models instead of a threshold",
        ),
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.margin >= 0 and self.steps >= 1 and self.step > 0):
            raise ParameterError(
                "bad parameters of ipguard", expected="margin >= 0, steps >= 1, step > 0", found=self.parameters
            )

    def craft(
        self,
        model: nn.Module,
        task: Task,
        secret: Secret,
        references: Sequence[nn.Module],
        rng: np.random.Generator,
    ) -> Batch:
        """Points between a row's class and a keyed one; see `PointFingerprint.craft`."""
        rows = sources(task, model, 2 * self.points, rng)
        require_real(rows.inputs)
        ahead = torch.from_numpy(secret.stream("targets").integers(rows.rows, task.classes - 1))
        targets = (rows.targets + 1 + ahead) % task.classes
        leads = logits_of(model, rows.inputs).topk(2, 1).values
        margin = self.margin * float((leads[:, 0] - leads[:, 1]).median())
        low, high = secret.host["low"], secret.host["high"]
        found, done = _beyond(model, rows, targets, margin, self.steps, self.step * (high - low), (low, high))
        return Batch(found[done], targets[done])


def _beyond(
    model: nn.Module,
    rows: Batch,
    targets: Tensor,
    margin: float,
    steps: int,
    rate: float,
    span: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Where each row's loss first is zero, and whether it ever was: (N, ...) and (N,) bool on the CPU."""
    device = device_of(model)
    found, classes, targets = rows.inputs.to(device).clone(), rows.targets.to(device), targets.to(device)
    mean, square = torch.zeros_like(found), torch.zeros_like(found)
    done = torch.zeros(rows.rows, dtype=torch.bool, device=device)
    with frozen(model):
        for t in range(1, steps + 1):
            left = torch.nonzero(~done)[:, 0]
            if not len(left):
                break
            leaf = found[left].requires_grad_(True)
            loss = _loss(model(leaf), classes[left], targets[left], margin)
            slope = torch.autograd.grad(loss.sum(), leaf)[0]
            done[left] = loss.detach() == 0
            # Adam row by row, so that a point rests once it is done; one that is has slope 0 and must not drift
            mean[left] = 0.9 * mean[left] + 0.1 * slope
            square[left] = 0.999 * square[left] + 0.001 * slope**2
            left = left[~done[left]]
            move = (mean[left] / (1 - 0.9**t)) / ((square[left] / (1 - 0.999**t)).sqrt() + 1e-8)
            found[left] = (found[left] - rate * move).clamp(*span)
    return found.cpu(), done.cpu()


def _loss(logits: Tensor, classes: Tensor, targets: Tensor, margin: float) -> Tensor:
    """The paper's: (N, K), (N,), (N,) to (N,)."""
    pair = torch.stack([classes, targets], 1)
    first, second = logits.gather(1, pair).unbind(1)
    rest = logits.scatter(1, pair, -torch.inf).amax(1)
    return (first - second + margin).relu() + (rest - first).relu()
