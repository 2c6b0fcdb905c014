"""Progress: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sealmark.evaluate.narrator import Narrator


def told(*, terminal: bool) -> str:
    text = io.StringIO()
    tell = Narrator(Console(file=text, force_terminal=terminal, width=80), 2)
    with tell.step("Train [b]it[/b]") as step:
        step.on_epoch(1, 2, 0.5)
        step.result = "done [/]"
    with tell.step("Rest") as step:
        step.result = "well"
    return text.getvalue()


def test_outside_a_terminal_each_step_is_one_plain_line() -> None:
    lines = told(terminal=False).splitlines()
    assert [line.partition("  (")[0] for line in lines] == ["1/2  Train [b]it[/b]: done [/]", "2/2  Rest: well"]


def test_on_a_terminal_a_live_line_is_drawn_and_removed() -> None:
    text = told(terminal=True)
    assert "\x1b[" in text
    assert "Rest" in text


def test_nothing_is_said_of_a_step_that_fails() -> None:
    text = io.StringIO()
    with pytest.raises(KeyError), Narrator(Console(file=text), 1).step("Train"):
        raise KeyError("x")
    assert text.getvalue() == ""
