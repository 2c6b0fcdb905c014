"""The handwritten digits under fixed noise, and 200 rows to learn them from: a net learns these by heart."""

from __future__ import annotations

from dataclasses import replace

import torch

from sealmark.core.task import Batch, Task
from sealmark.tasks import digits

_OWNER, _SD = 200, 0.5


def task() -> Task:
    """The digits task with normal noise of standard deviation 0.5 on every pixel, drawn once.

    The owner's rows are the first 200 of the digits task's 900, the rows for judging its own 497 and the 700 that
    are left over: all of them come from one random shuffle. Pixels are not clipped.

    Example:
        >>> noisy = task()
        >>> noisy.owner.rows, noisy.attacker.rows, noisy.test.rows
        (200, 400, 1197)
    """
    clean = digits.task()
    generator = torch.Generator().manual_seed(1)

    def noisy(rows: Batch) -> Batch:
        return Batch(rows.inputs + _SD * torch.randn(rows.inputs.shape, generator=generator), rows.targets)

    owner, attacker, test = noisy(clean.owner), noisy(clean.attacker), noisy(clean.test)
    return replace(
        clean,
        name="noisy_digits",
        owner=owner.take(slice(0, _OWNER)),
        attacker=attacker,
        test=test.join(owner.take(slice(_OWNER, None))),
        recipe=replace(clean.recipe, epochs=60),
    )
