"""Ed25519 signatures (RFC 8032): who said it, and that nobody changed it.

A verifier trusts keys that it got elsewhere, never one that came along with the signed thing. The
key id is a short hash for finding the right key in a list; it decides nothing.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.armor import KEY_BYTES, Handle, armor, unarmor

ALGORITHM = "Ed25519"
SIGNATURE_BYTES = 64
_KID_DIGITS = 32  # 128 bits of SHA-256
_VERIFY = "sealmark-verify-v1:"
_SIGN = "sealmark-sign-v1:"


class VerifyKey:
    """A public key that says whether a signature is its owner's. ``str()`` gives its text.

    Args:
        raw: 32 bytes, as RFC 8032 encodes them.

    Raises:
        ParameterError: not 32 bytes.

    Example:
        >>> key = SigningKey(bytes(32))
        >>> key.verify_key
        sealmark-verify-v1:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2imqkGCH
        >>> key.verify_key.verify(key.sign(b"mine"), b"mine")
        >>> VerifyKey.parse(str(key.verify_key)) == key.verify_key
        True
    """

    __slots__ = ("_key", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = _sized(raw, "verify key")
        self._key = Ed25519PublicKey.from_public_bytes(self.raw)

    @classmethod
    def parse(cls, text: str) -> VerifyKey:
        """Read the text; white space around it is allowed.

        Raises:
            FormatError: it is not a verify key, or was mistyped.
        """
        return cls(unarmor(_VERIFY, text))

    @property
    def kid(self) -> str:
        """The key id: the first 32 hexadecimal digits of SHA-256 over the raw key."""
        return sha256_hex(self.raw)[:_KID_DIGITS]

    def verify(self, signature: bytes, message: bytes) -> None:
        """Return if ``signature`` over ``message`` is this key's.

        Raises:
            TamperedError: it is not: the message, the signature or the signer is another.
        """
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            raise TamperedError(
                "the signature does not fit", expected=f"one by key {self.kid}", advice="get a fresh copy"
            ) from None

    def __str__(self) -> str:
        return armor(_VERIFY, self.raw)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


class SigningKey(Handle):
    """A private signing key. It cannot be printed or pickled.

    Two are equal when their public halves are, so that comparing tells nothing of the private ones.

    Args:
        seed: the 32 secret bytes; use `generate` for a new key.

    Raises:
        ParameterError: not 32 bytes.
    """

    __slots__ = ("_key", "verify_key")

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(_sized(seed, "signing key"))
        self.verify_key = VerifyKey(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read the text that `reveal` gave.

        Raises:
            FormatError: it is not a signing key, or was mistyped; the message does not repeat it.
        """
        return cls(unarmor(_SIGN, text))

    @property
    def kid(self) -> str:
        """The key id of the public half."""
        return self.verify_key.kid

    def sign(self, message: bytes) -> bytes:
        """The signature over ``message``: 64 bytes, the same each time."""
        return self._key.sign(message)

    def reveal(self) -> str:
        """The private key as text: for writing it to safe storage and for nothing else."""
        return armor(_SIGN, self._key.private_bytes_raw())

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SigningKey) and self.verify_key == other.verify_key

    def __hash__(self) -> int:
        return hash(self.verify_key)


def _sized(raw: bytes, name: str) -> bytes:
    if len(raw) != KEY_BYTES:
        raise ParameterError(f"bad {name}", expected=f"{KEY_BYTES} bytes", found=f"{len(raw)} bytes")
    return bytes(raw)
