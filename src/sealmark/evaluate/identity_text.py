"""The figures of user identity management as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sealmark.evaluate.copies import MARKS, joined, slug
from sealmark.evaluate.credentials import added
from sealmark.evaluate.markdown import number, spread, table
from sealmark.stats.calibration import clopper_pearson

Run = Mapping[str, Any]
COPY_HEAD = ("Pooled by", "Users", "Caught", "95 %", "Named", "log10 p", "Innocent", "Accuracy")


def as_markdown(result: Mapping[str, Any]) -> str:
    """The page: marks in copies by coalition and attack, then credentials by who shows what."""
    versions = result["environment"]
    lines = [
        "# User identity management",
        "",
        "On the handwritten digits (900 rows to train, 400 that attackers draw from, 497 to test), over the seeds "
        f"{', '.join(map(str, result['seeds']))}, {result['epochs']} epochs. A user is named, or let in, at a "
        "corrected p-value of at most 1e-6. Intervals are exact (Clopper and Pearson), 95 %. Written by `make "
        "identity`; do not edit.",
        "",
        "On CIFAR-10: [experiments](../../experiments/README.md). On all-MiniLM-L6-v2: [minilm](minilm.md).",
        "",
        "## Marks in users' copies",
        "",
        "Caught: coalitions that lost at least one member. Named: the mean share of members named. Innocent: "
        "names without a part in it that were accused, of all looked at, and the upper end of the interval. "
        "log10 p: the median over coalitions of the most suspected name's, corrected, averaged over seeds. "
        "Accuracy: of what the coalition made of its copies. Minimum and maximum are weight by weight, middle of "
        "both is their mean; by layers most of the weights are one user's, so that he alone is named. Intervals "
        "are for these models, users and names: coalitions overlap, and the 1,000 names without a copy are the "
        "same in each; the bound of 1e-6 on accusing anyone innocent is proven and needs no such figures.",
        "",
        *(line for title, runs in result["copies"].items() for line in _copies(title, runs)),
        "## Credentials",
        "",
        *credential_tables(result["credentials"]),
        f"sealmark {versions['sealmark']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{versions['machine']}, {versions['cores']} cores, {versions['threads']} thread: {result['seconds']} s.",
        "",
    ]
    return "\n".join(lines)


def _copies(title: str, runs: Sequence[Run]) -> list[str]:
    plain, marked = spread([run["plain"] for run in runs]), spread([s for run in runs for s in run["copies"]])
    controls = sum(count for run in runs for count in run["controls"].values())
    body = [
        copy_cells(way, size, joined([run["pooled"][way][size] for run in runs]))
        for way, sizes in runs[0]["pooled"].items()
        for size in sizes
    ]
    tried = sum(len(run["controls"]) for run in runs)
    return [
        f"### {title}",
        "",
        f"Parameters: {_parameters(title)}. Accuracy {plain}; of three copies a seed {marked}. "
        f"{runs[0]['holders']} users have copies, and {runs[0]['looked at']} names are looked at. Named on {tried} "
        f"controls ({', '.join(runs[0]['controls'])}): {controls or 'nobody'}.",
        "",
        f"![Coalitions that lose a member](identity-{slug(title)}.svg)",
        "",
        *table(COPY_HEAD, body),
    ]


def _parameters(title: str) -> str:
    """All of a scheme's, those of the title and the usual ones."""
    scheme = next(entry for entry in MARKS if entry.title == title).make()
    return ", ".join(f"{name} {value}" for name, value in scheme.parameters.items() if value != "")


def copy_cells(way: str, size: str, cell: Run) -> tuple[str, ...]:
    """A line of the table with `COPY_HEAD`: one way of pooling by coalitions of one size."""
    low, high = cell["caught interval"]
    return (
        way,
        size,
        f"{cell['caught']}/{cell['coalitions']}",
        f"{low:.2f} to {high:.2f}",
        number(cell["named"]),
        number(cell["log10 p"]),
        f"{cell['innocents named']}/{cell['innocents']}, under {cell['innocents bound']:.1g}",
        number(cell["accuracy"]),
    )


def credential_tables(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """Service and who is let in, by scheme; each with its runs."""
    service = [
        (
            title,
            spread([run["plain"] for run in runs]),
            spread([run["authorized"] for run in runs]),
            spread([run["closed gate"] for run in runs]),
            spread([run["without a gate"] for run in runs]),
            _rate([run["issued"] for run in runs]),
            number(fmean(run["enroll seconds"] for run in runs)),
            number(fmean(run["issue seconds"] for run in runs)),
        )
        for title, runs in found.items()
    ]
    return [
        "One served model for all users; each holds a credential. Without a gate: what the bare model gives to "
        "plain rows, so what stripping the gate gives.",
        "",
        *table(
            (
                "Scheme",
                "Plain",
                "Users",
                "Closed gate",
                "Without a gate",
                "Issued",
                "Enroll, CPU s",
                "Issue, CPU s",
            ),
            service,
        ),
        "### Who is let in",
        "",
        "Recognized: as the right user, at p <= 1e-6. Paper's rule: what the served model by itself takes for a "
        "credential, whoever's. The difference is what the owner's keyed draw for each user is worth. "
        "As the robbed: recognized as a user whose credential went into what was shown; the bound is for people "
        "outside that pool.",
        "",
        *table(
            ("Scheme", "Who shows what", "Recognized or let in", "95 %", "Paper's rule", "95 %"), _let_in(found)
        ),
    ]


def _let_in(found: Mapping[str, Sequence[Run]]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for title, runs in found.items():
        shown = {
            "users, their own": [run["genuine"] for run in runs],
            "users, after fine-tuning on 10 %": [run["genuine after fine-tuning"] for run in runs],
            "issued for a name on no list": [run["unissued"] for run in runs],
            **{name: [run["pretenses"][name] for run in runs] for name in runs[0]["pretenses"]},
        }
        rows += [(title, name, *_both(counts)) for name, counts in shown.items()]
    return rows


def _both(counts: Sequence[Run]) -> tuple[str, ...]:
    robbed = sum(count.get("as the robbed", [0])[0] for count in counts)
    accepted = _rate([count["accepted"] for count in counts])
    note = f"{accepted}, {robbed} as the robbed" if robbed else accepted
    return (
        note,
        _interval([count["accepted"] for count in counts]),
        _rate([count["served"] for count in counts]),
        _interval([count["served"] for count in counts]),
    )


def _rate(counts: Sequence[Sequence[int]]) -> str:
    successes, tries = added(counts)
    return f"{successes}/{tries}"


def _interval(counts: Sequence[Sequence[int]]) -> str:
    low, high = clopper_pearson(*added(counts))
    return f"{low:.3f} to {high:.3f}"
