"""Distillation: a fresh network learns all that the model answers on the thief's rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.attack import Extraction, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.modes import chunks
from sealmark.core.suspect import Suspect
from sealmark.core.task import Batch, Loss, Task
from sealmark.core.training import train

_LEAST = 1e-30  # a probability that was rounded to zero


@dataclass(frozen=True)
class Distill(Extraction):
    """Retrain from a random start on the model's probabilities, softened by a temperature.

    The loss is ``alpha T^2 KL(softmax(f / T) || softmax(g / T)) + (1 - alpha) CE(g, y)``, averaged over
    rows. Temperature 1 and alpha 1, the default, are plain retraining on soft labels; a higher temperature
    shows the student more of the small probabilities, and with them a trace of a mark (on digits, 4 left
    23 % of adi's triggers where 1 left 16 %; chance is 10 %). Each row is asked for once, as it is; where the
    task augments rows, the student sees them augmented.

    Probabilities are enough: their logarithms are logits up to a constant, which no softmax feels.

    Another architecture than the owner's, or a start other than random, is another ``task.make``.

    Args:
        epochs: passes over the rows.
        rate: learning rate; 0 takes the task's own.
        temperature: T, above 0.
        alpha: weight of the model's answers; the rest is that of the true labels.

    Raises:
        ParameterError: a temperature that is not positive, alpha outside 0 to 1, or no epochs.

    Example:
        >>> Distill(temperature=4.0, alpha=0.5).returns
        'probabilities'
    """

    temperature: float = 1.0
    alpha: float = 1.0

    card = AttackCard(
        title="Distillation into a fresh network",
        citation="G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015; as an "
        "attack: N. Lukas, E. Jiang, X. Li, F. Kerschbaum, SoK: How Robust is Image Classification Deep Neural "
        "Network Watermarking?, IEEE S&P 2022",
        goal="a model of one's own, without the mark",
        knowledge="the model's probabilities on rows of the task, and their labels where alpha is below 1",
        level=1,
        needs_data=True,
        parameters="epochs 20 to 60, rate 0 for the task's own, temperature 1 to 20, alpha 0 to 1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf") or not 0 <= self.alpha <= 1:
            raise ParameterError(
                "bad parameters of distill",
                expected="temperature above 0, alpha 0 to 1",
                found=(self.temperature, self.alpha),
            )

    def extract(self, suspect: Suspect, resources: Resources, rng: np.random.Generator) -> tuple[nn.Module, int]:
        """See `Extraction.extract`.

        Raises:
            AccessError: the suspect tells labels alone.
            FormatError: it answers nonsense.
            MarkFailedError: the training diverged.
        """
        task, rows = resources.task, resources.rows
        answers = probabilities_of(suspect, task, rows.inputs)
        student = task.model(rng).to(resources.device)
        report = train(
            student,
            Batch(rows.inputs, torch.cat([answers, rows.targets[:, None].to(answers)], 1)),
            loss=self._loss(task),
            recipe=self.recipe(task),
            rng=rng,
            augment=task.augment,
        )
        return student.eval(), report.rows

    def _loss(self, task: Task) -> Loss:
        heat = self.temperature

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            """Targets: (N, K + 1), the answers and then the true label."""
            teacher = torch.log_softmax(targets[:, :-1].clamp_min(_LEAST).log() / heat, -1)
            student = torch.log_softmax(outputs / heat, -1)
            # over rows, not over all entries, which would shrink it by the number of classes
            soft = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            if self.alpha == 1:
                return heat**2 * soft
            return self.alpha * heat**2 * soft + (1 - self.alpha) * task.loss(outputs, targets[:, -1].long())

        return loss


def probabilities_of(suspect: Suspect, task: Task, inputs: Tensor) -> Tensor:
    """What a service answers to ``inputs`` (N, ...): (N, K) float32, once it was seen to be probabilities.

    Raises:
        AccessError: the suspect tells labels alone.
        FormatError: another number of classes, or numbers outside 0 to 1.
        ParameterError: the task has no classes.
    """
    check_classes(task)
    answers = torch.cat([suspect.probabilities(chunk) for chunk in chunks(inputs)]).to("cpu", torch.float32)
    if answers.shape[1:] != (task.classes,) or not bool(((answers >= 0) & (answers <= 1 + 1e-4)).all()):
        raise FormatError(
            "the answers are not probabilities",
            expected=f"{task.classes} numbers in 0 to 1 a row",
            found=f"shape {tuple(answers.shape)}, from {answers.min().item()} to {answers.max().item()}",
            advice="say what the service returns: label, probabilities or logits",
        )
    return answers


def check_classes(task: Task) -> None:
    """Refuse a task without classes.

    Raises:
        ParameterError: it has none.
    """
    if task.classes < 2:
        raise ParameterError("extraction needs a task with classes", expected="two or more", found=task.classes)
