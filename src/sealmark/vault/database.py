"""The SQLite file of a vault: opening, copying, and its errors in our terms."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sealmark.core.errors import FormatError, ParameterError, ServiceError

FILE = "vault.db"
TIMEOUT = 5.0
_SCHEMA = """
CREATE TABLE header (
    one INTEGER PRIMARY KEY CHECK (one = 1), public TEXT NOT NULL, tally BLOB NOT NULL);
CREATE TABLE records (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, id BLOB NOT NULL, scope BLOB NOT NULL,
    info BLOB NOT NULL, body BLOB, UNIQUE (kind, id));
CREATE INDEX by_scope ON records (kind, scope);
"""
_MACHINE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM,
}  # fmt: skip


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Turn SQLite's errors into ours.

    Raises:
        ServiceError: locked by another process for too long, disk full, no permission.
        FormatError: the file is damaged or is no vault.
        ParameterError: the vault was closed.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise ParameterError("the vault is closed", advice="open it again") from None
    except sqlite3.Error as error:
        # extended codes keep the primary one in the low byte; errors without one are about content
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _MACHINE:
            raise ServiceError("cannot use the vault", found=error, advice="try again") from error
        raise FormatError("the vault is damaged", found=error, advice="restore a backup") from error
    except UnicodeDecodeError as error:  # in a schema or a message of SQLite's
        raise FormatError("the vault is damaged", found=error.reason, advice="restore a backup") from error
    except OSError as error:
        raise ServiceError("cannot use the vault", found=error.strerror, advice="try again") from error


def connect(path: Path, *, timeout: float = TIMEOUT) -> sqlite3.Connection:
    """Open an existing file; transactions are explicit, threads take turns by their own lock.

    Raises:
        ParameterError: there is none.
        ServiceError: it cannot be opened.
    """
    if not path.is_file():
        raise ParameterError("no vault there", expected=f"a file {path}", advice="make one: sealmark init")
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with typed_errors():
        return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def check_sound(db: sqlite3.Connection) -> None:
    """Refuse a file whose pages or indexes contradict each other.

    Raises:
        FormatError: they do.
    """
    with typed_errors():
        (answer,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise FormatError("the vault is damaged", found=str(answer)[:200], advice="restore a backup")


def create_database(path: Path) -> None:
    """Make a new file with empty tables; readers do not wait for writers (WAL)."""
    with typed_errors(), contextlib.closing(_new(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(_SCHEMA)


def copy_database(source: sqlite3.Connection, path: Path, *, journal: str) -> None:
    """Copy a consistent state of ``source`` to a new file, whatever other processes do meanwhile."""
    with typed_errors(), contextlib.closing(_new(path)) as db:
        source.backup(db)
        db.execute(f"PRAGMA journal_mode={journal}")


def _new(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    return connect(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A private folder that becomes ``path`` only when the block ends well.

    Raises:
        ParameterError: something is there already, or the folder above it is missing.
        ServiceError: the disk is full or refuses.
    """
    taken = ParameterError(f"{path} is there already", expected="a new folder", advice="choose another one")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise taken
    if not path.parent.is_dir():
        raise ParameterError(f"cannot write {path}", expected="an existing folder", found=f"no {path.parent}")
    with typed_errors(), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as outer:
        inner = Path(outer) / "new"
        inner.mkdir(mode=0o700)
        yield inner
        try:
            inner.rename(path)
        except OSError:
            raise taken from None
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
