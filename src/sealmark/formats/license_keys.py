"""The keys in a license: for the licensee alone, in this license alone.

Each license has a key of its own, wrapped for the licensee in `License.wrap`. Under it lie, in
`License.keys`, the data key of the sealed model (32 bytes) and then the key of the lock, if there is one
(a secret file). A data key may be the same for all users: so a lock's key is not encrypted under that one,
or a licensee of one level could read it from the license of another.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from sealmark.core.errors import TamperedError
from sealmark.core.secret import Secret
from sealmark.crypto.armor import KEY_BYTES
from sealmark.crypto.recipients import Identity, Passphrase, Recipient
from sealmark.crypto.records import RecordCipher
from sealmark.crypto.wrapping import key_id, stanza_from_json, unwrap, wrap
from sealmark.formats.license import License
from sealmark.formats.secret import secret_from_bytes, secret_to_bytes

_NO_LOCK = 128  # bytes: a data key and what encryption adds are fewer, a secret's file has more


def add_keys(
    license: License,  # noqa: A002 - the word for the thing
    to: Recipient | Passphrase,
    *,
    data_key: bytes | None = None,
    key: Secret | None = None,
) -> License:
    """The license with keys for a licensee, to be signed.

    Args:
        license: with its final id, model and user, which the keys are bound to.
        to: the licensee.
        data_key: of the sealed model, 32 bytes; a fresh one unless given.
        key: of the lock.

    Raises:
        ParameterError: the data key has not 32 bytes.

    Example:
        >>> person = Identity.generate()
        >>> license = add_keys(License("7", "ada", model="00"), person.recipient, data_key=bytes(32))
        >>> open_keys(license, person) == (bytes(32), None)
        True
    """
    data_key = secrets.token_bytes(KEY_BYTES) if data_key is None else data_key
    key_id(data_key)  # refuses another size
    own, context = secrets.token_bytes(KEY_BYTES), license.context()
    content = data_key + (b"" if key is None else secret_to_bytes(key))
    return replace(
        license,
        wrap=wrap(own, to, context=context).to_json(),
        keys=RecordCipher(own).seal(content, place=context),
    )


def holds_lock_key(license: License) -> bool:  # noqa: A002
    """Whether there is more than a data key in it; that shows by the size, without opening it.

    Example:
        >>> holds_lock_key(License("7", "ada", model="00"))
        False
    """
    return len(license.keys) > _NO_LOCK


def open_keys(license: License, opener: Identity | Passphrase) -> tuple[bytes, Secret | None]:  # noqa: A002
    """The data key and the lock's key.

    Raises:
        WrongKeyError: it is another person's license, or another passphrase.
        TamperedError: the keys were changed, or taken from another license.
        FormatError: they are no keys.
    """
    context = license.context()
    own = unwrap([stanza_from_json(license.wrap)], opener, context=context)
    content = RecordCipher(own).open(license.keys, place=context)
    data_key, rest = content[:KEY_BYTES], content[KEY_BYTES:]
    if len(data_key) != KEY_BYTES:
        raise TamperedError("the license holds no whole key", advice="ask the owner for a new one")
    return data_key, secret_from_bytes(rest) if rest else None
