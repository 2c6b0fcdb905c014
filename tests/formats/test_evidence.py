"""Signed evidence: every figure survives, and nothing that is not evidence passes for it."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from sealmark.core.errors import FormatError, ParameterError, TamperedError, UntrustedError
from sealmark.core.evidence import Basis, Evidence, Verdict
from sealmark.crypto.signing import SigningKey
from sealmark.formats.envelope import sign_document, verify_document
from sealmark.formats.evidence import SuspectRecord, read_evidence, sign_evidence

KEY = SigningKey(bytes(32))
ANCHORS = [KEY.verify_key]
SUSPECT = SuspectRecord(digest="ab" * 32, description="found on a public server")
EVIDENCE = Evidence(
    verdict=Verdict.MATCH,
    p_value=0.1 + 0.2,
    log10_p=-0.5,
    alpha=1e-6,
    tries=12,
    statistic=-0.0,
    null="Binomial(256, 0.5)",
    basis=Basis.EXACT,
    scheme="uchida",
    commitment="cd" * 32,
    queries=7,
    details={"bit_error_rate": 0.0, "names": ["a"], "worst": math.inf, "depth": {"layer": None}},
)
BODY = {
    "type": "verification",
    "evidence": EVIDENCE.as_dict(),
    "suspect": {"digest": "", "description": "a file"},
    "issued": "2031-01-01T00:00:00Z",
}


def test_evidence_reads_back_with_its_suspect_and_signer() -> None:
    issued = datetime(2031, 5, 17, 9, 30, tzinfo=UTC)
    found = read_evidence(sign_evidence(EVIDENCE, SUSPECT, KEY, issued=issued), ANCHORS)
    assert found == (EVIDENCE, SUSPECT, issued, KEY.verify_key)


@pytest.mark.parametrize("number", [0.0, 5e-324, 1e308, 0.1, -math.inf, math.inf, 3])
def test_a_figure_survives_to_the_last_bit(number: float) -> None:
    evidence = replace(EVIDENCE, log10_p=number, details={"figure": number})
    assert read_evidence(sign_evidence(evidence, SUSPECT, KEY), ANCHORS).evidence == evidence


def test_the_sign_of_zero_survives() -> None:
    found = read_evidence(sign_evidence(EVIDENCE, SUSPECT, KEY), ANCHORS).evidence
    assert math.copysign(1, found.statistic) == -1


def test_nan_may_stand_in_the_details() -> None:
    found = read_evidence(sign_evidence(replace(EVIDENCE, details={"a": math.nan}), SUSPECT, KEY), ANCHORS)
    assert math.isnan(found.evidence.details["a"])


@pytest.mark.parametrize("name", ["p_value", "log10_p", "alpha", "tries", "statistic"])
def test_evidence_that_rests_on_nan_is_not_signed(name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        sign_evidence(replace(EVIDENCE, **{name: math.nan}), SUSPECT, KEY)


def test_evidence_about_nothing_is_not_signed() -> None:
    with pytest.raises(ParameterError, match="suspect"):
        sign_evidence(EVIDENCE, SuspectRecord(), KEY)


def test_evidence_states_the_time_of_signing() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    issued = read_evidence(sign_evidence(EVIDENCE, SUSPECT, KEY), ANCHORS).issued
    assert before <= issued <= datetime.now(UTC)


def test_evidence_by_a_stranger_is_refused() -> None:
    with pytest.raises(UntrustedError):
        read_evidence(sign_evidence(EVIDENCE, SUSPECT, SigningKey.generate()), ANCHORS)


def test_a_changed_verdict_is_refused() -> None:
    data = sign_evidence(replace(EVIDENCE, verdict=Verdict.NO_MATCH), SUSPECT, KEY)
    forged = sign_evidence(EVIDENCE, SUSPECT, KEY)
    start, end = data.index(b'"signatures"'), forged.index(b'"signatures"')
    with pytest.raises(TamperedError):
        read_evidence(forged[:end] + data[start:], ANCHORS)


def changed(**fields: Any) -> dict[str, Any]:
    return BODY | {"evidence": EVIDENCE.as_dict() | fields}


@pytest.mark.parametrize(
    "body",
    [
        BODY | {"type": "accusation"},
        BODY | {"also": 1},
        BODY | {"suspect": "a file"},
        BODY | {"suspect": {"digest": ""}},
        BODY | {"suspect": {"digest": "", "description": 7}},
        BODY | {"suspect": {"digest": "", "name": "a file"}},
        BODY | {"issued": "yesterday"},
        BODY | {"evidence": []},
        changed(also=1),
        changed(p_value="0"),
        changed(p_value=True),
        changed(log10_p=math.nan),
        changed(scheme=7),
        changed(queries=1.5),
        changed(details=[]),
        changed(verdict="GUILTY"),
        changed(basis=["exact"]),
    ],
    ids=lambda body: "",
)
def test_a_signed_body_that_is_not_evidence_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        read_evidence(sign_document("evidence", body, KEY), ANCHORS)


def test_the_body_of_these_tests_is_evidence_where_nothing_is_changed() -> None:
    assert read_evidence(sign_document("evidence", BODY, KEY), ANCHORS).evidence == EVIDENCE


def test_an_accusation_is_evidence_with_a_body_of_its_own() -> None:
    body = {"type": "accusation", "accused": ["ada"], "log10_p": -math.inf}
    assert verify_document(sign_document("evidence", body, KEY), "evidence", ANCHORS) == body
