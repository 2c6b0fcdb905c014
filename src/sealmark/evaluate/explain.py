"""The plot of a trace: everybody's score, the threshold, and who is accused (matplotlib, the extra ``plots``)."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.files import atomic_write
from sealmark.core.identity import Accusation, Ranked
from sealmark.evaluate.report import power_of_ten
from sealmark.stats.thresholds import threshold

_ACCUSED, _OTHERS, _LINE = "#b3261e", "#5b6b7a", "#222222"  # apart in grey as well, and the markers differ
_ROWS = 20  # users with a row of their own: everybody, or of more users those who are accused
_BEST = 3  # of many users of whom none is accused
_NAME = 28


def check_plot(path: Path) -> None:
    """Refuse, before any work, a plot that could not be drawn.

    Raises:
        ParameterError: neither ``.svg`` nor ``.png``.
        UnsupportedError: the extra is not installed.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ParameterError("which kind of plot?", expected="a name that ends in .svg or .png", found=path.name)
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("plots need an extra", found=error, advice='pip install "sealmark[plots]"') from None


def draw_trace(found: Accusation, path: Path, *, title: str = "") -> None:
    """Write the plot of a trace as SVG or PNG; the same trace gives the same bytes.

    Up to 20 users have a row each. Of more, the accused have one, and a histogram shows everybody else.

    Args:
        found: of `UserMark.trace` or `CredentialMark.trace`.
        path: its suffix tells the format.
        title: what was traced.

    Raises:
        ParameterError: neither ``.svg`` nor ``.png``, or an accusation without its scores.
        UnsupportedError: the extra is not installed.
    """
    check_plot(path)
    if found.suspicion is None:
        raise ParameterError("nothing to plot", expected="an accusation as traced", found="one without its scores")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "sealmark", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    drawn, kind = io.BytesIO(), path.suffix.lower()[1:]
    with mpl.rc_context({**style, "axes.spines.right": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font lacks
        rows = _rows(found)
        crowd = found.users > _ROWS
        heights = [0.24 * max(3, len(rows)) + 0.2, *([2.4] if crowd else [])]
        figure = Figure(figsize=(8, sum(heights) + 1.4), layout="constrained", dpi=150)
        made: Any = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
        panels = made[:, 0]
        level = threshold(found.suspicion.null, math.log(found.alpha) - math.log(found.users))
        _draw_rows(panels[0], rows, found)
        if crowd:
            _draw_crowd(panels[1], found, found.suspicion.statistics)
        _draw_level(panels, level)
        panels[-1].set_xlabel("score")
        figure.suptitle(_heading(found, title, level), x=0.01, ha="left", fontsize=10)
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    with atomic_write(path) as file:
        file.write(drawn.getvalue())


def _rows(found: Accusation) -> list[Ranked]:
    if found.users <= _ROWS:
        return [*found.ranking]
    return [*found.accused[:_ROWS]] or [*found.ranking[:_BEST]]


def _draw_rows(axes: Any, rows: list[Ranked], found: Accusation) -> None:
    """A user a row: a filled diamond for the accused, an open circle for others, and the p-value beside it."""
    for place, entry in enumerate(rows):
        accused = entry in found.accused
        color = _ACCUSED if accused else _OTHERS
        axes.plot(
            [entry.statistic],
            [place],
            "D" if accused else "o",
            color=color,
            markerfacecolor=color if accused else "white",
            markersize=6,
            clip_on=False,
        )
        axes.annotate(
            _chance(entry.log10_p),
            (entry.statistic, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=color,
        )
    axes.set_ylim(max(3, len(rows)) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_shown(entry.user) for entry in rows])
    for label, entry in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(weight="bold" if entry in found.accused else "normal")
    more = len(found.accused) - len(rows)
    if more > 0:
        axes.set_ylabel(f"and {more} more")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.margins(x=0.12)


def _draw_crowd(axes: Any, found: Accusation, scores: NDArray[np.float64]) -> None:
    """Everybody's scores; few stand out of many, so that the counts grow by factors."""
    ranked, edges = np.sort(scores)[::-1], np.histogram_bin_edges(scores, bins=60)
    guilty = len(found.accused)
    axes.hist(ranked[guilty:], edges, color=_OTHERS, alpha=0.8, label="others")
    if guilty:
        axes.hist(ranked[:guilty], edges, color=_ACCUSED, hatch="///", edgecolor="white", label="accused")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, None)
    axes.set_ylabel(f"users, of {found.users:,}")
    axes.legend(loc="upper right", frameon=False, fontsize=8)


def _draw_level(panels: Any, level: float) -> None:
    if not math.isfinite(level):
        return
    for axes in panels:
        axes.axvline(level, color=_LINE, linewidth=1, linestyle="--")
    axes = panels[0]
    place = (level, 1.0)
    how = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8, "color": _LINE}
    axes.annotate("threshold", place, xytext=(-4, 2), ha="right", va="bottom", **how)
    axes.annotate("accused →", place, xytext=(4, 2), ha="left", va="bottom", **how)


def _heading(found: Accusation, title: str, level: float) -> str:
    names = [_shown(entry.user) for entry in found.accused[:3]]
    more = len(found.accused) - len(names)
    who = ", ".join(names) + (f" and {more} more" if more else "")
    said = f"{found.verdict.value}: {f'{who} accused' if names else 'nobody is accused'}"
    bound = f"Of {found.users:,} users, anyone innocent is accused with chance at most {found.alpha:g}"
    reach = "\nNo score that can be read of this suspect would do for an accusation." if level == math.inf else ""
    return f"{_shown(title)}  {said}\n{bound}{reach}".lstrip()


def _chance(log10_p: float) -> str:
    """The p-value; nothing where it says nothing."""
    return f"p = {power_of_ten(log10_p)}" if log10_p < 0 else ""


def _shown(name: str) -> str:
    """A name as text: cut where it is long, and a dollar is no formula."""
    return (name if len(name) <= _NAME else f"{name[: _NAME - 1]}…").replace("$", r"\$")
