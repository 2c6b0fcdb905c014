"""Curves of the published figures, drawn by matplotlib (the extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealmark.core.errors import UnsupportedError
from sealmark.core.files import atomic_write

Curve = Sequence[tuple[float, float]]  # points in order


@dataclass(frozen=True)
class Plot:
    """Curves over one axis.

    Attributes:
        title: what is shown.
        across: what runs across, with its unit.
        up: what runs up.
        curves: by name; one with a single point or none is left out.
        line: a level to compare with, and what it is.
        log: whether what runs across does so by factors.
        shown: the least and the greatest of what runs up that is shown; all of it without.
    """

    title: str
    across: str
    up: str
    curves: Mapping[str, Curve]
    line: tuple[float, str] | None = None
    log: bool = False
    shown: tuple[float, float] | None = None


_STYLES = ("-", "--", ":", "-.")  # colors alone are not told apart by everybody


def draw(plot: Plot, path: Path) -> None:
    """Write a plot as SVG; the same curves give the same bytes.

    Raises:
        UnsupportedError: the extra is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need an extra", found=error, advice='pip install "sealmark[plots]"') from None
    with mpl.rc_context({"svg.hashsalt": "sealmark", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes: Any = figure.subplots()
        shown = {name: curve for name, curve in plot.curves.items() if len(curve) > 1}
        for turn, (name, curve) in enumerate(shown.items()):
            across, up = zip(*curve, strict=True)
            style, color = _STYLES[turn // 10 % len(_STYLES)], f"C{turn % 10}"
            axes.plot(across, up, style, color=color, marker="o", markersize=3, label=name)
        if plot.line:
            axes.axhline(plot.line[0], color="grey", linewidth=0.8)
            at = (0.99, plot.line[0])
            axes.annotate(plot.line[1], at, xycoords=("axes fraction", "data"), va="bottom", ha="right")
        if plot.log:
            axes.set_xscale("log")
            ticks = sorted({across for curve in shown.values() for across, _ in curve})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if plot.shown:
            axes.set_ylim(*plot.shown)
        axes.set(title=plot.title, xlabel=plot.across, ylabel=plot.up)
        axes.grid(visible=True, alpha=0.3)
        if shown:
            figure.legend(loc="outside right upper", fontsize=7, frameon=False, handlelength=3.5)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    with atomic_write(path) as file:
        file.write(drawn.getvalue())
