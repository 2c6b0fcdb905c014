"""The margin objective (Kim et al. 2023): triggers are learned with the ball around them.

A surrogate that is trained on a marked model's answers sees its neighborhoods, not its triggers. If a whole
neighborhood of natural inputs answers with the trigger's label, some of that reaches the surrogate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sealmark.blackbox.crafting import ascend
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.embedding import Embedding
from sealmark.core.secret import Secret
from sealmark.core.task import Batch


class MarginEmbedding(Embedding):
    """Beside each batch, triggers as they are and moved by sign steps to where the model doubts their labels most.

    The paper moves them by 5 steps of 1/255 without a ball, in training mode, and weighs the moved ones by 0.1;
    here they move in evaluation mode, so that running statistics stay the task's, and count as much.

    Args:
        scheme: whose trigger set it is.
        secret: of its `keygen`.
        model: about to be trained.
        steps: of the ascent.
        step: size of one, as a share of the input's range.
    """

    def __init__(self, scheme: TriggerMark, secret: Secret, model: nn.Module, steps: int, step: float) -> None:
        super().__init__(scheme, secret)
        self._model, self._steps, self._step = model, steps, step

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The triggers of `TriggerMark.extra`, and each moved."""
        own = super().extra(batch, rng)
        host = self.secret.host
        step = self._step * (host["high"] - host["low"])
        moved = ascend(
            self._model,
            own.inputs,
            own.targets,
            radius=self._steps * step,
            steps=self._steps,
            step=step,
            low=host["low"],
            high=host["high"],
        )
        return Batch(torch.cat([own.inputs, moved.to(own.inputs.device)]), torch.cat([own.targets, own.targets]))
