"""AFA (Zhao et al. 2020): adversarial examples that a model shares with its descendants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.crafting import ascend, logits_of
from sealmark.blackbox.points import PointFingerprint, sources
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.modes import evaluating, torch_generator
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task

_VOTERS = 20


@dataclass(frozen=True)
class Afa(PointFingerprint):
    """Adversarial-Marks: inputs that look like one class and are answered like a given row of another.

    With logits z, a source x_s and a target row x_t of a keyed class, sign steps minimize

        sum over g in {M, ghosts} of |z_g(x_s + delta) - z_M(x_t)|^2,  |delta|_inf <= radius

    so that the whole answer is imitated and not the label alone. Ghosts stand for derived models: copies of M
    with dropout after every layer but the last, drawn anew at each step and for each row. A mark is kept when M
    and 90 % of fresh ghosts answer it by the target's class.

    This is a reconstruction; the paper's text was not at hand. From its abstract: the model is unchanged, and the
    fingerprint is a set of adversarial examples that transfer to derived models more than to others. From a
    reading list: the logits of a target sample, and ghost networks. Ours: the loss's weights, l-infinity and sign
    steps, where and how much is dropped, the vote, keyed targets, every default. Ghosts by skips of residual
    nets are left out: a skip is no module that could be found, so residual nets are eroded by dropout alone.

    Args:
        radius: of the change, as a share of the inputs' range. A larger one gives more marks, which more
            independent models share.
        steps: of the descent.
        step: size of one, as a share of the range.
        ghosts: drawn at each step, besides the model; 0 for none.
        dropout: share of entries that a ghost drops after each layer.
        agreement: of the fresh ghosts.
    """

    radius: float = 0.25
    steps: int = 40
    step: float = 0.02
    ghosts: int = 2
    dropout: float = 0.03
    agreement: float = 0.9

    rule: ClassVar[float] = 0.75  # ours, the middle between derived and independent
    card = Card(
        title="Adversarial examples that imitate another row's logits on ghosts of the model",
        citation="J. Zhao, Q. Hu, G. Liu, X. Ma, F. Chen, M. M. Hassan, AFA: Adversarial fingerprinting "
        "authentication for deep neural networks, Computer Communications 150:488-497, 2020",
        function=("ownership",),
        scenario="black-box",
        mechanism="transferable adversarial examples",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="classifiers of images or vectors",
        needs_training=False,
        needs_data=True,
        needs_trained=True,
        reported="tells derived models from irrelevant ones (from the abstract; figures not at hand)",
        reproduced="digits, three owners (seeds 0 to 2), 20 references trained alike. Match rate 0.96 to 0.98 "
        "after fine-tuning (20 epochs at 0.05), 1.00 after 10 at 0.01 and after pruning 50 % or 70 %; independent "
        "models 0.40 to 0.70, references up to 0.72, distilled 0.68 to 0.72, knocked off by labels 0.50 to 0.64. "
        "AUC 1, gaps 0.28, p 0.048, the least that 20 can give. 2 of 72 verifications of independent models "
        "ranked above all references (3.4 expected). Without ghosts the gaps are 0.26 to 0.38: they help nothing "
        "here. False claims: innocent models answer 0.94 to 1.00 of marks that are made to transfer",
        broken_by=(
            "training a new model on its answers: as near as an independent one (measured)",
            "false claims: adversarial examples that transfer to every model (Liu et al. 2024; measured)",
            "adversarial training of the copy, and squeezing its inputs",
        ),
        deviations=(
            "a reconstruction: the paper's losses, thresholds and figures were not at hand",
            "no erosion of skips",
            "rank among unrelated models instead of a threshold",
        ),
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = min(self.radius, self.step) > 0 and self.steps >= 1 and self.ghosts >= 0
        if not (sizes and 0 <= self.dropout < 1 and 0 <= self.agreement <= 1):
            raise ParameterError(
                "bad parameters of afa",
                expected="radius, step > 0, steps >= 1, ghosts >= 0, dropout in [0, 1), agreement in [0, 1]",
                found=self.parameters,
            )

    def craft(
        self,
        model: nn.Module,
        task: Task,
        secret: Secret,
        references: Sequence[nn.Module],
        rng: np.random.Generator,
    ) -> Batch:
        """Marks that the model and its ghosts answer by a keyed class; see `PointFingerprint.craft`."""
        rows = sources(task, model, task.test.rows, rng)
        imitated, targets = _targets(rows, 2 * self.points, task.classes, secret)
        rows = rows.take(slice(0, len(targets)))
        ghost = Ghost(model, self.dropout, rows.inputs[:1], rng)
        low, high = secret.host["low"], secret.host["high"]
        marks = ascend(
            [model, *[ghost] * self.ghosts],
            rows.inputs,
            logits_of(model, imitated),
            objective=lambda logits, wanted: -(logits - wanted).square().sum(1),
            radius=self.radius * (high - low),
            steps=self.steps,
            step=self.step * (high - low),
            low=low,
            high=high,
        )
        votes = torch.stack([logits_of(ghost, marks).argmax(1) == targets for _ in range(_VOTERS)])
        kept = (logits_of(model, marks).argmax(1) == targets) & (votes.double().mean(0) >= self.agreement - 1e-9)
        return Batch(marks[kept], targets[kept])


def _targets(rows: Batch, count: int, classes: int, secret: Secret) -> tuple[Tensor, Tensor]:
    """For each of the first rows one of another class to imitate, both drawn from the seed: inputs and class.

    A class without a row cannot be imitated; its draw falls to the next class that has one.
    """
    count = min(count, rows.rows)
    ahead = torch.from_numpy(secret.stream("targets").integers(count, classes - 1))
    drawn = (rows.targets[:count] + 1 + ahead) % classes
    places = secret.stream("rows").integers(count, 2**32)
    chosen = []
    for own, wanted, place in zip(rows.targets.tolist(), drawn.tolist(), places.tolist(), strict=False):
        order = [(wanted + i) % classes for i in range(classes) if (wanted + i) % classes != own]
        of_class = next(found for kind in order if len(found := torch.nonzero(rows.targets == kind)[:, 0]))
        chosen.append(int(of_class[place % len(of_class)]))
    picked = rows.take(torch.tensor(chosen))
    return picked.inputs, picked.targets


class Ghost(nn.Module):
    """A model with dropout after every layer but the last, drawn anew at each call and for each row.

    Li et al. 2020. Normalization stays in evaluation mode; the model itself is hooked during a call only.

    Args:
        model: any.
        rate: share of entries that are dropped; the others grow so that the mean stays.
        sample: (1, ...) an input, to see which layers run.
        rng: for the draws.
    """

    def __init__(self, model: nn.Module, rate: float, sample: Tensor, rng: np.random.Generator) -> None:
        super().__init__()
        self.model = model
        self._rate, self._generator = rate, torch_generator(rng)
        self._layers = _layers(model, sample)[:-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of one draw."""
        handles = [layer.register_forward_hook(self._erode) for layer in self._layers]
        try:
            logits: Tensor = self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def _erode(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept = torch.rand(output.shape, generator=self._generator) >= self._rate
        return output * kept.to(output.device) / (1 - self._rate)


def _layers(model: nn.Module, sample: Tensor) -> list[nn.Module]:
    """What runs, in order: modules with weights of their own that answer with one tensor."""
    ran: dict[nn.Module, None] = {}

    def note(layer: nn.Module, _: Any, output: object) -> None:
        if isinstance(output, Tensor):
            ran.pop(layer, None)  # one that runs twice counts where it runs last
            ran[layer] = None

    weighty = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(note) for layer in weighty]
    try:
        with evaluating(model) as device:
            model(sample.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)
