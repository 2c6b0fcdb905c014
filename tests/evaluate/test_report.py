"""Pages for people: honest, self-contained, and safe with hostile names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Score, Verdict, judge
from sealmark.core.identity import Accusation, Ranked
from sealmark.evaluate.charts import Bars, NullChart, Table
from sealmark.evaluate.report import (
    Claim,
    Report,
    Section,
    power_of_ten,
    render,
    suspicion_bars,
    write_evidence_report,
    write_report,
)
from sealmark.stats.nulls import Binomial

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&"
TRUE, FALSE = Claim("It is so.", "1", True), Claim("It is not.", "0", False, control=True)
EVIDENCE = judge(
    Score(256, Binomial(256, 0.5, two_sided=True), {"bits": 256, "ber": 0.0}), scheme="uchida", commitment="ab" * 32
)
ACCUSATION = Accusation(
    verdict=Verdict.MATCH,
    accused=(Ranked("Cobalt", 40.0, 1e-30, -30.0),),
    ranking=(Ranked("Cobalt", 40.0, 1e-30, -30.0), Ranked("Delta", 1.0, 1.0, 0.0)),
    alpha=1e-6,
    users=20,
    null="Chernoff's bound on a sum of 1024 independent terms",
    basis=Basis.BOUND,
    scheme="spread_spectrum",
    commitment="cd" * 32,
    details={"tensors_skipped": [], "correlation": 0.51},
)


def page_of(*claims: Claim, blocks: tuple[Any, ...] = ()) -> str:
    return render(Report("A page", "Its lead", [Section("Part", "What it is", claims, blocks)]))


def evidence_page(tmp_path: Path, *documents: dict[str, Any]) -> str:
    write_evidence_report(list(documents), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text("utf-8")


def test_a_page_whose_claims_all_hold_says_so(read_page: Callable[[str], Any]) -> None:
    page = read_page(page_of(TRUE, replace(FALSE, holds=True)))
    assert "All 2 claims hold, 1 of them negative controls." in page.text
    assert "failed" not in " ".join(page.classes)


def test_a_claim_that_does_not_hold_is_counted_and_marked(read_page: Callable[[str], Any]) -> None:
    page = read_page(page_of(TRUE, FALSE))
    assert "1 of 2 claims do NOT hold" in page.text
    assert page.classes.count("failed") == 1
    assert "does not hold" in page.text


def test_a_page_without_claims_has_no_banner(read_page: Callable[[str], Any]) -> None:
    assert "verdict" not in read_page(page_of()).classes


def test_every_kind_of_block_is_shown_in_a_well_formed_page(read_page: Callable[[str], Any]) -> None:
    blocks = (
        Bars("Accuracy", [("plain", 0.99, "99 %", "calm")], line=0.1, line_label="guessing"),
        NullChart("Bits", 256, 0.5, 168, [("leak", 250, True), ("other", 120, False)]),
        Table("Figures", ("Name", "Value"), [("a", "1")]),
        Table("Pairs", ("", ""), [("b", "2")]),
    )
    page = read_page(page_of(TRUE, blocks=blocks))
    for text in ("Accuracy", "guessing", "a match from 168 of 256", "leak", "Figures", "Value", "Pairs"):
        assert text in page.text
    assert page.tags.count("svg") == 1
    assert page.tags.count("thead") == 1


def test_a_page_refers_to_nothing_outside_and_runs_nothing(read_page: Callable[[str], Any]) -> None:
    html = page_of(TRUE)
    page = read_page(html)
    assert not page.links
    assert "script" not in page.tags
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_text_is_escaped_wherever_it_stands(read_page: Callable[[str], Any]) -> None:
    blocks = (
        Bars(HOSTILE, [(HOSTILE, 0.5, HOSTILE, "calm")], line=0.1, line_label=HOSTILE),
        NullChart(HOSTILE, 10, 0.5, 9, [(HOSTILE, 3, False)]),
        Table(HOSTILE, (HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)]),
    )
    section = Section(HOSTILE, HOSTILE, [Claim(HOSTILE, HOSTILE, True)], blocks)
    page = read_page(render(Report(HOSTILE, HOSTILE, [section], [(HOSTILE, HOSTILE)], [HOSTILE])))
    assert not {"script", "img"} & set(page.tags)
    assert not page.links
    assert not page.handlers
    assert page.text.count("alert(1)") >= 15


def test_a_page_adapts_to_dark_screens_phones_and_paper() -> None:
    html = page_of(TRUE)
    for rule in ("prefers-color-scheme: dark", "@media (max-width", "@media print", "width=device-width"):
        assert rule in html


def test_an_evidence_page_shows_verdict_p_value_and_what_it_rests_on(
    tmp_path: Path, read_page: Callable[[str], Any]
) -> None:
    document = EVIDENCE.as_dict() | {
        "subject": "leak.safetensors",
        "issuer": "key 1",
        "time": "2031-05-17T09:30:00Z",
    }
    text = read_page(evidence_page(tmp_path, document)).text
    for expected in (
        "The suspect carries the owner's mark.",
        "1.7 · 10⁻⁷⁷",
        "leak.safetensors",
        "key 1",
        "1 verdict,",
        "2031-05-17T09:30:00Z",
        "Bin(256, 0.5), two-sided",
        "(exact)",
        "ab" * 32,
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("verdict", "lead"),
    [("NO_MATCH", "does not show the owner's mark"), ("INCONCLUSIVE", "cannot decide at the level")],
)
def test_an_evidence_page_claims_no_match_where_there_is_none(
    verdict: str, lead: str, tmp_path: Path, read_page: Callable[[str], Any]
) -> None:
    text = read_page(evidence_page(tmp_path, EVIDENCE.as_dict() | {"verdict": verdict})).text
    assert lead in text
    assert "carries the owner's mark" not in text


@pytest.mark.parametrize(
    ("scheme", "verdict", "lead"),
    [
        ("reversible", "MATCH", "Was it changed? Every bit is as it was when the model was sealed."),
        ("reversible", "NO_MATCH", "Was it changed? The model was changed since it was sealed."),
        ("spread_spectrum", "MATCH", "Which user is it? The suspect carries this user's mark."),
        ("somebody else's", "MATCH", "Whose is it? The suspect carries the owner's mark."),
    ],
)
def test_a_verdict_is_told_in_the_words_of_what_its_scheme_is_for(
    scheme: str, verdict: str, lead: str, tmp_path: Path, read_page: Callable[[str], Any]
) -> None:
    document = EVIDENCE.as_dict() | {"scheme": scheme, "verdict": verdict}
    assert lead in read_page(evidence_page(tmp_path, document)).text


def test_an_accusation_names_the_accused_and_shows_the_others(
    tmp_path: Path, read_page: Callable[[str], Any]
) -> None:
    page = read_page(evidence_page(tmp_path, ACCUSATION.as_dict()))
    assert "Traced to Cobalt. 20 users were looked at" in page.text
    assert "Delta" in page.text
    assert page.classes.count("fill accused") == 1
    assert page.classes.count("fill calm") == 1


@pytest.mark.parametrize(
    ("verdict", "lead"), [("NO_MATCH", "Nobody is accused."), ("INCONCLUSIVE", "This test cannot decide")]
)
def test_an_accusation_of_nobody_says_so(
    verdict: str, lead: str, tmp_path: Path, read_page: Callable[[str], Any]
) -> None:
    document = ACCUSATION.as_dict() | {"verdict": verdict, "accused": []}
    page = read_page(evidence_page(tmp_path, document))
    assert lead in page.text
    assert "fill accused" not in page.classes


def test_a_hostile_user_cannot_write_into_the_page(tmp_path: Path, read_page: Callable[[str], Any]) -> None:
    entry = Ranked(HOSTILE, 40.0, 1e-30, -30.0)
    document = replace(ACCUSATION, accused=(entry,), ranking=(entry,)).as_dict()
    page = read_page(evidence_page(tmp_path, document | {"subject": HOSTILE}))
    assert not {"script", "img"} & set(page.tags)
    assert "alert(1)" in page.text


def test_a_p_value_of_zero_is_shown(tmp_path: Path, read_page: Callable[[str], Any]) -> None:
    document = EVIDENCE.as_dict() | {"log10_p": -math.inf, "p_value": 0.0}
    assert "-inf" in read_page(evidence_page(tmp_path, document)).text
    entry = Ranked("Cobalt", 40.0, 0.0, -math.inf)
    bars = suspicion_bars("s", replace(ACCUSATION, accused=(entry,), ranking=(entry,)).as_dict())
    assert bars.percent(bars.rows[0][1]) == 100


def test_a_report_of_nothing_or_of_something_else_is_refused(tmp_path: Path) -> None:
    for documents in ([], [{"verdict": "MATCH"}], [{"p_value": 1.0}]):
        with pytest.raises(ParameterError):
            write_evidence_report(documents, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_report_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError):
        write_report(Report("A", "b", []), tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(("log10_p", "text"), [(-9.9999, "1.0 10⁻¹⁰"), (-2.0, "0.01"), (0.0, "1")])
def test_p_values_round_to_what_people_expect(log10_p: float, text: str) -> None:
    shown = power_of_ten(log10_p).replace("·", "")
    assert " ".join(shown.split()) == text
