"""Adversarial fine-tuning: train on adversarial examples too, against marks that live in their neighborhoods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.crafting import ascend
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.modes import torch_generator
from sealmark.core.task import Batch, Loss
from sealmark.core.training import train, train_task


@dataclass(frozen=True)
class AdversarialFineTune(Modification):
    """Fine-tune on each batch and on adversarial examples of it, with the same labels.

    The examples are found anew for each batch, by projected gradient ascent of the task's loss within
    ``eps`` of each number (the maximum norm), from a random start; with one step it is FGSM, from the row
    itself. They stay in the range of the attacker's rows. Meanwhile normalization layers use their running
    statistics, so that looking for examples does not change the model.

    Args:
        epochs: passes over the attacker's rows.
        rate: learning rate, decayed to 0 along half a cosine.
        eps: how far an example may be from its row, in units of the inputs.
        steps: gradient steps an example; 1 is FGSM.

    Raises:
        ParameterError: epochs, a rate, steps or an eps that are not positive.

    Example:
        >>> AdversarialFineTune(eps=0.25, steps=1).name
        'adversarial_fine_tune'
    """

    epochs: int = 5
    rate: float = 0.01
    eps: float = 0.1
    steps: int = 5

    card = AttackCard(
        title="Fine-tuning with adversarial training",
        citation="A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, Towards Deep Learning Models Resistant "
        "to Adversarial Attacks, ICLR 2018; as an attack: N. Lukas, E. Jiang, X. Li, F. Kerschbaum, IEEE S&P 2022",
        goal="remove a mark that is made of adversarial examples or of margins",
        knowledge="the weights and labeled rows of the task",
        level=1,
        needs_data=True,
        parameters="epochs 5 to 20, rate 1e-3 to 1e-1, eps 0.01 to 0.25 in units of the inputs, steps 1 for FGSM, "
        "5 to 40 for PGD",
    )

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.steps < 1 or not self.rate > 0 or not 0 < self.eps < float("inf"):
            raise ParameterError(
                "bad parameters of adversarial_fine_tune",
                expected="epochs >= 1, rate > 0, eps > 0, steps >= 1",
                found=(self.epochs, self.rate, self.eps, self.steps),
            )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            UnsupportedError: the inputs are integers, which have no neighborhoods of that kind.
            MarkFailedError: the training diverged.
        """
        model, inputs = copies[0].requires_grad_(True), resources.rows.inputs
        if not inputs.is_floating_point():
            raise UnsupportedError(
                "adversarial_fine_tune needs inputs that are real numbers",
                expected="floating-point inputs",
                found=inputs.dtype,
                advice="use fine_tune",
            )
        limits = (inputs.min().item(), inputs.max().item())

        def beside(batch: Batch, rng: np.random.Generator) -> Batch:
            return Batch(self._examples(model, batch, resources.task.loss, limits, rng), batch.targets)

        report = train(
            model,
            resources.rows,
            loss=resources.task.loss,
            recipe=dataclasses.replace(resources.task.recipe, epochs=self.epochs, rate=self.rate),
            rng=rng,
            extras=[beside],
        )
        return model.eval(), report.rows

    def scratch(self, resources: Resources, rng: np.random.Generator) -> nn.Module:
        """A fresh model, trained on the same rows for as many epochs, at the task's own rate."""
        recipe = dataclasses.replace(resources.task.recipe, epochs=self.epochs)
        return train_task(
            resources.task, rng=rng, rows=resources.rows, recipe=recipe, device=resources.device
        ).eval()

    def _examples(
        self, model: nn.Module, batch: Batch, loss: Loss, limits: tuple[float, float], rng: np.random.Generator
    ) -> Tensor:
        """Adversarial examples of a batch: the same shape, within eps of it and within the limits."""
        low, high = limits
        start = None
        if self.steps > 1:  # Madry et al.: from anywhere in the ball
            aside = torch.rand(batch.inputs.shape, generator=torch_generator(rng)) * 2 - 1
            start = (batch.inputs + self.eps * aside.to(batch.inputs)).clamp(low, high)
        found = ascend(
            model, *batch, objective=loss, radius=self.eps, steps=self.steps, low=low, high=high, start=start
        )
        return found.to(batch.inputs)
