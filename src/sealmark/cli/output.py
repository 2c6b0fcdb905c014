"""What a command says: its product on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealmark.core.errors import SealmarkError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_PLAIN_WIDTH = 120  # of tables that nobody looks at in a terminal


@dataclass(frozen=True)
class Output:
    """The form of a command's product."""

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False

    def product(self, document: Mapping[str, Any], *text: RenderableType) -> None:
        """Print what the command was asked for: the document with --json, else the text."""
        if self.json:
            from sealmark.formats.strict_json import to_plain

            typer.echo(json.dumps(to_plain(document), ensure_ascii=False, allow_nan=False))
            return
        out = console()
        for part in text:
            out.print(part)


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes user data as it is: no markup, no highlighting, no emoji."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = max(made.width, _PLAIN_WIDTH)
    return made


def note(text: str) -> None:
    """Something for the person at the keyboard, on stderr."""
    typer.echo(text, err=True)


def report_error(error: SealmarkError, *, json_form: bool) -> None:
    """One line on stderr, or one JSON object there."""
    if json_form:
        note(json.dumps({"error": {"code": error.code, "message": str(error)}}, ensure_ascii=False))
    else:
        note(f"error [{error.code}]: {error}")


def facts(values: Mapping[str, object]) -> Table:
    """Names and values, one a line."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, str(value))
    return table


def listing(columns: list[str], rows: list[list[str]]) -> Table:
    """A table with a header."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def p_text(log10_p: float) -> str:
    """A p-value for people, however small.

    Example:
        >>> p_text(-3.0), p_text(-1234.5), p_text(float("-inf"))
        ('0.001', '10^-1234.5', '0')
    """
    if math.isinf(log10_p):
        return "0"
    return f"{10**log10_p:.3g}" if log10_p > -300 else f"10^{log10_p:.1f}"


def size_of(path: Path) -> int:
    """Bytes of a file or of the files in a folder, for a bar; 0 where there is nothing."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def tensor_progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr while ``total`` bytes go by, where stderr is a terminal."""
    with _bar(title, total) as advance:
        yield lambda _, count: advance(count)


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for callers that tell the bytes done and in all."""
    with _bar(title, None) as advance:
        before = 0

        def step(done: int, total: int) -> None:
            nonlocal before
            advance(done - before, total)
            before = done

        yield step


@contextmanager
def epoch_progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar on stderr for training."""
    with _bar(title, None, unit="epochs") as advance:
        yield lambda _, epochs, __: advance(1, epochs)


@contextmanager
def _bar(title: str, total: int | None, *, unit: str = "") -> Iterator[Callable[..., None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = MofNCompleteColumn() if unit else DownloadColumn(binary_units=True)
    err = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(title, total=total)

        def advance(count: int, total: int | None = None) -> None:
            if total is not None:
                progress.update(bar, total=total)
            progress.advance(bar, count)

        yield advance
