"""Bars and the law of chance, drawn where the numbers are."""

from __future__ import annotations

import re

import pytest

from sealmark.evaluate.charts import Bars, NullChart


@pytest.mark.parametrize(("value", "percent"), [(-1.0, 0), (0.0, 0), (1.0, 50), (2.0, 100), (9.0, 100)])
def test_a_bar_is_as_long_as_its_value_and_never_leaves_its_track(value: float, percent: float) -> None:
    assert Bars("c", [], top=2.0).percent(value) == percent


def test_the_law_peaks_where_chance_puts_most_matches() -> None:
    chart = NullChart("c", 30, 0.1, 14, [])
    points = [(float(x), float(y)) for x, y in re.findall(r"L([\d.]+),([\d.]+)", chart.curve)]
    highest = min(points, key=lambda point: point[1])
    assert highest[0] == chart.x(3)
    assert len(points) == 32


def test_the_axis_runs_from_none_to_all() -> None:
    chart = NullChart("c", 256, 0.5, 168, [])
    assert [k for _, k in chart.ticks] == [0, 64, 128, 192, 256]
    assert chart.ticks[0][0] == chart.left
    assert chart.ticks[-1][0] == chart.width - chart.left
