"""What a vault tells about the things that it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sealmark.core.errors import ParameterError
from sealmark.formats.times import utc_now, utc_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_USER = 200


@dataclass(frozen=True)
class SecretRecord:
    """A scheme's secret, or a lock's key.

    Attributes:
        name: the owner's name for it.
        scheme: public name of the scheme.
        commitment: safe to publish.
        model: digest of the model that it was made for.
        created: ISO 8601 time, as the secret states it.
    """

    name: str
    scheme: str
    commitment: str
    model: str
    created: str


@dataclass(frozen=True)
class UserRecord:
    """One user's copy of one model.

    Attributes:
        user: whose.
        secret: name of the secret that the copy was marked with.
        model: digest of the model before it was marked.
        commitment: of the secret.
        copy: digest of the user's copy; empty where none was made.
        mark: what tells this copy from others, as far as the secret does not; plain JSON.
        issued: ISO 8601 time.
        revoked: ISO 8601 time; empty while the user may use the copy.
        reason: why it was revoked.
    """

    user: str
    secret: str
    model: str
    commitment: str
    copy: str = ""
    mark: Mapping[str, Any] = field(default_factory=dict)
    issued: str = ""
    revoked: str = ""
    reason: str = ""


@dataclass(frozen=True)
class LicenseRecord:
    """How a license stands. Times are ISO 8601; empty for none.

    Attributes:
        id: its number.
        user: the licensee.
        model: digest of the copy that it is for.
        scheme: public name of the lock or mark in that copy.
        level: of use.
        issued: when the document that holds now was made.
        not_before: first moment of use.
        not_after: last moment of use.
        seats: on how many devices; 0 for any number.
        devices: ids of the devices that it is bound to.
        mark: commitment to the mark in the copy.
        document: SHA-256 of the document that holds now.
        edition: how often it was renewed.
        superseded: documents that were issued before this time hold no more.
        revoked: when it was taken back.
        reason: why.
    """

    id: str
    user: str
    model: str
    scheme: str
    level: str
    issued: str
    not_before: str
    not_after: str
    seats: int
    devices: tuple[str, ...]
    mark: str
    document: str
    edition: int = 0
    superseded: str = ""
    revoked: str = ""
    reason: str = ""

    @classmethod
    def parse(cls, info: Mapping[str, Any]) -> LicenseRecord:
        """The record that a vault holds as plain JSON."""
        return cls(**{**info, "devices": tuple(info["devices"])})

    def status(self, now: datetime | None = None) -> str:
        """``"valid"``, ``"not yet valid"``, ``"expired"`` or ``"revoked"``; now, unless a time is given."""
        time = utc_text(now or utc_now())  # texts of one form sort as the times do
        if self.revoked:
            return "revoked"
        if self.not_after and time > self.not_after:
            return "expired"
        return "not yet valid" if time < self.not_before else "valid"


@dataclass(frozen=True)
class DocumentRecord:
    """A signed document.

    Attributes:
        id: SHA-256 of its bytes.
        kind: what it is, such as ``"verification"`` or ``"accusation"``.
        subject: whom or what it is about.
        added: ISO 8601 time.
    """

    id: str
    kind: str
    subject: str
    added: str


def check_name(name: str) -> str:
    """The name, if it can be a file's name on any system.

    Raises:
        ParameterError: it cannot.

    Example:
        >>> check_name("resnet.v2")
        'resnet.v2'
    """
    if not _NAME.fullmatch(name):
        raise ParameterError(
            "bad name",
            expected="1 to 100 letters, digits, dots, hyphens and underscores, the first a letter or digit",
            found=repr(name)[:120],
        )
    return name


def check_user(user: str) -> str:
    """The user's id, if a person can read it.

    Raises:
        ParameterError: empty, longer than 200 characters, or with unprintable ones.
    """
    if not (user.strip() and len(user) <= MAX_USER and user.isprintable()):
        raise ParameterError("bad user", expected=f"1 to {MAX_USER} printable characters", found=repr(user)[:120])
    return user
