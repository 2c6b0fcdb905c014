"""The plot of a trace shows everybody's score, the threshold and the accused, whoever and however many."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.identity import Accusation, Suspicion, accuse
from sealmark.evaluate.explain import check_plot, draw_trace
from sealmark.stats.nulls import Binomial, KeyedProjection


def accusation(users: int, guilty: dict[int, float] | None = None, **law: float) -> Accusation:
    """Scores of innocents are normal; the guilty have theirs."""
    scores = np.random.default_rng(0).standard_normal(users)
    for index, score in (guilty or {}).items():
        scores[index] = score
    names = [f"user{i}" for i in range(users)]
    found = Suspicion(scores, KeyedProjection())
    return accuse(found, names, alpha=law.get("alpha", 1e-6), scheme="example", commitment="00")


def svg(found: Accusation, folder: Path, title: str = "") -> str:
    draw_trace(found, folder / "plot.svg", title=title)
    return (folder / "plot.svg").read_text("utf-8")


def shown(drawing: str) -> set[str]:
    """The texts of an SVG drawing, whole."""
    return {
        part.partition("</text>")[0] for part in drawing.split("<text")[1:] for part in [part.partition(">")[2]]
    }


def test_few_users_have_a_row_each_and_the_accused_a_p_value(tmp_path):
    texts = shown(svg(accusation(3, {1: 12.0}), tmp_path, "leak.safetensors"))
    assert {"user0", "user1", "user2", "threshold"} <= texts
    assert "leak.safetensors  MATCH: user1 accused" in texts
    assert "Of 3 users, anyone innocent is accused with chance at most 1e-06" in texts
    assert len([text for text in texts if text.startswith("p = ") and "⁻" in text]) == 1


def test_of_ten_thousand_users_the_accused_are_named_and_the_others_counted(tmp_path):
    texts = shown(svg(accusation(10_000, {7: 20.0, 4711: 15.0}), tmp_path))
    assert {"user7", "user4711", "others", "accused", "users, of 10,000"} <= texts
    assert "MATCH: user7, user4711 accused" in texts
    assert "user1" not in texts


def test_where_nobody_is_accused_the_plot_says_so_and_names_no_culprit(tmp_path):
    texts = shown(svg(accusation(500), tmp_path))
    assert "NO_MATCH: nobody is accused" in texts
    assert "accused" not in texts, "no such bar"
    assert "threshold" in texts


def test_a_threshold_that_cannot_be_reached_is_said_and_not_drawn(tmp_path):
    found = accuse(
        Suspicion(np.array([3.0, 1.0]), Binomial(4, 0.5)), ["a", "b"], alpha=1e-6, scheme="", commitment=""
    )
    texts = shown(svg(found, tmp_path))
    assert "INCONCLUSIVE: nobody is accused" in texts
    assert "No score that can be read of this suspect would do for an accusation." in texts
    assert "threshold" not in texts


def test_the_threshold_stands_where_accusations_begin(tmp_path, monkeypatch):
    levels: list[float] = []
    monkeypatch.setattr("sealmark.evaluate.explain._draw_level", lambda _, level: levels.append(level))
    svg(accusation(1000), tmp_path)
    for score, guilty in ((levels[0] + 1e-6, 1), (levels[0] - 1e-6, 0)):
        assert len(accusation(1000, {3: score}).accused) == guilty


def test_more_accused_than_rows_are_counted(tmp_path):
    texts = shown(svg(accusation(60, dict.fromkeys(range(25), 30.0)), tmp_path))
    assert "and 5 more" in texts
    assert "MATCH: user0, user1, user2 and 22 more accused" in texts


def test_names_are_shown_as_they_are_and_long_ones_are_cut(tmp_path):
    found = accuse(
        Suspicion(np.array([1.0, 20.0]), KeyedProjection()),
        ["$x$ & <b>", "n" * 60],
        alpha=0.01,
        scheme="",
        commitment="",
    )
    texts = shown(svg(found, tmp_path))
    assert "$x$ &amp; &lt;b&gt;" in texts
    assert f"{'n' * 27}…" in texts


def test_letters_that_the_font_lacks_do_not_stop_the_plot(tmp_path):
    found = accuse(
        Suspicion(np.array([9.0]), KeyedProjection()), ["株式会社"], alpha=0.01, scheme="", commitment=""
    )
    draw_trace(found, tmp_path / "plot.png")


def test_the_same_trace_draws_the_same_bytes(tmp_path):
    for suffix in ("svg", "png"):
        for name in ("one", "two"):
            draw_trace(accusation(50, {3: 9.0}), tmp_path / f"{name}.{suffix}", title="leak")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    assert (tmp_path / "one.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("name", ["plot", "plot.pdf", "svg"])
def test_another_kind_of_file_is_refused(name, tmp_path):
    with pytest.raises(ParameterError, match=r"\.svg or \.png"):
        draw_trace(accusation(3), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_without_the_extra_the_plot_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"sealmark\[plots\]"):
        check_plot(tmp_path / "plot.svg")


def test_an_accusation_read_from_a_file_has_no_scores_to_plot(tmp_path):
    with pytest.raises(ParameterError, match="nothing to plot"):
        draw_trace(dataclasses.replace(accusation(3), suspicion=None), tmp_path / "plot.svg")
