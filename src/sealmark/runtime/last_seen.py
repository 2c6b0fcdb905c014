"""What this machine saw before: the latest time, and the newest list of the revoked of each owner.

A license ends, and a clock can be set back. A machine without a network has no better clock than its
own; but it can remember. Whoever may delete what it remembers can go back as far as the newest document
that he must still show, for the times in signed documents cannot be deleted from them. That is all that
can be had offline.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import ArtifactError, ClockRollbackError, FormatError, ServiceError, UntrustedError
from sealmark.core.files import atomic_write
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.license import SKEW
from sealmark.formats.revocation import RevocationList, read_revocations
from sealmark.formats.strict_json import parse_canonical
from sealmark.formats.times import parse_utc, utc_text

STATE = "SEALMARK_STATE"  # the variable that names the folder
_FORMAT = "sealmark.seen.v1"
_LIMIT = 1000  # bytes


def state_folder() -> Path:
    """Where a user's machine remembers: ``$SEALMARK_STATE``, else ``$XDG_STATE_HOME/sealmark``.

    The latter is ``~/.local/state/sealmark`` unless set.
    """
    if chosen := os.environ.get(STATE):
        return Path(chosen)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "sealmark"


class LastSeen:
    """A memory in a folder of its own, which only its user can read; made where it is missing.

    Args:
        folder: `state_folder` unless given.

    Example:
        >>> import tempfile
        >>> from datetime import UTC
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LastSeen(folder).check_clock(datetime(2031, 5, 17, tzinfo=UTC))
        ...     LastSeen(folder).latest()
        datetime.datetime(2031, 5, 17, 0, 0, tzinfo=datetime.timezone.utc)
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = state_folder() if folder is None else Path(folder)
        self._file = self.folder / "seen.json"

    def check_clock(self, now: datetime, *signed: datetime, skew: int = SKEW) -> None:
        """Refuse a clock that was set back, and remember what it shows otherwise.

        Args:
            now: what the clock shows.
            signed: times in signed documents, which the clock cannot be before.
            skew: seconds by which clocks may differ.

        Raises:
            ClockRollbackError: the clock was set back by more than the skew.
            FormatError: the memory is damaged.
            ServiceError: the folder cannot be written.
            ParameterError: ``now`` has no zone.
        """
        stated = utc_text(now)  # refuses a time without a zone
        with self._locked():
            seen = self.latest()
            latest = max((time for time in (seen, *signed) if time is not None), default=now)
            if latest - now > timedelta(seconds=skew):
                advice = "set the clock"
                if latest == seen:
                    advice += f"; if it is right now, it was wrong before: delete {self._file}"
                raise ClockRollbackError(
                    "the clock was set back",
                    expected=f"{utc_text(latest)} or later",
                    found=stated,
                    advice=advice,
                )
            if seen is None or now > seen:
                self._write(self._file, canonical_json({"format": _FORMAT, "latest": stated}))

    def latest(self) -> datetime | None:
        """The latest time that was seen; None where none was.

        Raises:
            FormatError: the memory is damaged.
        """
        data = _read(self._file)
        if data is None:
            return None
        try:
            fields = parse_canonical(data, limit=_LIMIT)
            if not isinstance(fields, dict) or fields.keys() != {"format", "latest"} or fields["format"] != _FORMAT:
                raise FormatError("other fields")
            return parse_utc(fields["latest"])
        except FormatError as error:
            raise FormatError(
                "the memory of the clock is damaged", found=error, advice=f"delete {self._file}"
            ) from None

    def revocations(self, issuer: VerifyKey) -> RevocationList | None:
        """The newest list of the revoked that was kept for an owner; None where none was.

        Raises:
            FormatError: what was kept is damaged.
        """
        path = self._list(issuer)
        data = _read(path)
        try:
            return None if data is None else read_revocations(data, [issuer])
        except (ArtifactError, UntrustedError) as error:
            raise FormatError(
                "the remembered list of the revoked is damaged", found=error, advice=f"delete {path}"
            ) from None

    def keep_revocations(self, issuer: VerifyKey, data: bytes) -> None:
        """Keep a signed list, unless a newer one is kept already.

        Raises:
            FormatError, TamperedError, UntrustedError: see `read_revocations`.
        """
        found = read_revocations(data, [issuer])
        with self._locked():
            kept = self.revocations(issuer)
            if kept is None or found.number > kept.number:
                self._write(self._list(issuer), data)

    def _list(self, issuer: VerifyKey) -> Path:
        return self.folder / f"revoked-{issuer.kid}.json"

    def _write(self, path: Path, data: bytes) -> None:
        with atomic_write(path, mode=0o600) as file:
            file.write(data)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time, so that none takes back what another one saw."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServiceError(
                f"cannot write {self.folder}",
                found=error.strerror,
                advice=f"name another folder in the variable {STATE}",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # and the lock goes with it


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServiceError(f"cannot read {path}", found=error.strerror) from error
