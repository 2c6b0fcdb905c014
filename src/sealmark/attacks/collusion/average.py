"""Several users average their copies: each one's mark fades, all else stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sealmark.attacks.collusion._copies import combined
from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.modes import chunks, evaluating


@dataclass(frozen=True)
class Average(Modification):
    """The mean of all copies, tensor by tensor; counters and other integers are the first copy's.

    Args:
        recalibrate: measure the running statistics of batch normalization again on the attacker's rows,
            where there are some. Averaged statistics fit marked copies of one model, not copies that were
            trained apart.
    """

    recalibrate: bool = False

    card = AttackCard(
        title="Averaging the copies of several users",
        citation="H. Chen, B. D. Rouhani, C. Fu, J. Zhao, F. Koushanfar, DeepMarks: A Secure Fingerprinting "
        "Framework for Digital Rights Management of Deep Learning Models, ICMR 2019",
        goal="a copy that names none of the colluders",
        knowledge="the copies of two or more users",
        level=3,
        needs_data=False,
        copies=2,
        parameters="recalibrate: fresh statistics for batch normalization, from the attacker's rows",
    )

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            ModelMismatchError: the copies are not of one model.
        """
        result = combined(copies, lambda stack: stack.mean(0))
        if self.recalibrate and resources.rows.rows > 1:
            _recalibrate(result, resources.rows.inputs)
        return result, 0


def _recalibrate(model: nn.Module, inputs: Tensor) -> None:
    """Set running statistics to the mean over chunks of ``inputs``; nothing else learns or drops out."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model) as device:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for index, chunk in enumerate(part for part in chunks(inputs) if len(part) > 1):
            for norm in norms:
                norm.momentum = 1 / (index + 1)  # a running mean over chunks
            model(chunk.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
