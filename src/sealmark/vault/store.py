"""The encrypted records of a vault.

What someone without the key can see: how many records of which kind there are, in what order they
came, their sizes, which copies belong to the same (unnamed) secret and which licenses to the same
(unnamed) user. Names are looked up by a keyed hash. Every record is bound to its vault, kind, name and
part, so that none can be exchanged for another; the tally, a keyed sum over all of them, tells when one
was taken out or put back to an older state. An older copy of the whole vault looks sound: nothing inside
a folder can tell its age.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.errors import ParameterError, TamperedError, UnknownNameError
from sealmark.crypto.records import RecordCipher
from sealmark.vault.database import check_sound, typed_errors

MAX_BODY = 512 << 20  # SQLite holds less than 1 GB in a cell
_Row = tuple[Any, Any, Any, Any]  # kind, id, scope, info


class Store:
    """Encrypted records in an open SQLite file.

    Args:
        db: with the tables of a vault.
        cipher: the vault's.
        label: the vault's id, which binds the records to it.
    """

    def __init__(self, db: sqlite3.Connection, cipher: RecordCipher, label: str) -> None:
        self._db, self._cipher, self._label = db, cipher, label
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def transaction(self, mode: str = "IMMEDIATE") -> Iterator[None]:
        """All of the block or nothing; inside another one it joins it.

        Raises:
            ServiceError: another process writes for too long, or the disk is full.
        """
        with self._lock:  # the caller's own errors pass as they are, so the block is not under typed_errors
            if self._db.in_transaction:
                yield
                return
            with typed_errors():
                self._db.execute(f"BEGIN {mode}")
            try:
                yield
                with typed_errors():
                    self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise

    def write_header(self, public: str, *, new: bool = False) -> None:
        """Replace the readable header; a new vault gets an empty tally with it."""
        with typed_errors(), self.transaction():
            if new:
                self._db.execute("INSERT INTO header VALUES (1, ?, ?)", (public, self._sealed_tally(0)))
            else:
                self._db.execute("UPDATE header SET public = ?", (public,))

    def add(
        self, kind: str, name: str, info: Mapping[str, Any], *, body: bytes | None = None, scope: str = ""
    ) -> None:
        """Add a record.

        Args:
            kind: readable by anyone.
            name: unique in its kind.
            info: plain JSON.
            body: bytes that are not needed for a listing.
            scope: records of one scope can be listed by themselves.

        Raises:
            ParameterError: there is one of that name, the info is not plain JSON, or the body is too large.
        """
        if body is not None and len(body) > MAX_BODY:
            raise ParameterError("too large for a vault", expected=f"{MAX_BODY} bytes", found=len(body))
        key, group = self._id(kind, name), self._cipher.tag(b"scope", kind.encode(), scope.encode())
        digest = None if body is None else sha256_hex(body)
        sealed = self._sealed_info(kind, key, group, info, digest)
        content = None if body is None else self._cipher.seal(body, place=self._place(kind, key, group, "body"))
        with typed_errors(), self.transaction():
            if self._find(kind, key) is not None:
                raise ParameterError(f"the vault has a {kind} {name!r} already", advice="choose another name")
            self._db.execute(
                "INSERT INTO records (kind, id, scope, info, body) VALUES (?, ?, ?, ?, ?)",
                (kind, key, group, sealed, content),
            )
            self._count(self._weight(kind, key, sealed))

    def update(self, kind: str, name: str, info: Mapping[str, Any]) -> None:
        """Replace the info of a record; its body and scope stay.

        Raises:
            UnknownNameError: no such record.
        """
        key = self._id(kind, name)
        with typed_errors(), self.transaction():
            row = self._row(kind, name)
            sealed = self._sealed_info(kind, key, row[2], info, self._opened(row)["body"])
            self._db.execute("UPDATE records SET info = ? WHERE kind = ? AND id = ?", (sealed, kind, key))
            self._count(self._weight(kind, key, sealed) - self._weight(kind, key, row[3]))

    def info(self, kind: str, name: str) -> dict[str, Any]:
        """The info of a record.

        Raises:
            UnknownNameError: no such record.
            TamperedError: it was changed or moved.
        """
        with self._lock, typed_errors():
            info: dict[str, Any] = self._opened(self._row(kind, name))["info"]
        return info

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a record."""
        with self._lock, typed_errors():
            return self._find(kind, self._id(kind, name)) is not None

    def body(self, kind: str, name: str) -> bytes:
        """The body of a record; raises as `info`."""
        with typed_errors(), self.transaction("DEFERRED"):
            return self._body(self._row(kind, name))

    def all(self, kind: str, scope: str | None = None) -> list[dict[str, Any]]:
        """The infos of a kind, or of one scope of it, in the order in which they were added."""
        query = "SELECT kind, id, scope, info FROM records WHERE kind = ?"
        arguments: list[str | bytes] = [kind]
        if scope is not None:
            query += " AND scope = ?"
            arguments.append(self._cipher.tag(b"scope", kind.encode(), scope.encode()))
        with self._lock, typed_errors():
            rows = self._db.execute(f"{query} ORDER BY number", arguments).fetchall()
        return [self._opened(row)["info"] for row in rows]

    def check(self, *, bodies: bool = False) -> None:
        """Refuse a store that is damaged, or from which records were taken.

        Args:
            bodies: also decrypt everything.

        Raises:
            FormatError: the file is damaged.
            TamperedError: records were changed, taken out or put back to an older state.
        """
        with typed_errors(), self.transaction("DEFERRED"):
            check_sound(self._db)
            total = 0
            for row in self._db.execute("SELECT kind, id, scope, info FROM records"):
                total += self._weight(str(row[0]), _bytes(row[1]), _bytes(row[3]))
                if bodies:
                    self._body(row)
            if total % (1 << 256) != self._tally():
                raise TamperedError(
                    "records are missing from the vault, or are older than the rest",
                    advice="restore a backup",
                )

    def _id(self, kind: str, name: str) -> bytes:
        return self._cipher.tag(b"name", kind.encode(), name.encode())

    def _place(self, kind: str, key: bytes, group: bytes, part: str) -> bytes:
        return canonical_json([self._label, kind, key.hex(), group.hex(), part])

    def _find(self, kind: str, key: bytes) -> _Row | None:
        query = "SELECT kind, id, scope, info FROM records WHERE kind = ? AND id = ?"
        row: _Row | None = self._db.execute(query, (kind, key)).fetchone()
        return row

    def _row(self, kind: str, name: str) -> _Row:
        row = self._find(kind, self._id(kind, name))
        if row is None:
            raise UnknownNameError(f"the vault has no {kind} {name!r}", advice="list what it has")
        return row

    def _sealed_info(
        self, kind: str, key: bytes, group: bytes, info: Mapping[str, Any], digest: str | None
    ) -> bytes:
        try:
            text = canonical_json({"info": dict(info), "body": digest})
        except (TypeError, ValueError) as error:
            raise ParameterError("not plain JSON", found=error) from None
        return self._cipher.seal(text, place=self._place(kind, key, group, "info"))

    def _opened(self, row: _Row) -> dict[str, Any]:
        kind, key, group, sealed = str(row[0]), _bytes(row[1]), _bytes(row[2]), _bytes(row[3])
        text = self._cipher.open(sealed, place=self._place(kind, key, group, "info"))
        opened: dict[str, Any] = json.loads(text)
        return opened

    def _body(self, row: _Row) -> bytes:
        """The body, if it is the one that the info was written with; nothing where there is none."""
        digest = self._opened(row)["body"]
        if digest is None:
            return b""
        (sealed,) = self._db.execute("SELECT body FROM records WHERE kind = ? AND id = ?", row[:2]).fetchone()
        content = self._cipher.open(_bytes(sealed), place=self._place(row[0], row[1], row[2], "body"))
        if sha256_hex(content) != digest:
            raise TamperedError("a record's content is not its own", advice="restore a backup")
        return content

    def _weight(self, kind: str, key: bytes, sealed: bytes) -> int:
        return int.from_bytes(self._cipher.tag(b"tally", kind.encode(), key, sealed), "big")

    def _tally(self) -> int:
        row = self._db.execute("SELECT tally FROM header").fetchone()
        sealed = _bytes(row[0] if row else None)
        return int.from_bytes(self._cipher.open(sealed, place=self._tally_place), "big")

    def _count(self, weight: int) -> None:
        self._db.execute("UPDATE header SET tally = ?", (self._sealed_tally(self._tally() + weight),))

    def _sealed_tally(self, total: int) -> bytes:
        return self._cipher.seal((total % (1 << 256)).to_bytes(32, "big"), place=self._tally_place)

    @property
    def _tally_place(self) -> bytes:
        return canonical_json([self._label, "tally"])


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TamperedError("a record does not open", found="another type", advice="restore a backup")
    return value
