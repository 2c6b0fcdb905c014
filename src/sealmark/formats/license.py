"""Licenses: who may use which model, until when, with the wrapped keys, in a signed document.

A license is the owner's promise, not a lock: what keeps a model closed are the keys, which
`sealmark.formats.license_keys` wraps for the licensee. The clock belongs to the machine that asks, and
the caller may bring a better one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import (
    ExpiredError,
    FormatError,
    ModelMismatchError,
    NotYetValidError,
    ParameterError,
)
from sealmark.crypto.armor import unarmor
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.envelope import open_document, sign_document
from sealmark.formats.times import parse_utc, utc_now, utc_text

SKEW = 300  # seconds by which an honest clock may be wrong
DEVICE = "sealmark-device-v1:"  # how the text of a device's id begins
MAX_KEYS = 8 << 20  # bytes; base64 in base64 they fill most of an envelope
_CONTEXT = "sealmark/license/v1"


@dataclass(frozen=True)
class Rights:
    """What a licensee may do, and when.

    Attributes:
        level: the owner's name for the kind of use, such as ``"standard"``.
        not_before: first moment of use; None from ever.
        not_after: last moment of use; None for ever.
        seats: on how many devices; 0 for any number. Without a server that is how many a license may list.
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
        id: the owner's number for it, unique among the owner's licenses; a renewal keeps it.
        user: the licensee.
        model: digest of the sealed or marked copy that it is for.
        scheme: public name of the lock or mark in the licensee's copy; may be empty.
        rights: what is granted.
        devices: ids of the devices that it is bound to; none for any device.
        wrap: the license's own key, wrapped for the licensee: a stanza of ``crypto.wrapping`` as JSON.
        keys: what opens the model, encrypted under that key; see `sealmark.formats.license_keys`.
        mark: commitment to the mark in the licensee's copy; may be empty.
        issued: when it was made.
        issuer: key id of the signer; `sign_license` and `read_license` set it.
    """

    id: str
    user: str
    model: str
    scheme: str = ""
    rights: Rights = field(default_factory=Rights)
    devices: tuple[str, ...] = ()
    wrap: Mapping[str, Any] = field(default_factory=dict, repr=False)
    keys: bytes = field(default=b"", repr=False)
    mark: str = ""
    issued: datetime = field(default_factory=utc_now)
    issuer: str = ""

    def context(self) -> bytes:
        """What wrapped keys are bound to: this license's id, model and user, whichever renewal it is.

        Example:
            >>> License("7", "ada", model="00").context()
            b'["sealmark/license/v1","7","00","ada"]'
        """
        return canonical_json([_CONTEXT, self.id, self.model, self.user])

    def check_time(self, now: datetime | None = None, *, skew: int = SKEW) -> None:
        """Refuse a license outside its time.

        Args:
            now: the time to judge by; this machine's clock unless given.
            skew: seconds that ``now`` may be wrong.

        Raises:
            NotYetValidError: before its time.
            ExpiredError: after it.
            ParameterError: ``now`` has no zone.
        """
        now, slack = now or utc_now(), timedelta(seconds=skew)
        stated = utc_text(now)  # refuses a time without a zone
        first, last = self.rights.not_before, self.rights.not_after
        # the difference of two times cannot leave the range of datetime, a sum can
        if first is not None and first - now > slack:
            raise NotYetValidError(f"license {self.id} is not valid yet", expected=utc_text(first), found=stated)
        if last is not None and now - last > slack:
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
        ParameterError: id, user or model is empty, there are more devices than seats, a device is none, it
            ends before it begins, or its keys are too large.
    """
    if not (license.id and license.user and license.model):
        raise ParameterError("an incomplete license", expected="an id, a user and the digest of a model")
    _check_rights(license.rights)
    _check_devices(license)
    if len(license.keys) > MAX_KEYS or bool(license.keys) != bool(license.wrap):
        raise ParameterError(
            "bad keys",
            expected=f"at most {MAX_KEYS} bytes, and a wrapped key where there are any",
            found=f"{len(license.keys)} bytes, {'a' if license.wrap else 'no'} wrapped key",
        )
    rights = {**vars(license.rights)}
    for name in ("not_before", "not_after"):
        rights[name] = utc_text(time) if (time := rights[name]) else None
    changes = {"rights": rights, "keys": base64.b64encode(license.keys).decode()}
    return sign_document(
        "license", vars(license) | changes | {"issuer": key.kid, "issued": utc_text(license.issued)}, key
    )


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
        NotYetValidError, ExpiredError: outside its time.

    Example:
        >>> key = SigningKey(bytes(32))
        >>> data = sign_license(License("7", "ada", model="00"), key)
        >>> read_license(data, [key.verify_key], model="00").user
        'ada'
    """
    found = verify_license(data, anchors)
    if model is not None:
        found.check_model(model)
    found.check_time(now, skew=skew)
    return found


def verify_license(data: bytes, anchors: Iterable[VerifyKey]) -> License:
    """What a signed license says, whatever model and time it is for; raises as `read_license`."""
    document = open_document(data, "license", anchors)
    found = _license(document.body)
    if found.issuer != document.signer.kid:
        raise FormatError("the license names another issuer", expected=document.signer.kid, found=found.issuer)
    return found


def _check_rights(rights: Rights) -> None:
    if type(rights.seats) is not int or rights.seats < 0:
        raise ParameterError("bad seats", expected="0 or more", found=rights.seats)
    if rights.not_before and rights.not_after and rights.not_after < rights.not_before:
        raise ParameterError(
            "the license ends before it begins",
            expected=f"an end after {utc_text(rights.not_before)}",
            found=utc_text(rights.not_after),
        )


def _check_devices(license: License) -> None:  # noqa: A002 - the word for the thing
    count, seats = len(license.devices), license.rights.seats
    if len(set(license.devices)) != count:
        raise ParameterError("a device stands twice", expected="each device once")
    if seats and count > seats:
        raise ParameterError("more devices than seats", expected=f"at most {seats}", found=count)
    for device in license.devices:
        try:
            unarmor(DEVICE, device)
        except FormatError:
            raise ParameterError(
                "bad device", expected=f"{DEVICE}...", found=device[:80], advice="copy it again"
            ) from None


def _license(body: dict[str, Any]) -> License:
    """The license, if every field has its type."""
    rights = body.get("rights")
    if body.keys() != _names(License) or not isinstance(rights, dict) or rights.keys() != _names(Rights):
        raise FormatError("bad license", expected="the fields of a license", found=sorted(body))
    seats, features, devices, wrap = rights["seats"], rights["features"], body["devices"], body["wrap"]
    if not (isinstance(features, list) and isinstance(devices, list) and isinstance(wrap, dict)):
        raise FormatError("bad license", expected="lists of features and devices, and a wrapped key")
    texts = [body[name] for name in ("id", "user", "model", "scheme", "mark", "issuer")] + [rights["level"]]
    if not all(isinstance(text, str) for text in (*texts, *features, *devices)):
        raise FormatError("bad license", expected="text")
    if type(seats) is not int or seats < 0:
        raise FormatError("bad license", expected="0 or more seats", found=repr(seats)[:40])
    keys = _unbase64(body["keys"])
    if bool(keys) != bool(wrap):
        raise FormatError("bad license", expected="keys and a wrapped key, or neither")
    times = {
        name: None if rights[name] is None else parse_utc(rights[name]) for name in ("not_before", "not_after")
    }
    granted = Rights(**rights | times | {"features": tuple(features)})
    changes = {"rights": granted, "devices": tuple(devices), "keys": keys, "issued": parse_utc(body["issued"])}
    return License(**body | changes)


def _unbase64(text: Any) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        data = None
    if data is None or base64.b64encode(data).decode() != text:
        raise FormatError("bad license", expected="keys in base64")
    return data


def _names(kind: type) -> set[str]:
    return {item.name for item in fields(kind)}
