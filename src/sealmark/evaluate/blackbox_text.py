"""The figures of the black-box schemes as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sealmark.evaluate.markdown import number, spread, table

Run = Mapping[str, Any]


def as_markdown(result: Mapping[str, Any]) -> str:
    """The page: the schemes, what attacks leave of them, where nothing is to be found, and false claims."""
    rows: Mapping[str, list[Run]] = {title: runs for title, runs in result["rows"].items() if runs}
    versions = result["environment"]
    lines = [
        "# Black-box watermarks and fingerprints",
        "",
        "Every scheme that reads answers, on the handwritten digits (900 rows to train, 400 for the attacker, 497 "
        f"to test), over the seeds {', '.join(map(str, result['seeds']))}, {result['epochs']} epochs. Written by "
        "`make blackbox`; do not edit.",
        "",
        "Watermarks are judged at 1e-6 by a law that is exact or a bound for any suspect. Fingerprints leave the "
        f"model as it is and are held against {result['references']} independent models, which certify 0.05 and "
        "no less. Ranges run from the least to the largest over the seeds. Bold: no match. A match rate of "
        "deepjudge is a distance below the references', of dataset_inference the lead of the owner's rows.",
        "",
        "dataset_inference is measured on digits under noise with 200 rows of the owner's, where models know their "
        "rows, and asks what else no scheme asks: its innocent models were trained on the attacker's rows alone.",
        "",
        *(f"- **{title} did not take**: {'; '.join(notes)}" for title, notes in result["failed"].items()),
        *([""] if result["failed"] else []),
    ]
    lines += _schemes(rows) + _after(rows, result["scratch"]) + _independent(rows) + _claims(result["false claims"])
    lines += [
        f"sealmark {versions['sealmark']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{versions['machine']}, {versions['cores']} cores, {versions['threads']} thread: {result['seconds']} s.",
        "",
    ]
    return "\n".join(lines)


def _schemes(rows: Mapping[str, list[Run]]) -> list[str]:
    head = ("Scheme", "Accuracy before", "after", "Mean change", "Match rate", "log10 p", "Queries", "in turn")
    body = []
    for title, runs in rows.items():
        found = [run["protected"] for run in runs]
        change = sum(run["accuracy after"] - run["accuracy before"] for run in runs) / len(runs)
        body.append(
            (
                title,
                spread([run["accuracy before"] for run in runs]),
                spread([run["accuracy after"] for run in runs]),
                f"{change:+.4f}",
                _rate(found),
                _p(found),
                spread([entry["queries"] for entry in found]),
                _known([entry["queries in turn"] for entry in found]),
            )
        )
    return [
        "## The schemes",
        "",
        "Before: the same training without the mark. In turn: queries until the verdict is sure, one after the "
        "other, by a p-value that allows for stopping.",
        "",
        *table(head, body),
    ]


def _after(rows: Mapping[str, list[Run]], scratch: Sequence[Mapping[str, float]]) -> list[str]:
    names = list(next(iter(rows.values()))[0]["after"]) if rows else []
    body = []
    for title, runs in rows.items():
        cells = []
        for name in names:
            found = [run["after"][name] for run in runs]
            cells.append("; ".join([spread([entry["accuracy"] for entry in found]), _rate(found), _p(found)]))
        body.append((title, *cells))
    reference = [
        _known([run.get(name) for run in scratch]) if any(name in run for run in scratch) else "" for name in names
    ]
    return [
        "## After attacks",
        "",
        "The thief has 400 rows of his own. Fine-tuned: all layers, the owner's rate, 20 epochs. Distilled, "
        "knockoff: a fresh network of the same form, trained on the answers. Blur to quantized inputs and query "
        "modification: the stolen model behind a filter. Each cell: the surrogate's accuracy; match rate; log10 p.",
        "",
        *table(
            ("Scheme", *(name.capitalize() for name in names)), [*body, ("same thief, no stolen model", *reference)]
        ),
    ]


def _independent(rows: Mapping[str, list[Run]]) -> list[str]:
    body = []
    for title, runs in rows.items():
        found = [entry for run in runs for entry in run["independent"]]
        claims = [entry["paper claims"] for entry in found if entry["paper claims"] is not None]
        body.append(
            (
                title,
                _rate(found),
                number(min(entry["log10_p"] for entry in found)),
                f"{sum(entry['match'] for entry in found)} of {len(found)}",
                f"{sum(claims)} of {len(claims)}" if claims else "",
            )
        )
    head = ("Scheme", "Match rate", "Smallest log10 p", "Accused", "Accused by the paper's rule")
    return [
        "## Independent models",
        "",
        "Ten a seed, half of them on the owner's rows. At 0.05 a fingerprint may accuse one in twenty.",
        "",
        *table(head, body),
    ]


def _claims(claims: Mapping[str, Sequence[Run]]) -> list[str]:
    body = []
    for title, runs in claims.items():
        if not runs:
            continue
        total = sum(run["innocent"] for run in runs)
        body.append(
            (
                title,
                f"{sum(run['naive'] for run in runs)} of {total}",
                f"{sum(run['ours'] for run in runs)} of {total}",
                f"{runs[0]['alpha']:g}",
            )
        )
    return [
        "## False claims",
        "",
        "A malicious accuser trains three models on his own rows and optimizes inputs until they transfer (Liu et "
        "al. 2024). How many innocent models he can claim: by the papers' rule, with labels and inputs as he "
        "likes, committed before; by ours, where labels follow from a seed that is drawn after the inputs are "
        "committed, and fingerprints are held against the judge's own models.",
        "",
        *table(("Scheme", "By the paper's rule", "By ours", "alpha"), body),
    ]


def _rate(found: Sequence[Run]) -> str:
    rates = [entry["rate"] if entry["rate"] is not None else entry["statistic"] for entry in found]
    return spread(rates)


def _p(found: Sequence[Run]) -> str:
    text = spread([entry["log10_p"] for entry in found])
    return text if all(entry["match"] for entry in found) else f"**{text}**"


def _known(values: Sequence[float | None]) -> str:
    return "" if all(value is None for value in values) else spread(values)
