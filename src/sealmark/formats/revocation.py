"""Revocation lists: whose licenses no longer hold, in a signed document with a number that only grows.

A list says what is revoked when it was made. Someone who holds back the new list gets the old answer:
a reader keeps the number of the last list that it saw, and asks for a list that is young enough.
A renewal does not undo the license before it: where it grants less, the list says from which time on a
document of that license must be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sealmark.core.errors import FormatError, ParameterError, RevokedError, StaleListError
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.envelope import sign_document, verify_document
from sealmark.formats.license import License
from sealmark.formats.times import parse_utc, utc_now, utc_text


@dataclass(frozen=True)
class Revocation:
    """One license that was taken back.

    Attributes:
        license: its id.
        time: since when.
        reason: for people.
        before: only what was issued before this time was taken back, for a later one replaced it; None for all.
    """

    license: str
    time: datetime
    reason: str = ""
    before: datetime | None = None

    def hits(self, license: License) -> bool:  # noqa: A002 - the word for the thing
        """Whether this license was taken back."""
        return self.license == license.id and (self.before is None or license.issued < self.before)


@dataclass(frozen=True)
class RevocationList:
    """All licenses that were taken back.

    Attributes:
        number: 1, 2, 3 ...; the larger one is the newer list.
        entries: what is revoked.
        issued: when it was made.
    """

    number: int
    entries: tuple[Revocation, ...] = ()
    issued: datetime = field(default_factory=utc_now)

    def check(self, license: License) -> None:  # noqa: A002 - the word for the thing
        """Refuse a license that is on the list.

        Raises:
            RevokedError: it is.
        """
        for entry in self.entries:
            if entry.hits(license):
                raise RevokedError(
                    f"license {license.id} was {'revoked' if entry.before is None else 'replaced'}",
                    found=f"{utc_text(entry.time)} {entry.reason}".strip(),
                    advice="ask the owner" if entry.before is None else "use the one that was issued last",
                )

    def check_newer(self, seen: int) -> None:
        """Refuse this list where a newer one was seen.

        Args:
            seen: number of the newest one.

        Raises:
            StaleListError: it is larger than this one's.
        """
        if self.number < seen:
            raise StaleListError(
                "an old revocation list",
                expected=f"number {seen} or later",
                found=self.number,
                advice="fetch it again",
            )


def sign_revocations(revocations: RevocationList, key: SigningKey) -> bytes:
    """Sign a list.

    Raises:
        ParameterError: the number is under 1, or an entry names no license.
    """
    if type(revocations.number) is not int or revocations.number < 1:
        raise ParameterError("bad number of a list", expected="1 or more", found=revocations.number)
    if not all(entry.license for entry in revocations.entries):
        raise ParameterError("a revocation of nothing", expected="the id of a license")
    entries = [
        {
            "license": entry.license,
            "time": utc_text(entry.time),
            "reason": entry.reason,
            "before": None if entry.before is None else utc_text(entry.before),
        }
        for entry in revocations.entries
    ]
    body = {"number": revocations.number, "issued": utc_text(revocations.issued), "entries": entries}
    return sign_document("revocation", body, key)


def read_revocations(
    data: bytes,
    anchors: Iterable[VerifyKey],
    *,
    seen: int = 0,
    max_age: timedelta | None = None,
    now: datetime | None = None,
) -> RevocationList:
    """Check a signed list and return it.

    Args:
        data: what `sign_revocations` wrote.
        anchors: the owners whom the caller trusts.
        seen: number of the newest list that the caller ever accepted.
        max_age: refuse an older list; None accepts any age.
        now: the time to judge the age by; this machine's clock unless given.

    Raises:
        ParameterError: no anchors.
        FormatError: not a revocation list.
        TamperedError: the signature does not fit.
        UntrustedError: signed by none of the anchors.
        StaleListError: an older list than the one already seen, or older than ``max_age``.

    Example:
        >>> key = SigningKey(bytes(32))
        >>> data = sign_revocations(RevocationList(3), key)
        >>> read_revocations(data, [key.verify_key], seen=2).number
        3
    """
    found = _list(verify_document(data, "revocation", anchors))
    found.check_newer(seen)
    if max_age is not None and (now or utc_now()) - found.issued > max_age:
        raise StaleListError(
            "the revocation list is too old", expected=f"at most {max_age}", found=utc_text(found.issued)
        )
    return found


def _list(body: dict[str, Any]) -> RevocationList:
    if body.keys() != {"number", "issued", "entries"} or not isinstance(body["entries"], list):
        raise FormatError("bad revocation list", expected="number, issued and entries", found=sorted(body))
    if type(body["number"]) is not int or body["number"] < 1:
        raise FormatError("bad revocation list", expected="a number from 1")
    entries = tuple(_entry(entry) for entry in body["entries"])
    return RevocationList(body["number"], entries, parse_utc(body["issued"]))


def _entry(entry: Any) -> Revocation:
    if not isinstance(entry, dict) or entry.keys() != {"license", "time", "reason", "before"}:
        raise FormatError("bad revocation", expected="license, time, reason and before")
    if not isinstance(entry["license"], str) or not isinstance(entry["reason"], str):
        raise FormatError("bad revocation", expected="text")
    before = None if entry["before"] is None else parse_utc(entry["before"])
    return Revocation(entry["license"], parse_utc(entry["time"]), entry["reason"], before)
