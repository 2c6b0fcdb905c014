"""Those who may open a sealed file: a key pair (HPKE over X25519) or a passphrase (Argon2id)."""

from __future__ import annotations

import secrets
import unicodedata
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.armor import KEY_BYTES, Handle, armor, unarmor

_RECIPIENT = "sealmark-recipient-v1:"
_IDENTITY = "sealmark-identity-v1:"
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True)
class Recipient:
    """Somebody for whom files can be sealed: an X25519 public key of 32 bytes. ``str()`` gives its text.

    Example:
        >>> recipient = Identity.generate().recipient
        >>> Recipient.parse(str(recipient)) == recipient
        True
    """

    public: bytes

    def __str__(self) -> str:
        return armor(_RECIPIENT, self.public)

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> Recipient:
        """Read the text; white space around it is allowed.

        Raises:
            FormatError: it is not a recipient, or was mistyped.
        """
        return cls(unarmor(_RECIPIENT, text))

    def encrypt(self, plaintext: bytes, info: bytes) -> bytes:
        """HPKE (RFC 9180), base mode: the encapsulated key (32 bytes), the ciphertext and a tag (16 bytes).

        The suite is DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

        Raises:
            ParameterError: the public key is no key: not 32 bytes, or a point of low order.
        """
        try:
            return _HPKE.encrypt(plaintext, X25519PublicKey.from_public_bytes(self.public), info=info)
        except ValueError:
            raise ParameterError(
                "cannot seal for this recipient", found=self, advice="ask for a key that sealmark generated"
            ) from None


class Identity(Handle):
    """The private counterpart of a `Recipient`. It cannot be printed or pickled.

    Args:
        private: the X25519 private key, 32 bytes.

    Raises:
        ParameterError: it has not 32 bytes.

    Example:
        >>> identity = Identity.generate()
        >>> identity.decrypt(identity.recipient.encrypt(b"layer", b"model 1"), b"model 1")
        b'layer'
    """

    __slots__ = ("_private", "recipient")

    def __init__(self, private: bytes) -> None:
        if len(private) != KEY_BYTES:
            raise ParameterError("bad identity", expected=f"{KEY_BYTES} bytes", found=f"{len(private)} bytes")
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.recipient = Recipient(self._private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """A fresh one."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Read the text that `reveal` gave.

        Raises:
            FormatError: it is not an identity, or was mistyped; the message does not repeat it.
        """
        return cls(unarmor(_IDENTITY, text))

    def reveal(self) -> str:
        """The secret text itself: for writing it to a private file and for nothing else."""
        return armor(_IDENTITY, self._private.private_bytes_raw())

    def decrypt(self, ciphertext: bytes, info: bytes) -> bytes:
        """What `Recipient.encrypt` encrypted for this identity, with the same ``info``.

        Raises:
            TamperedError: it was changed, is bound to other ``info``, or is for somebody else.
        """
        try:
            return _HPKE.decrypt(ciphertext, self._private, info=info)
        except InvalidTag:
            raise TamperedError("the wrapped key does not open", advice="get a fresh copy") from None

    def __repr__(self) -> str:
        return f"Identity({self.recipient})"


@dataclass(frozen=True)
class Cost:
    """What one guess at a passphrase costs: Argon2id parameters.

    The default is the second recommended option of RFC 9106, section 4. The caps keep a hostile file
    from asking for all the reader's memory, or for hours.

    Raises:
        ParameterError: a parameter is out of its range.
    """

    iterations: int = 3
    memory_kib: int = 65536
    lanes: int = 4

    def __post_init__(self) -> None:
        ranges = {"iterations": (1, 10), "lanes": (1, 16), "memory_kib": (8 * self.lanes, 1 << 20)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ParameterError(f"bad {name}", expected=f"{low} to {high}", found=getattr(self, name))


class Passphrase(Handle):
    """A passphrase, in Unicode normal form C. It cannot be printed or pickled.

    Args:
        text: not empty.
        cost: of what is wrapped with it; what is unwrapped brings its own.

    Raises:
        ParameterError: it is empty, or is a recipient or an identity by mistake.

    Example:
        >>> Passphrase("correct horse battery staple")
        Passphrase(...)
    """

    __slots__ = ("_text", "cost")

    def __init__(self, text: str, *, cost: Cost | None = None) -> None:
        if not text:
            raise ParameterError("the passphrase is empty", advice="choose one that is hard to guess")
        if text.strip().startswith((_RECIPIENT, _IDENTITY)):
            raise ParameterError(
                "this is not a passphrase",
                found="a recipient or an identity",
                advice="read it with Recipient.parse or Identity.parse",
            )
        # a keyboard may type one letter in two ways
        self._text = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        self.cost = cost or Cost()

    def derive(self, salt: bytes, cost: Cost) -> bytes:
        """32 bytes by Argon2id (RFC 9106)."""
        return Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=cost.iterations,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        ).derive(self._text)

    def __repr__(self) -> str:
        return "Passphrase(...)"
