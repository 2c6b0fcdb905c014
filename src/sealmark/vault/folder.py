"""A folder that is encrypted at rest: making, opening, checking, backing up, restoring.

Everything in it is encrypted under a master key, which a passphrase or a key file opens. See
`sealmark.vault.store` for what can be seen without it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sqlite3
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from sealmark.core.errors import ParameterError
from sealmark.core.files import atomic_write
from sealmark.crypto.armor import KEY_BYTES
from sealmark.crypto.recipients import Identity
from sealmark.crypto.records import RecordCipher
from sealmark.crypto.signing import SigningKey
from sealmark.vault.database import (
    FILE,
    TIMEOUT,
    connect,
    copy_database,
    create_database,
    new_folder,
    typed_errors,
)  # fmt: skip
from sealmark.vault.store import Store
from sealmark.vault.unlocking import Header, opener_of


class EncryptedFolder:
    """An open encrypted folder with its keys. Made by `create`, `open` or `restore`.

    One object may be used by several threads, and one folder by several processes.

    Attributes:
        path: the folder.
        signing_key: the owner's private signing key.
        identity: the owner's private recipient key.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, store: Store, master: bytes, label: str) -> None:
        self.path, self._db, self._store = path, db, store
        self._master, self._label = master, label
        self.signing_key = SigningKey.parse(store.info("key", "signing")["text"])
        self.identity = Identity.parse(store.info("key", "identity")["text"])

    @classmethod
    def create(cls, path: Path | str, *, passphrase: str | None = None, key_file: Path | str | None = None) -> Self:
        """Make a new vault with new keys; the folder appears whole or not at all.

        Args:
            path: a folder that is not there yet, or is empty.
            passphrase: opens the vault; keep it elsewhere.
            key_file: opens the vault in place of a passphrase; see `write_key_file`.

        Raises:
            ParameterError: something is there already; or neither or both of the two were given.
        """
        path, opener = Path(path), opener_of(passphrase, key_file)
        with new_folder(path) as folder:
            create_database(folder / FILE)
            with contextlib.closing(connect(folder / FILE)) as db:
                master = secrets.token_bytes(KEY_BYTES)
                header = Header.make(master, opener, label=secrets.token_hex(16))
                store = Store(db, RecordCipher(master), header.id)
                with store.transaction():
                    store.write_header(str(header), new=True)
                    store.add("key", "signing", {"text": SigningKey.generate().reveal()})
                    store.add("key", "identity", {"text": Identity.generate().reveal()})
        return cls.open(path, passphrase=passphrase, key_file=key_file)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        passphrase: str | None = None,
        key_file: Path | str | None = None,
        timeout: float = TIMEOUT,
    ) -> Self:
        """Open a vault and check that no record is missing.

        Args:
            path: the folder, or a backup (a file).
            passphrase: as given to `create`.
            key_file: as given to `create`.
            timeout: seconds to wait for other processes, here and later.

        Raises:
            ParameterError: no vault there; or neither or both of the two were given.
            WrongKeyError: a wrong passphrase or key file.
            FormatError: damaged, or not a vault of this version.
            TamperedError: records were changed, taken out or put back to an older state.
            ServiceError: locked by another process for too long.
        """
        path, opener = Path(path), opener_of(passphrase, key_file)
        with contextlib.ExitStack() as undo:
            db = connect(path if path.is_file() else path / FILE, timeout=timeout)
            undo.callback(db.close)
            with typed_errors():
                row = db.execute("SELECT public FROM header").fetchone()
            header = Header.parse(row[0] if row else None)
            master = header.unwrap(opener)
            store = Store(db, RecordCipher(master), header.id)
            store.check()
            vault = cls(path, db, store, master, header.id)
            undo.pop_all()
        return vault

    @classmethod
    def restore(
        cls,
        backup: Path | str,
        path: Path | str,
        *,
        passphrase: str | None = None,
        key_file: Path | str | None = None,
    ) -> Self:
        """Make a vault from a backup, after every byte of it was checked; raises as `open` and `create`."""
        path = Path(path)
        with cls.open(backup, passphrase=passphrase, key_file=key_file) as source, new_folder(path) as folder:
            source.check()
            copy_database(source._db, folder / FILE, journal="WAL")
        return cls.open(path, passphrase=passphrase, key_file=key_file)

    def change_opener(self, *, passphrase: str | None = None, key_file: Path | str | None = None) -> None:
        """Open with another passphrase or key file from now on. Older backups keep their own."""
        with self._store.transaction():
            header = Header.make(self._master, opener_of(passphrase, key_file), label=self._label)
            self._store.write_header(str(header))

    def transaction(self) -> AbstractContextManager[None]:
        """A block of changes that come all or not at all, and faster than one by one.

        Raises:
            ServiceError: another process writes for too long, or the disk is full.
        """
        return self._store.transaction()

    def check(self) -> None:
        """Decrypt everything.

        Raises:
            FormatError: the file is damaged.
            TamperedError: records were changed, taken out or put back to an older state.
        """
        self._store.check(bodies=True)

    def backup(self, target: Path | str) -> None:
        """Write a consistent, still encrypted copy to one file, even while others write.

        Raises:
            ParameterError: the folder of ``target`` is missing, or is this vault.
            ServiceError: the disk is full; an older ``target`` stays as it was.
        """
        target = Path(target)
        if target.parent.resolve() == self.path.resolve():
            raise ParameterError("a backup inside the vault", advice="choose another folder")
        if not target.parent.is_dir():
            raise ParameterError(
                f"cannot write {target}", expected="an existing folder", found=f"no {target.parent}"
            )
        with typed_errors(), tempfile.TemporaryDirectory(prefix=".backup.", dir=target.parent) as folder:
            copy = Path(folder) / FILE
            copy_database(self._db, copy, journal="DELETE")
            with copy.open("rb") as source, atomic_write(target, mode=0o600) as file:
                shutil.copyfileobj(source, file, 1 << 20)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
