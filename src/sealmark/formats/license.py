"""Licenses: who may use which model, until when, with the wrapped key, in a signed document.

A license is the owner's promise, not a lock: what keeps a model closed is the key, wrapped for the
licensee in ``wrap``. The clock belongs to the machine that asks, and the caller may bring a better one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any

from sealmark.core.errors import ExpiredError, FormatError, ModelMismatchError, ParameterError
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.envelope import open_document, sign_document
from sealmark.formats.times import parse_utc, utc_now, utc_text

SKEW = 300  # seconds by which an honest clock may be wrong


@dataclass(frozen=True)
class Rights:
    """What a licensee may do, and when.

    Attributes:
        level: the owner's name for the kind of use, such as ``"standard"``.
        not_before: first moment of use; None from ever.
        not_after: last moment of use; None for ever.
        seats: how many machines at once; 0 for any number.
        features: further names that the owner's software asks for.
    """

    level: str = "standard"
    not_before: datetime | None = None
    not_after: datetime | None = None
    seats: int = 0
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class License:
    """One user's license for one model.

    Attributes:
        id: the owner's number for it, unique among the owner's licenses.
        user: the licensee.
        model: digest of the model that it is for.
        scheme: public name of the lock or mark in the licensee's copy; may be empty.
        rights: what is granted.
        wrap: the data key, wrapped for the licensee: a stanza of ``crypto.wrapping`` as JSON.
        mark: commitment to the mark in the licensee's copy; may be empty.
        issued: when it was made.
        issuer: key id of the signer; `sign_license` and `read_license` set it.
    """

    id: str
    user: str
    model: str
    scheme: str = ""
    rights: Rights = field(default_factory=Rights)
    wrap: Mapping[str, Any] = field(default_factory=dict, repr=False)
    mark: str = ""
    issued: datetime = field(default_factory=utc_now)
    issuer: str = ""

    def check_time(self, now: datetime | None = None, *, skew: int = SKEW) -> None:
        """Refuse a license outside its time.

        Args:
            now: the time to judge by; this machine's clock unless given.
            skew: seconds that ``now`` may be wrong.

        Raises:
            ExpiredError: not valid yet, or no longer.
            ParameterError: ``now`` has no zone.
        """
        now, slack = now or utc_now(), timedelta(seconds=skew)
        stated = utc_text(now)  # refuses a time without a zone
        first, last = self.rights.not_before, self.rights.not_after
        if first is not None and now < first - slack:
            raise ExpiredError(f"license {self.id} is not valid yet", expected=utc_text(first), found=stated)
        if last is not None and now > last + slack:
            raise ExpiredError(
                f"license {self.id} has expired",
                expected=f"use until {utc_text(last)}",
                found=stated,
                advice="ask the owner for a new one",
            )

    def check_model(self, model: str) -> None:
        """Refuse a license that is for another model than the one with this digest.

        Raises:
            ModelMismatchError: it is.
        """
        if model != self.model:
            raise ModelMismatchError(f"license {self.id} is for another model", expected=self.model, found=model)


def sign_license(license: License, key: SigningKey) -> bytes:  # noqa: A002 - the word for the thing
    """Sign a license; ``issuer`` is set to the signer's key id.

    Raises:
        ParameterError: id, user or model is empty, seats are negative, or it ends before it begins.
    """
    rights = license.rights
    if not (license.id and license.user and license.model):
        raise ParameterError("an incomplete license", expected="an id, a user and the digest of a model")
    if type(rights.seats) is not int or rights.seats < 0:
        raise ParameterError("bad seats", expected="0 or more", found=rights.seats)
    if rights.not_before and rights.not_after and rights.not_after < rights.not_before:
        raise ParameterError(
            "the license ends before it begins",
            expected=f"an end after {utc_text(rights.not_before)}",
            found=utc_text(rights.not_after),
        )
    body = asdict(license) | {"issuer": key.kid, "issued": utc_text(license.issued)}
    for name in ("not_before", "not_after"):
        body["rights"][name] = utc_text(time) if (time := getattr(rights, name)) else None
    return sign_document("license", body, key)


def read_license(
    data: bytes,
    anchors: Iterable[VerifyKey],
    *,
    model: str | None = None,
    now: datetime | None = None,
    skew: int = SKEW,
) -> License:
    """Check a signed license and return it.

    Args:
        data: what `sign_license` wrote.
        anchors: the owners whom the caller trusts.
        model: digest of the model at hand; None to accept a license for any.
        now: the time to judge by; this machine's clock unless given.
        skew: seconds that the clock may be wrong.

    Raises:
        ParameterError: no anchors.
        FormatError: not a license.
        TamperedError: the signature does not fit.
        UntrustedError: signed by none of the anchors.
        ModelMismatchError: for another model.
        ExpiredError: outside its time.

    Example:
        >>> key = SigningKey(bytes(32))
        >>> data = sign_license(License("7", "ada", model="00"), key)
        >>> read_license(data, [key.verify_key], model="00").user
        'ada'
    """
    document = open_document(data, "license", anchors)
    found = _license(document.body)
    if found.issuer != document.signer.kid:
        raise FormatError("the license names another issuer", expected=document.signer.kid, found=found.issuer)
    if model is not None:
        found.check_model(model)
    found.check_time(now, skew=skew)
    return found


def _license(body: dict[str, Any]) -> License:
    """The license, if every field has its type."""
    rights = body.get("rights")
    if body.keys() != _names(License) or not isinstance(rights, dict) or rights.keys() != _names(Rights):
        raise FormatError("bad license", expected="the fields of a license", found=sorted(body))
    seats, features, wrap = rights["seats"], rights["features"], body["wrap"]
    texts = [body[name] for name in ("id", "user", "model", "scheme", "mark", "issuer")] + [rights["level"]]
    if not isinstance(features, list) or not isinstance(wrap, dict):
        raise FormatError("bad license", expected="a list of features and a wrapped key")
    if not all(isinstance(text, str) for text in (*texts, *features)):
        raise FormatError("bad license", expected="text")
    if type(seats) is not int or seats < 0:
        raise FormatError("bad license", expected="0 or more seats", found=repr(seats)[:40])
    times = {
        name: None if rights[name] is None else parse_utc(rights[name]) for name in ("not_before", "not_after")
    }
    granted = Rights(**rights | times | {"features": tuple(features)})
    return License(**body | {"rights": granted, "issued": parse_utc(body["issued"])})


def _names(kind: type) -> set[str]:
    return {item.name for item in fields(kind)}
