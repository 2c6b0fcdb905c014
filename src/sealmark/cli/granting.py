"""What ``issue`` grants with a copy: to whom, which rights, until when."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.authorization import FILE_PASSPHRASE
from sealmark.cli.keeping import ask_passphrase, first_line
from sealmark.core.errors import FormatError, ParameterError

if TYPE_CHECKING:
    from sealmark.core.secret import Secret
    from sealmark.crypto.recipients import Passphrase, Recipient
    from sealmark.formats.license import License, Rights
    from sealmark.vault import Vault

_option = functools.partial(typer.Option, rich_help_panel="License")
_DURATION = re.compile(r"([1-9][0-9]{0,4})([hdwy])")
_A_DAY = timedelta(days=1)
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "y": 365 * 24}
_RECIPIENT = "sealmark-recipient-"
_FEATURES = "A name that your software asks for; repeat for more."
When = Annotated[
    str | None, _option(metavar="WHEN", help="A day, a time or as 12h, 30d, 2w, 1y; for ever without.")
]
Level = Annotated[str | None, _option(metavar="NAME", help="The kind of use; with --lock-key its grade.")]
Feature = Annotated[list[str] | None, _option(metavar="NAME", help=_FEATURES)]
Seats = Annotated[int | None, _option(min=0, help="On how many devices; 0 for any number.")]
Device = Annotated[
    list[str] | None, _option(metavar="ID", help="As `sealmark device` prints it there; repeat for more.")
]


@dataclass(frozen=True)
class Grant:
    """The options of a license."""

    expires: When = None
    starts: Annotated[str | None, _option(metavar="WHEN", help="Likewise; at once without.")] = None
    level: Level = None
    feature: Feature = None
    seats: Seats = None
    device: Device = None
    to: Annotated[
        str | None, _option(metavar="RECIPIENT", help="Encrypt the copy for this user: a text or a file.")
    ] = None
    with_passphrase: Annotated[
        bool, _option("--with-passphrase", help=f"Encrypt it under a passphrase: ${FILE_PASSPHRASE}, or a prompt.")
    ] = False
    lock_key: Annotated[
        str | None, _option(metavar="NAME", help="The model is locked with this key: hand it out, of --level.")
    ] = None
    license_only: Annotated[
        bool, _option("--license-only", help="With --lock-key: no copies; the locked model is the same for all.")
    ] = False

    def rights(self) -> Rights:
        """What is granted.

        Raises:
            ParameterError: a time that is none, or seats without devices.
        """
        from sealmark.formats.license import Rights

        if self.seats and not self.device:
            raise ParameterError(
                "seats count devices", expected="--device ID besides, for each", found="no device",
                advice="leave --seats out, or ask for what `sealmark device` prints there",
            )  # fmt: skip
        return Rights(
            level=self.level or "standard",
            not_before=moment(self.starts, end=False),
            not_after=moment(self.expires, end=True),
            seats=self.seats or 0,
            features=tuple(self.feature or ()),
        )

    def fits(self, found: License, person: Person) -> bool:
        """Whether a license is what would be issued; times that count from now may be a day older."""
        asked = self.rights()
        for name, text in (("not_before", self.starts), ("not_after", self.expires)):
            if text and _DURATION.fullmatch(text):
                held, wanted = getattr(found.rights, name), getattr(asked, name)
                if held is None or not timedelta() <= wanted - held <= _A_DAY:
                    return False
                asked = replace(asked, **{name: held})
        same = (asked, tuple(self.device or ())) == (found.rights, found.devices)
        return same and person.opens(found)


@dataclass(frozen=True)
class Person:
    """Who gets something, and for whom it is encrypted; for nobody, if there is no key."""

    name: str
    to: Recipient | Passphrase | None = None

    def opens(self, found: License) -> bool:
        """Whether a license is wrapped as it would be for this person."""
        from sealmark.crypto.recipients import Recipient

        if isinstance(self.to, Recipient):
            return found.wrap.get("to") == str(self.to)
        return bool(found.wrap) == (self.to is not None) and "to" not in found.wrap


def people(names: list[str], file: Path | None, grant: Grant) -> list[Person]:
    """Everyone who is named, each once.

    Args:
        names: on the command line.
        file: a user a line; after a tab, perhaps, the recipient.
        grant: for whom it is encrypted, where that is not in the file.

    Raises:
        ParameterError: nobody, a bad name, a user twice, no such file, or one key for several users.
        FormatError: a recipient that is none.
    """
    from sealmark.crypto.recipients import Passphrase, Recipient
    from sealmark.vault.records import check_user

    lines = [] if file is None else _lines(file)
    listed = [Person(name, None) for name in names]
    for line in lines:
        name, tab, recipient = line.partition("\t")
        listed.append(Person(name.strip(), Recipient.parse(recipient) if tab else None))
    for person in listed:
        check_user(person.name)
        if _RECIPIENT in person.name:
            raise ParameterError(
                "a user's name holds a recipient",
                expected="a tab between the two",
                found=person.name[:60],
            )
    if not listed or len({person.name for person in listed}) != len(listed):
        found = [person.name for person in listed][:20]
        raise ParameterError("a user twice" if found else "no users", expected="each user once", found=found)
    if grant.to is None and not grant.with_passphrase:
        return listed
    if len(listed) > 1 or listed[0].to is not None or (grant.to is not None and grant.with_passphrase):
        raise ParameterError(
            "one key for several", expected="one user with --to or --with-passphrase",
            advice="put each user's recipient into the --users-file, after a tab",
        )  # fmt: skip
    if grant.to is None:
        words = ask_passphrase("Passphrase for the license", FILE_PASSPHRASE, new=True)
        return [replace(listed[0], to=Passphrase(words))]
    return [replace(listed[0], to=Recipient.parse(key_text(grant.to, "recipient")))]


def key_text(given: str, what: str) -> str:
    """A public key as text, given as such or as a file.

    Raises:
        ParameterError: neither.
    """
    if ":" in given:
        return given
    if not Path(given).is_file():
        raise ParameterError(f"no such {what}", expected="a key's text or a file with it", found=given)
    return first_line(Path(given))


def license_for(
    vault: Vault,
    person: Person,
    grant: Grant,
    *,
    model: str,
    scheme: str,
    data_key: bytes | None = None,
    key: Secret | None = None,
    mark: str = "",
) -> bytes:
    """A person's license for a model: the one that he has, or a new one.

    Args:
        vault: keeps it.
        person: the licensee.
        grant: the rights.
        model: digest of what it opens.
        scheme: of the mark or the lock.
        data_key: of the sealed copy.
        key: of the lock.
        mark: commitment to the mark.

    Raises:
        SealmarkError: as `Vault.issue_license`.
    """
    if held := held_license(vault, person, grant, model):
        return held
    return vault.issue_license(
        person.name, model=model, to=person.to, data_key=data_key if person.to else None, key=key,
        scheme=scheme, rights=grant.rights(), devices=grant.device or (), mark=mark,
    ).data  # fmt: skip


def held_license(vault: Vault, person: Person, grant: Grant, model: str) -> bytes:
    """The license that a person has for a model already, if it is what is granted; else nothing."""
    from sealmark.formats.license import verify_license

    for record in reversed(vault.license_records(person.name, model=model)):
        data = vault.license_document(record.id)
        if not record.revoked and grant.fits(verify_license(data, [vault.verify_key]), person):
            return data
    return b""


def moment(text: str | None, *, end: bool, now: datetime | None = None) -> datetime | None:
    """A time as people tell it.

    Args:
        text: a day (``2031-05-17``), a time (``2031-05-17T09:30:00Z``), or hours, days, weeks or years from now.
        end: whether a day counts to its end; else from its beginning.
        now: this machine's clock unless given.

    Raises:
        ParameterError: none of these.

    Example:
        >>> moment("2031-05-17", end=True).isoformat()
        '2031-05-17T23:59:59+00:00'
        >>> moment("30d", end=True, now=datetime(2031, 5, 17, 9, 30, tzinfo=UTC)).isoformat()
        '2031-06-16T23:59:59+00:00'
    """
    from sealmark.formats.times import parse_utc, utc_now

    if text is None:
        return None
    try:
        if counted := _DURATION.fullmatch(text):
            time = (now or utc_now()) + timedelta(hours=int(counted[1]) * _HOURS[counted[2]])
            return time if counted[2] == "h" else _edge(time, end=end)
        return parse_utc(text) if "T" in text else _edge(datetime.strptime(text, "%Y-%m-%d"), end=end)
    except (ValueError, OverflowError, FormatError):
        raise ParameterError(
            "bad time", expected="2031-05-17, 2031-05-17T09:30:00Z, or as 12h, 30d, 2w, 1y", found=repr(text)[:60]
        ) from None


def _edge(time: datetime, *, end: bool) -> datetime:
    """The first or the last second of a day, in UTC."""
    first = time.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    return first + timedelta(days=1, seconds=-1) if end else first


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ParameterError("no such file", expected="a user a line", found=file)
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ParameterError(f"{file} is not text", expected="UTF-8, a user a line") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]
