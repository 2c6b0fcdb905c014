"""What a report shows beside its words: bars, the law of chance with what was seen, tables.

Bars are rows of HTML, so that they stay readable on a phone; the law of chance is drawn as SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

Cell = str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars.

    Attributes:
        caption: what is shown.
        rows: (label, value from 0 to ``top``, text beside it, tone: good, calm or accused).
        top: the value of a full bar.
        line: where a vertical line stands, if anywhere.
        line_label: what the line is.
    """

    caption: str
    rows: Sequence[tuple[str, float, str, str]]
    top: float = 1.0
    line: float | None = None
    line_label: str = ""

    kind = "bars"

    def percent(self, value: float) -> float:
        """Length of a bar, 0 to 100.

        Example:
            >>> Bars("c", [], top=2.0).percent(0.5), Bars("c", []).percent(7.0)
            (25.0, 100.0)
        """
        return round(100 * min(1.0, max(0.0, value / self.top)), 2)


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]

    kind = "table"


@dataclass(frozen=True)
class NullChart:
    """How many of ``n`` symbols match by chance, and how many matched on each suspect.

    Attributes:
        caption: what is shown.
        n: symbols.
        p: chance that one matches.
        needed: the fewest matches that make a verdict.
        seen: (suspect, matches, whether the verdict is a match).
    """

    caption: str
    n: int
    p: float
    needed: int
    seen: Sequence[tuple[str, int, bool]]

    kind = "null"
    width, height, left, base = 400.0, 96.0, 8.0, 80.0

    def x(self, matches: float) -> float:
        """Where a number of matches stands, in the drawing's units."""
        return round(self.left + (self.width - 2 * self.left) * matches / self.n, 2)

    @property
    def curve(self) -> str:
        """The SVG path of the law's probabilities, filled down to the axis.

        Example:
            >>> NullChart("c", 2, 0.5, 3, []).curve
            'M8.0,80.0 L8.0,46.0 L200.0,12.0 L392.0,46.0 L392.0,80.0 Z'
        """
        counts = np.arange(self.n + 1)
        mass = binom.pmf(counts, self.n, self.p)
        tops = self.base - 68 * mass / mass.max()
        inside = [f"L{self.x(k)},{round(float(top), 2)}" for k, top in zip(counts.tolist(), tops, strict=True)]
        return " ".join([f"M{self.x(0)},{self.base}", *inside, f"L{self.x(self.n)},{self.base} Z"])

    @property
    def ticks(self) -> list[tuple[float, int]]:
        """Positions and numbers along the axis."""
        return [(self.x(k), k) for k in np.linspace(0, self.n, 5).round().astype(int).tolist()]
