"""The figures of the white-box marks as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sealmark.evaluate.markdown import number, spread, table

_MATCH = -6.0  # log10 of the level alpha
_REMOVED = ("fine-tuned", "pruned by half", "int8", "overwritten")
Run = Mapping[str, Any]


def as_markdown(result: Mapping[str, Any]) -> str:
    """The page: the marks, what removes them, what a rewrite does to them, and where nothing is to be found."""
    rows: Mapping[str, list[Run]] = {title: runs for title, runs in result["rows"].items() if runs}
    versions = result["environment"]
    lines = [
        "# White-box marks",
        "",
        "Every mark that reads weights or activations, on the handwritten digits (900 rows to train, 400 for "
        f"the attacker, 497 to test), over the seeds {', '.join(map(str, result['seeds']))}, {result['epochs']} "
        "epochs. Written by `make whitebox`; do not edit.",
        "",
        "BER: share of wrong bits. A match is log10 p of -6 or less; ranges run from the least to the largest over "
        "the seeds. A learned reader (riga, diction) is held against clean models, so its p cannot fall under one "
        "in their number, and it never matches at this level.",
        "",
        *(f"- **{title} did not take**: {'; '.join(notes)}" for title, notes in result["failed"].items()),
        *([""] if result["failed"] else []),
    ]
    lines += _marks(rows) + _removal(rows) + _rewrites(rows) + _controls(rows) + _seals(result["seals"])
    lines += [
        f"sealmark {versions['sealmark']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{versions['machine']}, {versions['cores']} cores, {versions['threads']} thread: {result['seconds']} s.",
        "",
    ]
    return "\n".join(lines)


def _marks(rows: Mapping[str, list[Run]]) -> list[str]:
    head = ("Mark", "Bits", "Accuracy before", "Accuracy after", "Mean change", "BER", "log10 p")
    return [
        "## The marks",
        "",
        *table(
            head,
            [
                (
                    title,
                    number(runs[0]["bits"]) if runs[0]["bits"] else "",
                    spread([run["accuracy before"] for run in runs]),
                    spread([run["accuracy after"] for run in runs]),
                    f"{_mean([run['accuracy after'] - run['accuracy before'] for run in runs]):+.4f}",
                    *_read([run["marked"] for run in runs]),
                )
                for title, runs in rows.items()
            ],
        ),
    ]


def _removal(rows: Mapping[str, list[Run]]) -> list[str]:
    lines = [
        "## After removal attacks",
        "",
        "Fine-tuned: all layers, the owner's rate, 20 epochs on the attacker's 400 rows. Overwritten: the same "
        "scheme with a secret of the thief's, at the same rate for as long. Each cell: accuracy; BER; log10 p.",
        "",
    ]
    body = []
    for title, runs in rows.items():
        cells = []
        for name in _REMOVED:
            found = [run[name] for run in runs if name in run]
            accuracy = spread([entry["accuracy"] for entry in found])
            cells.append("; ".join([accuracy, *filter(None, _read(found))]) if found else "")
        body.append((title, *cells))
    return lines + table(("Mark", *(name.capitalize() for name in _REMOVED)), body)


def _rewrites(rows: Mapping[str, list[Run]]) -> list[str]:
    names = list(next(iter(rows.values()))[0]["rewrites"]) if rows else []
    moved = [run["rewrites"][name]["outputs moved by"] for runs in rows.values() for run in runs for name in names]
    lines = [
        "## After rewrites that keep the function",
        "",
        "Permuted neurons, rescaled neurons, flipped signs, added dummy neurons: they cost the thief nothing. "
        f"Outputs moved by at most {number(max(moved, default=0.0))} of the largest one. Each cell: log10 p as the "
        "suspect is, and after alignment to the owner's original (the unmarked start where the mark went into a "
        "trained model, the marked model otherwise). Before: as marked.",
        "",
    ]
    body = []
    for title, runs in rows.items():
        cells = [_read([run["marked"] for run in runs])[1]]
        for name in names:
            raw = _read([run["rewrites"][name]["as it is"] for run in runs])[1]
            aligned = [run["rewrites"][name]["aligned"] for run in runs]
            known = [entry for entry in aligned if entry is not None]
            cells.append(f"{raw} → {_read(known)[1]}" if known else raw)
        body.append((title, *cells))
    return lines + table(("Mark", "Before", *names), body)


def _controls(rows: Mapping[str, list[Run]]) -> list[str]:
    lines = [
        "## Where nothing is to be found",
        "",
        "The smallest log10 p over all seeds, and how many p-values it is the smallest of.",
        "",
    ]
    names = ("independent", "independent, aligned", "wrong secrets")
    body = []
    for title, runs in rows.items():
        columns = [[value for run in runs for value in run[name]] for name in names]
        body.append((title, *(f"{number(min(column))} of {len(column)}" for column in columns)))
    return lines + table(("Mark", "Independent models", "The same, aligned to the original", "Wrong secrets"), body)


def _seals(runs: Sequence[Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    names = list(runs[0])
    figures = dict.fromkeys(figure for name in names for figure in runs[0][name])
    body = [
        (
            figure,
            *(spread([run[name][figure] for run in runs]) if figure in runs[0][name] else "" for name in names),
        )
        for figure in figures
    ]
    return [
        "## Seals",
        "",
        "On the plain model. MimosaNet makes every change destructive, until colinear neurons are merged, which "
        "needs neither key nor data, or until gradients are clipped.",
        "",
        *table(("", *names), body),
    ]


def _read(found: Sequence[Run]) -> tuple[str, str]:
    if not all(entry["readable"] for entry in found):
        return "", "cannot be read"
    values = [entry["log10_p"] for entry in found]
    lost = any(value > _MATCH for value in values)
    ber = [entry["ber"] for entry in found]
    return (
        "" if all(value is None for value in ber) else spread(ber),
        f"**{spread(values)}**" if lost else spread(values),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
