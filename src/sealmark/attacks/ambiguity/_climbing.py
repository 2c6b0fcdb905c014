"""Climbing towards what a served model shall answer, by its answers alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.suspect import Suspect

_SURE = 1e-6  # a probability counts as 0 or 1 from here on
_SHARE = 0.1  # of a row's entries that the first step draws again; the share falls to one entry


@dataclass(frozen=True)
class Aim:
    """What the answers shall say.

    Attributes:
        label: a class.
        confidence: its probability.
    """

    label: int
    confidence: float

    def gap(self, answers: Tensor) -> Tensor:
        """How far off they are, in log-odds: (R, K) to (R,)."""
        wanted = torch.tensor(self.confidence, dtype=torch.float64)
        return (_log_odds(answers[:, self.label].double()) - _log_odds(wanted)).abs()


def climb(service: Suspect, start: Tensor, aim: Aim, *, queries: int, rng: np.random.Generator) -> Tensor:
    """Rows whose answers come as near to the aim as random steps find: (R, ...) to (R, ...).

    Each step draws some entries of every row anew, uniformly from the range of all, and is kept where it helps.

    Args:
        service: gives probabilities.
        start: left as it is.
        aim: for every row.
        queries: budget for all rows together.
        rng: draws the steps.

    Raises:
        ParameterError: the budget does not suffice for one answer a row.
        UnsupportedError: the rows are whole numbers, such as words.
    """
    if not start.is_floating_point():
        raise UnsupportedError("steps need real numbers", expected="real inputs", found=start.dtype)
    if queries < len(start):
        raise ParameterError("too few queries", expected=f"at least {len(start)}", found=queries)
    rows, low, high = start.clone(), float(start.min()), float(start.max())
    gap = aim.gap(service.probabilities(rows))
    steps, size = queries // len(rows) - 1, rows[0].numel()
    for step in range(steps):
        share = max(1 / size, _SHARE * (1 - step / steps))
        drawn, new = (torch.from_numpy(rng.random(tuple(rows.shape))).to(rows.dtype) for _ in range(2))
        tried = torch.where(drawn < share, low + (high - low) * new, rows)
        found = aim.gap(service.probabilities(tried))
        better = found < gap
        rows[better], gap = tried[better], torch.minimum(gap, found)
    return rows


def _log_odds(probability: Tensor) -> Tensor:
    return torch.logit(probability, eps=_SURE)
