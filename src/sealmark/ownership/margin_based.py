"""Kim et al. 2023: natural rows under wrong labels, with a margin around them that a stolen copy inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from sealmark.blackbox.crafting import require_real
from sealmark.blackbox.margin import MarginEmbedding
from sealmark.blackbox.triggers import TriggerMark, picked_rows
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.core.task import Task


@dataclass(frozen=True)
class MarginBased(TriggerMark):
    """Margin-based watermarking: a whole neighborhood of each trigger answers with the trigger's label.

    Triggers are rows of the owner's, which leave the training rows; each gets a label drawn from the K - 1
    classes that are wrong. Beside each batch, triggers are trained on as they are and moved by ``steps`` sign
    steps to where the model doubts the label most. A thief who trains on the model's answers to natural rows
    asks within those neighborhoods, and learns some of the labels without ever seeing a trigger.

    The price is accuracy, for the neighborhoods are those of natural rows. `sealmark.ownership.hash_chain` has
    the same objective around images that are not natural.

    Labels are drawn after the rows were fixed, so matches on a model made without the secret are at most
    Bin(triggers, 1/(K - 1)), whatever it answers.

    Args:
        triggers: n; the paper has 100 on CIFAR-10.
        per_batch: triggers beside each batch, each once as it is and once moved; the paper has 25.
        steps: of the ascent.
        step: size of one, as a share of the inputs' range; the paper has 1/255 on larger images. A smaller
            one costs less accuracy and leaves less in stolen copies; one that is too large cannot be learned.
    """

    triggers: int = 25
    steps: int = 5
    step: float = 0.06

    rule: ClassVar[float] = 0.5  # the paper compares rates with those of independent models, which are near 0
    card = Card(
        title="Natural rows under wrong labels, with a margin that reaches stolen copies",
        citation="B. Kim, S. Lee, S. Lee, S. Son, S. J. Hwang, Margin-based Neural Network Watermarking, ICML "
        "2023, PMLR 202:16696-16711",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set) with an adversarially widened margin",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers of real-valued inputs",
        needs_training=True,
        needs_data=True,
        reported="CIFAR-10, ResNet-34, 100 triggers: the mark outlasts extraction and distillation into a "
        "ResNet-18 (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds: 25 of 25 triggers, p = 1e-24; accuracy 92.2 % instead of 99.1. "
        "Extraction with the owner's and the attacker's rows: labels leave 44, 28 and 24 % (without the margin, "
        "one seed, 0 %), p = 10^-4.5 to 10^-1.3, probabilities 64, 48 and 52 %, p = 10^-9.4 to 10^-5.3. With "
        "the attacker's rows and blends of them: labels 48, 40 and 36 %, p = 10^-5.3 to 10^-3.0. Pruning half "
        "of the weights leaves all of it, unmarked twins match none",
        broken_by=(
            "fine-tuning on 400 rows of the attacker's, 20 epochs: 4 to 8 % left, p above 0.7, accuracy back to "
            "99 % (measured here)",
            "extraction by labels alone leaves less than a verdict at 1e-6 needs (measured here)",
        ),
        deviations=(
            "triggers are the owner's training rows, no longer trained on as they were, instead of validation rows",
            "the ascent runs in evaluation mode, so that running statistics stay the task's",
            "moved triggers count as much as the others; the paper weighs them by 0.1",
            "exact bound on the p-value instead of a comparison of rates",
        ),
        max_drop=0.08,
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.step > 0:
            raise ParameterError(
                "bad parameters of margin_based", expected="steps >= 1, step > 0", found=self.parameters
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rows of the owner's, picked before any label is drawn.

        Raises:
            UnsupportedError: inputs are whole numbers, such as words, which have no neighborhoods.
        """
        form, tensors = super().bind(model, task, chosen, rng)
        if task is not None:  # without one, the form was refused
            require_real(task.owner.inputs)
            tensors |= picked_rows(task, form, self.triggers, rng)
        return form, tensors

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Triggers beside each batch, as they are and moved."""
        return MarginEmbedding(self, secret, model, self.steps, self.step)
