"""Reports for people: one HTML file with everything in it, no scripts and no network.

A report is sections of claims, each with its figure, beside the charts and tables that they rest on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sealmark import __version__
from sealmark.core import registry
from sealmark.core.errors import ParameterError
from sealmark.core.files import atomic_write
from sealmark.evaluate.charts import Bars, NullChart, Table


@dataclass(frozen=True)
class Claim:
    """A sentence that is true or not, and the figure that says so.

    Attributes:
        text: what is claimed.
        figure: what was measured.
        holds: whether the figure bears the claim out.
        control: a negative control: something that must not happen, and did not.
    """

    text: str
    figure: str
    holds: bool
    control: bool = False


@dataclass(frozen=True)
class Section:
    """One step of the job: what was done, what is claimed, what was measured."""

    title: str
    lead: str
    claims: Sequence[Claim] = ()
    blocks: Sequence[Bars | NullChart | Table] = ()


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        title: of the page.
        lead: a paragraph on what it is about.
        sections: in order.
        facts: (name, value) pairs at the head: time, seed, environment.
        notes: paragraphs at the end: how to read it, and what it does not say.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    @property
    def claims(self) -> list[Claim]:
        """Every claim of every section."""
        return [claim for section in self.sections for claim in section.claims]


def render(report: Report) -> str:
    """The page as HTML text; whatever stands in the report is escaped.

    Example:
        >>> page = render(Report("A <b>", "lead", [Section("S", "s", [Claim("c", "1", True)])]))
        >>> "A &lt;b&gt;" in page, "All 1 claims hold" in page
        (True, True)
    """
    environment = Environment(
        loader=PackageLoader("sealmark.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    failed = sum(not claim.holds for claim in report.claims)
    template = environment.get_template("report.html.j2")
    return template.render(report=report, failed=failed, version=__version__)


def write_report(report: Report, path: Path | str) -> None:
    """Write the page to a file, whole or not at all.

    Raises:
        ParameterError: the folder does not exist.
        ServiceError: the disk is full or refuses.
    """
    with atomic_write(path) as file:
        file.write(render(report).encode())


def write_evidence_report(documents: list[dict[str, Any]], path: Path) -> None:
    """A page of verdicts, for people who do not read JSON.

    Args:
        documents: each ``Evidence.as_dict()`` or ``Accusation.as_dict()``, with the optional texts
            ``subject``, ``issuer`` and ``time``. Signatures are checked before, not here.
        path: the HTML file.

    Raises:
        ParameterError: no documents, or one that is neither.
        ServiceError: the disk is full or refuses.
    """
    if not documents:
        raise ParameterError("nothing to report", expected="at least one document", found=0)
    sections = [_document_section(number, document) for number, document in enumerate(documents, 1)]
    matches = sum(document["verdict"] == "MATCH" for document in documents)
    lead = (
        f"{len(documents)} verdict{'s' * (len(documents) > 1)}, {matches} of them a match. Each rests on the "
        "figures below it and on the law under which they would be seen by chance."
    )
    write_report(Report("Evidence report", lead, sections, notes=READING), path)


READING = (
    "A p-value is the probability, under the law that is named, that a model made without the secret shows "
    "as much or more. It is not the probability that the claim is wrong. A verdict is a match when the "
    "p-value is at most alpha, which was fixed before the suspect was looked at.",
    "The law is “exact” or a proven “bound” where the randomness is the owner's own: then it holds for every "
    "suspect made without the secret, whatever that suspect is. It presumes that the secret's commitment was "
    "published before the model was released; otherwise ask for a correction for seeds that could have been "
    "tried.",
    "A mark shows where weights came from. It does not show who took them, or whether a license allowed it.",
)


def power_of_ten(log10_p: float) -> str:
    """A p-value for people, from its decimal logarithm; it does not break over lines.

    Example:
        >>> power_of_ten(-76.8).split(), power_of_ten(-0.3), power_of_ten(-math.inf)
        (['1.6', '·', '10⁻⁷⁷'], '0.5', '0')
    """
    if log10_p == -math.inf:
        return "0"
    if log10_p > -3:
        return f"{10**log10_p:.2g}"
    exponent = math.floor(log10_p)
    mantissa = f"{10 ** (log10_p - exponent):.1f}"
    if mantissa == "10.0":
        mantissa, exponent = "1.0", exponent + 1
    return f"{mantissa}\N{NO-BREAK SPACE}·\N{NO-BREAK SPACE}10" + str(exponent).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


def _document_section(number: int, document: Mapping[str, Any]) -> Section:
    kind = "accused" if "accused" in document else "p_value" if "p_value" in document else ""
    if not kind or "verdict" not in document:
        raise ParameterError(
            "neither evidence nor an accusation", expected="the dict of either", found=sorted(document)
        )
    rows = [(name, str(document[name])) for name in ("subject", "issuer", "time") if document.get(name)]
    rows += [
        ("Scheme", document["scheme"]),
        ("Level alpha", f"{document['alpha']:.3g}"),
        ("Law by chance", f"{document['null']} ({document['basis']})"),
        ("Commitment of the secret", document["commitment"]),
        *((str(name), _text(value)) for name, value in document.get("details", {}).items()),
    ]
    rows = [(name[:1].upper() + name[1:].replace("_", " "), value) for name, value in rows]
    table = Table("What it rests on", ("", ""), rows)
    make = _accusation if kind == "accused" else _evidence
    return make(f"{number}. ", document, table)


_LEADS = {
    "ownership": {
        "MATCH": "The suspect carries the owner's mark.",
        "NO_MATCH": "The suspect does not show the owner's mark.",
    },
    "identity": {
        "MATCH": "The suspect carries this user's mark.",
        "NO_MATCH": "The suspect does not show this user's mark.",
    },
    "integrity": {
        "MATCH": "Every bit is as it was when the model was sealed.",
        "NO_MATCH": "The model was changed since it was sealed.",
    },
}
_TITLES = {"ownership": "Whose is it?", "identity": "Which user is it?", "integrity": "Was it changed?"}
_UNDECIDED = "This test cannot decide at the level that was asked for."


def _evidence(number: str, document: Mapping[str, Any], table: Table) -> Section:
    known = registry.items("scheme").get(document["scheme"])
    function = known.folder if known and known.folder in _LEADS else "ownership"
    lead = _LEADS[function].get(document["verdict"], _UNDECIDED)
    head = ("Verdict", "p-value", "log₁₀ p", "Statistic", "Queries", "Hypotheses")
    row = (
        document["verdict"].replace("_", " "),
        power_of_ten(document["log10_p"]),
        f"{document['log10_p']:.1f}",
        f"{document['statistic']:.4g}",
        str(document.get("queries", 0)),
        f"{document['tries']:.4g}",
    )
    return Section(f"{number}{_TITLES[function]}", lead, blocks=[Table("Verdict", head, [row]), table])


def _accusation(number: str, document: Mapping[str, Any], table: Table) -> Section:
    names = [entry["user"] for entry in document["accused"]]
    silence = "Nobody is accused." if document["verdict"] == "NO_MATCH" else _UNDECIDED
    lead = f"Traced to {', '.join(names)}." if names else silence
    lead += f" {document['users']} users were looked at; the bound covers all of them together."
    return Section(f"{number}Who leaked it?", lead, blocks=[suspicion_bars("Suspicion, -log₁₀ p", document), table])


def suspicion_bars(caption: str, accusation: Mapping[str, Any]) -> Bars:
    """How strongly a suspect points at each user, against the level of accusation."""
    accused = {entry["user"] for entry in accusation["accused"]}
    level = -math.log10(accusation["alpha"])
    rows = [
        (
            entry["user"],
            min(-entry["log10_p"], 400.0),
            f"p = {power_of_ten(entry['log10_p'])}",
            "accused" if entry["user"] in accused else "calm",
        )
        for entry in accusation["ranking"]
    ]
    top = max([level * 1.6, *(value for _, value, _, _ in rows)])
    return Bars(caption, rows, top=top, line=level, line_label=f"accused from p ≤ {power_of_ten(-level)}")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(entry) for entry in value) or "none"
    return str(value)
