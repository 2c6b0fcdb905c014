"""Signed evidence: a verdict about a suspect, with all that it rests on, in a signed document.

The floats of a verdict survive to the last bit, infinities included (a p-value of 0 has a logarithm
of minus infinity). NaN would be a verdict about nothing: it may stand in the details, never in a
figure that the verdict rests on. The null law is kept in words. What was not made by ``verify``, such
as the accusation of a user, is a body of its own under ``sign_document("evidence", {...})``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, NamedTuple

from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.evidence import Basis, Evidence, Verdict
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.envelope import open_document, sign_document
from sealmark.formats.times import parse_utc, utc_now, utc_text

TYPE = "verification"
_NUMBERS = ("p_value", "log10_p", "alpha", "tries", "statistic")
_TEXTS = ("null", "scheme", "commitment")
_NAMES = {item.name for item in fields(Evidence)}


@dataclass(frozen=True)
class SuspectRecord:
    """Which suspect the evidence is about.

    Attributes:
        digest: SHA-256 of its weights, or empty where the verifier could only ask it questions.
        description: for people: a file name, an address, how it was obtained.
    """

    digest: str = ""
    description: str = ""


class SignedEvidence(NamedTuple):
    """What a signed evidence document says, after its signature was checked.

    Attributes:
        evidence: the verdict.
        suspect: what it is about.
        issued: when it was signed, by the signer's clock.
        signer: which of the caller's keys signed it.
    """

    evidence: Evidence
    suspect: SuspectRecord
    issued: datetime
    signer: VerifyKey


def sign_evidence(
    evidence: Evidence, suspect: SuspectRecord, key: SigningKey, *, issued: datetime | None = None
) -> bytes:
    """Sign a verdict about a suspect.

    Args:
        evidence: from ``verify``.
        suspect: what it is about; a digest or a description at least.
        key: the verifier's.
        issued: the time to state; now, unless given.

    Raises:
        ParameterError: a figure is NaN, the details are not plain JSON, or nothing names the suspect.
    """
    if not suspect.digest and not suspect.description:
        raise ParameterError("evidence about nothing", expected="a digest or a description of the suspect")
    for name in _NUMBERS:
        if math.isnan(getattr(evidence, name)):
            raise ParameterError(f"{name} is not a number", advice="see what the scheme computed")
    body = {
        "type": TYPE,
        "evidence": evidence.as_dict(),
        "suspect": {"digest": suspect.digest, "description": suspect.description},
        "issued": utc_text(issued or utc_now()),
    }
    return sign_document("evidence", body, key)


def read_evidence(data: bytes, anchors: Iterable[VerifyKey]) -> SignedEvidence:
    """Check a signed verdict and return it.

    Args:
        data: what `sign_evidence` wrote.
        anchors: the verifiers whom the caller trusts.

    Raises:
        ParameterError: no anchors.
        FormatError: not evidence of a verification.
        TamperedError: the signature does not fit.
        UntrustedError: signed by none of the anchors.

    Example:
        >>> from sealmark.core.evidence import Null, Score, judge
        >>> class Coin(Null):
        ...     basis, floor = Basis.EXACT, -700.0
        ...     def log_p(self, statistic): return -statistic
        ...     def __repr__(self): return "Coin()"
        >>> key = SigningKey(bytes(32))
        >>> found = judge(Score(50, Coin()), scheme="example", commitment="00")
        >>> data = sign_evidence(found, SuspectRecord(description="a leaked file"), key)
        >>> read_evidence(data, [key.verify_key]).evidence == found
        True
    """
    document = open_document(data, "evidence", anchors)
    body = document.body
    if body.get("type") != TYPE or body.keys() != {"type", "evidence", "suspect", "issued"}:
        raise FormatError("not the evidence of a verification", expected=TYPE, found=repr(body.get("type"))[:40])
    suspect = body["suspect"]
    texts = suspect.values() if isinstance(suspect, dict) else ()
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise FormatError("bad suspect", expected="a digest and a description")
    if suspect.keys() != {"digest", "description"}:
        raise FormatError("bad suspect", expected="a digest and a description")
    return SignedEvidence(
        _evidence(body["evidence"]), SuspectRecord(**suspect), parse_utc(body["issued"]), document.signer
    )


def _evidence(values: Any) -> Evidence:
    """The verdict, if every field has its type."""
    if not isinstance(values, dict) or values.keys() != _NAMES:
        raise FormatError("bad evidence", expected=f"the fields {sorted(_NAMES)}")
    for name in _NUMBERS:
        if isinstance(values[name], bool) or not isinstance(values[name], (int, float)):
            raise FormatError(f"bad {name}", expected="a number", found=repr(values[name])[:40])
        if math.isnan(values[name]):
            raise FormatError(f"bad {name}", expected="a number", found="nan")
    if not all(isinstance(values[name], str) for name in _TEXTS):
        raise FormatError("bad evidence", expected=f"text in {_TEXTS}")
    if type(values["queries"]) is not int or not isinstance(values["details"], Mapping):
        raise FormatError("bad evidence", expected="a number of queries, and details")
    try:
        verdict, basis = Verdict(values["verdict"]), Basis(values["basis"])
    except ValueError:
        raise FormatError("bad evidence", expected="a known verdict and basis") from None
    return Evidence(**values | {"verdict": verdict, "basis": basis})
