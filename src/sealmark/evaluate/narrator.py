"""Saying what is going on: a live line for each step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from sealmark.core.training import OnEpoch


class Step:
    """One step under way.

    Attributes:
        result: what shall be said when it is done.
    """

    def __init__(self, tick: OnEpoch) -> None:
        self.on_epoch = tick
        self.result = ""


class Narrator:
    """Tells of numbered steps.

    Args:
        console: where to; spinner and bar where it is a terminal.
        steps: how many there will be.

    Example:
        >>> import io
        >>> text = io.StringIO()
        >>> with Narrator(Console(file=text, width=80), 1).step("Train") as step:
        ...     step.result = "accuracy 98 %"
        >>> text.getvalue().startswith("1/1  Train: accuracy 98 %")
        True
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps, self._done = console, steps, 0

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run the block as the next step; nothing is said of a step that fails."""
        self._done += 1
        began = time.perf_counter()
        head = f"{self._done}/{self._steps}  {title}"
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as bar:
            line = bar.add_task(head, total=None)

            def tick(epoch: int, epochs: int, _: float) -> None:
                bar.update(line, completed=epoch, total=epochs)

            step = Step(tick)
            yield step
        text = Text(f"{head}: ", style="bold")
        text.append(step.result, style="not bold")
        text.append(f"  ({time.perf_counter() - began:.1f} s)", style="not bold dim")
        self._console.print(text)
