"""Tables and numbers as the pages of results write them."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, and an empty one after it.

    Example:
        >>> table(["a", "b"], [["1", "2"]])
        ['| a | b |', '| --- | --- |', '| 1 | 2 |', '']
    """
    rule = ["---"] * len(head)
    return [*(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), ""]


def number(value: float | None) -> str:
    """Three digits that count; whole numbers whole.

    Example:
        >>> number(0.98312), number(-76.5), number(30.0), number(None)
        ('0.983', '-76.5', '30', 'undefined')
    """
    if value is None:
        return "undefined"
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def spread(values: Sequence[float | None]) -> str:
    """Least to largest.

    Example:
        >>> spread([0.5, None, 0.25]), spread([1.0, 1.0])
        ('0.25 to 0.5', '1')
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return "undefined"
    return " to ".join(dict.fromkeys((number(known[0]), number(known[-1]))))
