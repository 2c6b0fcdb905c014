"""The figures as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sealmark.evaluate.markdown import number, spread, table

_MATCH = -6.0  # log10 of the level alpha
_MET = {True: "met", False: "**falls short**", None: ""}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The page: what is met at a glance, then every figure with mean and spread over the seeds."""
    versions = result["environment"]
    judged = [row for part in ("figures", "attacks", "nulls") for row in result[part] if row["met"] is not None]
    short = [row for row in judged if not row["met"]]
    lines = [
        "# Figures",
        "",
        "Every scheme and attack on the handwritten digits (900 rows to train, 400 for the attacker, 497 to test), "
        f"over the seeds {', '.join(map(str, result['seeds']))}. Written by `make figures`; do not edit.",
        "",
        f"{len(judged) - len(short)} of {len(judged)} requirements are met."
        + (" These fall short:" if short else ""),
        "",
        *(f"- {_title(row)}" for row in short),
        *([""] if short else []),
        f"sealmark {versions['sealmark']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{versions['machine']}, {versions['cores']} cores, {versions['threads']} thread: {result['seconds']} s.",
        "",
    ]
    lines += _scheme_tables(result["figures"]) + _attack_tables(result["attacks"]) + _null_table(result["nulls"])
    return "\n".join(lines)


def _title(row: Mapping[str, Any]) -> str:
    if "attack" in row:
        return f"attack {row['attack']}: {row['requirement']}"
    if "part" not in row:
        return f"null of {row['name']}"
    return f"{row['group']} ({row['part']}), {row['name']}: {number(row['mean'])}, required {row['requirement']}"


def _scheme_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"## {group}", ""]
        lines += table(
            ("", "Figure", "Mean", "Least to largest", "Required", ""),
            [
                (row["part"], row["name"].replace("_", " "), number(row["mean"]), spread(row["values"]),
                 row["requirement"], _MET[row["met"]])
                for row in rows
                if row["group"] == group
            ],
        )  # fmt: skip
    return lines


def _attack_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cost = ("cpu_seconds", "rows", "rows_seen", "copies")
    lines = [
        "## Attacks: what they cost and what they leave",
        "",
        "On a model that carries both watermarks, a user's mark and a seal. Scratch: what the same attacker "
        "trains from a random start. Gain: (accuracy - scratch) / (plain - scratch), 0 for a worthless copy, 1 "
        "for all that the model was worth. An attacker without training has an untrained net for scratch. On so "
        "easy a task 400 rows are nearly as good as the model; then the gain is a ratio of two small numbers.",
        "",
        *table(
            ("Attack", "Accuracy", "Scratch", "Mean gain", "CPU s", "Rows", "Rows trained on", "Copies"),
            [
                (
                    row["attack"],
                    *(spread(row["values"][name]) for name in ("accuracy", "scratch")),
                    number(row["mean"]["gain"]),
                    *(number(row["mean"][name]) for name in cost),
                )
                for row in rows
            ],
        ),
        "## Attacks: what they do to every mark",
        "",
        "log10 p, least to largest over the seeds. A match is -6 or less; a mark is lost where a seed has more. "
        "For spread_spectrum it is the guiltiest user's, corrected for all users.",
        "",
    ]  # fmt: skip
    lines += table(
        (
            "Attack",
            "uchida",
            "adi",
            "spread_spectrum",
            "Guilty named",
            "Innocent named",
            "reversible",
            "Required",
            "",
        ),
        [
            (
                row["attack"],
                *(_mark(row["values"][name]) for name in ("uchida", "adi", "spread_spectrum")),
                spread(row["values"]["guilty accused"]),
                spread(row["values"]["innocent accused"]),
                "change found" if all(row["values"]["reversible: change found"]) else "**missed**",
                row["requirement"],
                _MET[row["met"]],
            )
            for row in rows
        ],
    )
    return lines


def _null_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Where nothing is to be found",
        "",
        "p-values of innocent models and wrong secrets. Fit: one-sided Kolmogorov-Smirnov test of P(p <= u) <= u; "
        "under 0.01 a null would not hold. Values over all seeds together.",
        "",
    ]
    return lines + table(
        ("Null", "p-values", "Smallest", "Matches", "Fit", ""),
        [
            (
                row["name"],
                str(row["count"]),
                number(row["smallest"]),
                str(row["matches"]),
                number(row["super_uniformity"]),
                _MET[row["met"]],
            )
            for row in rows
        ],
    )


def _mark(values: Sequence[float | None]) -> str:
    lost = any(value is not None and value > _MATCH for value in values)
    return f"{spread(values)}, **lost**" if lost else spread(values)
