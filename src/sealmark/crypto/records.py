"""Encrypting the records of a store, each bound to its place, under keys made from one master key.

Nonces are random: use one master key for at most 2**32 records (NIST SP 800-38D, section 8.3).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.armor import KEY_BYTES, Handle
from sealmark.crypto.random import derive_key

_NONCE_BYTES = 12
_INFO = b"sealmark/records/v1\0"


class RecordCipher(Handle):
    """AES-256-GCM for contents, HMAC-SHA-256 for names that must be found but not read.

    Args:
        master: 32 secret bytes.

    Raises:
        ParameterError: not 32 bytes.

    Example:
        >>> cipher = RecordCipher(bytes(32))
        >>> cipher.open(cipher.seal(b"content", place=b"row 1"), place=b"row 1")
        b'content'
    """

    __slots__ = ("_aead", "_tag_key")

    def __init__(self, master: bytes) -> None:
        if len(master) != KEY_BYTES:
            raise ParameterError("bad master key", expected=f"{KEY_BYTES} bytes", found=f"{len(master)} bytes")
        self._aead = AESGCM(derive_key(master, salt=b"", info=_INFO + b"seal"))
        self._tag_key = derive_key(master, salt=b"", info=_INFO + b"tag")

    def seal(self, content: bytes, *, place: bytes) -> bytes:
        """Nonce (12 bytes), ciphertext and tag (16 bytes); it opens at the same place only."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, content, place)

    def open(self, sealed: bytes, *, place: bytes) -> bytes:
        """The content.

        Raises:
            TamperedError: bytes were changed, or the record was moved here from another place.
        """
        try:
            return self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], place)
        except (InvalidTag, ValueError):  # ValueError: no whole nonce
            raise TamperedError(
                "a record does not open", found="changed or moved bytes", advice="restore a backup"
            ) from None

    def tag(self, *parts: bytes) -> bytes:
        """32 bytes that stand for the parts and tell nothing of them to those without the key."""
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._tag_key, framed, hashlib.sha256)
