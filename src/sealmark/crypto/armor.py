"""Keys as one line of text: a prefix that says what it is, and base64url with a checksum.

`sealmark-verify-v1:` and 48 characters: 32 bytes of key and 4 bytes of checksum, so that a key that
was mistyped is refused rather than taken for another key.
"""

from __future__ import annotations

import base64
import re
from typing import NoReturn, Self

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import FormatError, UnsupportedError

KEY_BYTES = 32


class Handle:
    """Holds a private key: it is handed on by reference, and never copied, pickled or printed."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError(f"a {type(self).__name__} cannot be pickled", advice="keep it in a vault")


def armor(prefix: str, raw: bytes) -> str:
    """The text of a 32-byte key.

    Example:
        >>> armor("example:", bytes(32))
        'example:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAC2Oc3J'
    """
    # 36 bytes make base64 without padding
    return prefix + base64.urlsafe_b64encode(raw + _checksum(prefix, raw)).decode()


def unarmor(prefix: str, text: str) -> bytes:
    """The key behind a text; white space around it is allowed. No message repeats the text.

    Raises:
        FormatError: another kind of text, or a typing error.
    """
    match = re.fullmatch(re.escape(prefix) + r"([A-Za-z0-9_-]{48})", text.strip())
    decoded = base64.urlsafe_b64decode(match[1]) if match else b""
    raw, checksum = decoded[:KEY_BYTES], decoded[KEY_BYTES:]
    if not match or checksum != _checksum(prefix, raw):
        found = "a wrong checksum" if match else "another text"
        raise FormatError("cannot read this key", expected=f"{prefix}...", found=found, advice="copy it again")
    return raw


def _checksum(prefix: str, raw: bytes) -> bytes:
    return bytes.fromhex(sha256_hex(prefix.encode(), raw))[:4]
