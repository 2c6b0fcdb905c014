"""What opens a vault: its master key, wrapped under a passphrase or the content of a key file."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.files import atomic_write
from sealmark.crypto.armor import KEY_BYTES, armor, unarmor
from sealmark.crypto.recipients import Cost, Passphrase
from sealmark.crypto.wrapping import Stanza, stanza_from_json, unwrap, wrap
from sealmark.formats.strict_json import parse_canonical

FORMAT = "sealmark.vault.v1"
_KEY_FILE = "sealmark-vault-key-v1:"
_MAX_HEADER = 16 << 10
# 32 random bytes cannot be guessed, so that a guess need not be dear. A public key would not do in
# place of the shared secret: whoever knows it could put a vault of their own making here.
_KEY_FILE_COST = Cost(iterations=1, memory_kib=8, lanes=1)


@dataclass(frozen=True)
class Header:
    """The readable part of a vault.

    Attributes:
        id: 16 random bytes in hexadecimal; records are bound to it.
        wrap: the master key, wrapped.
    """

    id: str
    wrap: Stanza

    @classmethod
    def make(cls, master: bytes, opener: Passphrase, *, label: str) -> Header:
        """Wrap the master key of the vault ``label``."""
        return cls(label, wrap(master, opener, context=_context(label)))

    @classmethod
    def parse(cls, text: Any) -> Header:
        """Read a header.

        Raises:
            FormatError: not the header of a vault of this version.
        """
        if not isinstance(text, str):
            raise FormatError("the vault is damaged", expected="a header", advice="restore a backup")
        fields = parse_canonical(text.encode(), limit=_MAX_HEADER, what="the vault's header")
        version = fields.get("format") if isinstance(fields, dict) else None
        if version != FORMAT:
            raise FormatError("not a vault of this version", expected=FORMAT, found=repr(version)[:40])
        if fields.keys() != {"format", "id", "wrap"} or not isinstance(fields["id"], str):
            raise FormatError("bad header of a vault", expected="format, id and wrap")
        return cls(fields["id"], stanza_from_json(fields["wrap"]))

    def __str__(self) -> str:
        return canonical_json({"format": FORMAT, "id": self.id, "wrap": self.wrap.to_json()}).decode()

    def unwrap(self, opener: Passphrase) -> bytes:
        """The master key.

        Raises:
            WrongKeyError: a wrong passphrase or key file.
        """
        return unwrap([self.wrap], opener, context=_context(self.id))


def write_key_file(path: Path | str) -> None:
    """Make a new key file (mode 0600) that can open a vault in place of a passphrase.

    Raises:
        ParameterError: something is there already, or the folder is missing.
    """
    path = Path(path)
    if path.exists():
        raise ParameterError(f"{path} is there already", expected="a new file", advice="choose another name")
    with atomic_write(path, mode=0o600) as file:
        file.write(armor(_KEY_FILE, secrets.token_bytes(KEY_BYTES)).encode() + b"\n")


def opener_of(passphrase: str | None, key_file: Path | str | None) -> Passphrase:
    """What the caller opens the vault with.

    Raises:
        ParameterError: neither or both, an empty passphrase, or no such file.
        FormatError: not a key file.
    """
    if (passphrase is None) == (key_file is None):
        raise ParameterError("what opens the vault?", expected="a passphrase or a key file, one of the two")
    if passphrase is not None:
        return Passphrase(passphrase)
    path = Path(str(key_file))
    if not path.is_file():
        raise ParameterError("no such file", expected="a key file", found=path)
    with path.open("rb") as file:
        text = file.read(256).decode(errors="replace")
    unarmor(_KEY_FILE, text)
    return Passphrase(text.strip(), cost=_KEY_FILE_COST)


def _context(label: str) -> bytes:
    return canonical_json({"format": FORMAT, "id": label})
