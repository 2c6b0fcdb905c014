"""What is required of each figure, and whether it is met over all seeds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sealmark.core.errors import ParameterError

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure.

    Args:
        relation: ``=``, ``<``, ``<=``, ``>`` or ``>=``.
        bound: what it is held against.
        over: ``every`` seed, or their ``mean`` where single seeds are noise.
        words: how people put it, where the figure's own unit says too little.

    Example:
        >>> Requirement("<=", 0.01, over="mean").met([0.0, 0.018]), Requirement("=", 1.0).met([1.0, 0.99])
        (True, False)
    """

    relation: str
    bound: float
    over: str = "every"
    words: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.relation not in _COMPARE or self.over not in ("every", "mean"):
            raise ParameterError(
                "bad requirement", expected=f"one of {list(_COMPARE)}", found=(self.relation, self.over)
            )

    def met(self, values: Sequence[float]) -> bool:
        """Whether the values of all seeds meet it."""
        compare = _COMPARE[self.relation]
        if self.over == "mean":
            return bool(values) and compare(float(np.mean(values)), self.bound)
        return bool(values) and all(compare(value, self.bound) for value in values)

    def __str__(self) -> str:
        over = " on average" if self.over == "mean" else ""
        return f"{self.words or f'{self.relation} {self.bound:g}'}{over}"


WITHIN_A_POINT = Requirement("<=", 0.01, "mean", "at most 0.01")
NOT_USEFUL = Requirement("<=", 0.15, words="within 0.05 of chance (0.1)")
SILENT = Requirement(">", -6, words="above -6: NO_MATCH")
ALL = Requirement("=", 1.0, words="all")

REQUIRED: Mapping[str, Mapping[str, Requirement]] = {
    "uchida": {
        "ber": Requirement("=", 0.0),
        "log10 p": Requirement("<", -30),
        "loss of accuracy": WITHIN_A_POINT,
        "log10 p, independent model": SILENT,
        "log10 p, wrong secret": SILENT,
    },
    "adi": {
        "trigger_accuracy": Requirement("=", 1.0),
        "log10 p": Requirement("<", -12),
        "loss of accuracy": WITHIN_A_POINT,
        "log10 p, independent model": SILENT,
        "log10 p, wrong secret": SILENT,
    },
    "sealed": {
        "opened bit for bit": ALL,
        "other keys refused, share": ALL,
        "flipped bits refused, share": ALL,
    },
    "chaotic_weights": {
        "unlocked bit for bit": ALL,
        "accuracy, no key": NOT_USEFUL,
        "accuracy, wrong keys, mean": NOT_USEFUL,
        "accuracy, wrong keys, best": NOT_USEFUL,
    },
    "spread_spectrum": {
        "loss of accuracy, mean over copies": WITHIN_A_POINT,
        "copies traced to their user alone, share": ALL,
    },
    "reversible": {
        "flipped bits found, share": ALL,
        "flipped bits located, share": ALL,
        "restored bit for bit": ALL,
        "loss of accuracy": WITHIN_A_POINT,
    },
}
TRACED = (
    "fine_tune 10% of the rows",
    "fine_tune",
    "prune rate=0.5",
    "quantize scheme=bf16",
    "average",
)  # after these, somebody is named


def judged(group: str, part: str, name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """One figure over all seeds: values, mean, spread, requirement, and whether it is met."""
    known = [float(value) for value in values if value is not None]
    requirement = REQUIRED.get(group, {}).get(name)
    if group == "uchida" and name == "ber" and "conv3" in part:
        requirement = None  # 288 hosts do not hold 256 bits without error; see the scheme's docstring
    return {
        "group": group,
        "part": part,
        "name": name,
        "values": list(values),
        "mean": float(np.mean(known)) if known else None,
        "spread": float(np.ptp(known)) if known else None,
        "requirement": str(requirement) if requirement else "",
        "met": requirement.met(known) if requirement else None,
    }
