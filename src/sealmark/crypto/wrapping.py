"""Wrapping a data key for those who may open a file: for a public key, or under a passphrase.

A wrapped key is a *stanza*. It opens only in the context (the facts of the file, as bytes) that it was
made for. HPKE in base mode says nothing about who made a stanza: that is what signatures are for.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import FormatError, ParameterError, WrongKeyError
from sealmark.crypto.recipients import Cost, Identity, Passphrase, Recipient
from sealmark.crypto.segments import KEY_BYTES

_CONTEXT = b"sealmark/wrap/v1\0"
_KEY_ID = b"sealmark/key-id/v1\0"
_HPKE = "hpke-x25519-sha256-aes256gcm"
_ARGON2 = "argon2id-aes256gcm"
_HPKE_BYTES = 32 + KEY_BYTES + 16  # encapsulated key, data key, tag
_GCM_BYTES = KEY_BYTES + 16
_SALT_BYTES = 16
_ONCE = bytes(12)  # the nonce of a key that comes from a fresh salt and is used once


def key_id(key: bytes) -> str:
    """SHA-256 commitment to a data key: 64 hexadecimal digits that are safe to publish.

    It tells a wrong key from changed bytes, and nobody can find a second key that fits.

    Raises:
        ParameterError: the key has not 32 bytes.

    Example:
        >>> key_id(bytes(32))[:16]
        'a3e2188d43414552'
    """
    return sha256_hex(_KEY_ID, _checked(key))


@dataclass(frozen=True)
class RecipientStanza:
    """A data key wrapped for a public key, by HPKE.

    Attributes:
        recipient: who can open it.
        wrapped: encapsulated key (32 bytes), ciphertext and tag (48 bytes).
    """

    recipient: Recipient
    wrapped: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"type": _HPKE, "to": str(self.recipient), "wrapped": self.wrapped.hex()}


@dataclass(frozen=True)
class PassphraseStanza:
    """A data key under AES-256-GCM, with a key that Argon2id makes from a passphrase.

    Attributes:
        salt: 16 bytes, fresh for each stanza.
        cost: of one guess.
        wrapped: ciphertext and tag (48 bytes).
    """

    salt: bytes = field(repr=False)
    cost: Cost
    wrapped: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        cost = {
            "iterations": self.cost.iterations, "memory_kib": self.cost.memory_kib, "lanes": self.cost.lanes,
        }  # fmt: skip
        return {"type": _ARGON2, "salt": self.salt.hex(), **cost, "wrapped": self.wrapped.hex()}


Stanza = RecipientStanza | PassphraseStanza


def stanza_from_json(value: Any) -> Stanza:
    """Read a stanza, whose maker is not trusted.

    Raises:
        FormatError: not a stanza, or one that would cost the reader too much.
    """
    try:
        fields = dict(value)
        kind = fields.pop("type")
        if kind == _HPKE:
            recipient, wrapped = fields.pop("to"), fields.pop("wrapped")
            stanza: Stanza = RecipientStanza(Recipient.parse(recipient), _unhex(wrapped, _HPKE_BYTES))
        elif kind == _ARGON2:
            cost = Cost(**{name: _whole(fields.pop(name)) for name in ("iterations", "memory_kib", "lanes")})
            salt, wrapped = _unhex(fields.pop("salt"), _SALT_BYTES), _unhex(fields.pop("wrapped"), _GCM_BYTES)
            stanza = PassphraseStanza(salt, cost, wrapped)
        else:
            raise ValueError(f"the unknown type {kind!r:.40}")
        if fields:
            raise ValueError(f"more fields: {sorted(fields)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError("a stanza is malformed", found=error, advice="get a fresh copy") from None
    return stanza


def wrap(key: bytes, to: Recipient | Passphrase, *, context: bytes) -> Stanza:
    """Wrap a data key so that ``to`` can open it, in this context only.

    Args:
        key: 32 bytes.
        to: a public key or a passphrase.
        context: what the stanza is bound to; it must be given again to unwrap.

    Raises:
        ParameterError: the key has not 32 bytes, or the public key is none.

    Example:
        >>> identity = Identity.generate()
        >>> stanza = wrap(bytes(32), identity.recipient, context=b"model 1")
        >>> unwrap([stanza], identity, context=b"model 1") == bytes(32)
        True
    """
    info = _CONTEXT + context
    if isinstance(to, Recipient):
        return RecipientStanza(to, to.encrypt(_checked(key), info))
    salt = secrets.token_bytes(_SALT_BYTES)
    cipher = AESGCM(to.derive(salt, to.cost))
    return PassphraseStanza(salt, to.cost, cipher.encrypt(_ONCE, _checked(key), info))


def unwrap(stanzas: Iterable[Stanza], opener: Identity | Passphrase, *, context: bytes) -> bytes:
    """The data key from the first stanza that ``opener`` opens.

    Raises:
        WrongKeyError: none is for this identity, or the passphrase opens none; a wrong passphrase cannot
            be told from a changed stanza or context.
        TamperedError: a stanza is for this identity and does not open: it, or its context, was changed.
    """
    info = _CONTEXT + context
    if isinstance(opener, Identity):
        mine = [s for s in stanzas if isinstance(s, RecipientStanza) and s.recipient == opener.recipient]
        if not mine:
            raise WrongKeyError(
                "not sealed for this identity",
                found=opener.recipient,
                advice="ask the owner for a copy that is sealed for it",
            )
        return opener.decrypt(mine[0].wrapped, info)
    for stanza in stanzas:
        if isinstance(stanza, PassphraseStanza):
            try:
                return AESGCM(opener.derive(stanza.salt, stanza.cost)).decrypt(_ONCE, stanza.wrapped, info)
            except InvalidTag:
                continue  # another passphrase's
    raise WrongKeyError(
        "the passphrase opens nothing here",
        advice="type it again; if it is right, the header was changed: get a fresh copy",
    )


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ParameterError("bad key", expected=f"{KEY_BYTES} bytes", found=f"{len(key)} bytes")
    return key


def _whole(number: Any) -> int:
    if type(number) is not int:  # a bool is an int, and 3.0 equals 3
        raise TypeError("a cost that is not a whole number")
    return number


def _unhex(text: Any, size: int) -> bytes:
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        raise ValueError(f"not {2 * size} hexadecimal digits")
    return bytes.fromhex(text)
