"""Where the segments of a streaming ciphertext lie, and how each of them is sealed and opened."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sealmark.core.errors import ParameterError, TamperedError

KEY_BYTES = 32
SEGMENT = 1 << 20  # bytes of ciphertext in a full segment; the header counts towards the first
TAG = 16
HEADER = 40  # 1 byte of header length, 32 of salt, 7 of nonce prefix
MAX_SEGMENTS = 1 << 32  # their number goes into the nonce as a u32
_PLAIN = SEGMENT - TAG
_ADVICE = "get a whole copy, or the right key: authentication cannot tell which of them is wrong"


def segment_count(size: int) -> int:
    """How many segments a plaintext of ``size`` bytes fills; an empty one fills one."""
    return max(1, -(-(size + HEADER) // _PLAIN))


def ciphertext_size(size: int) -> int:
    """Bytes of the ciphertext of ``size`` bytes of plaintext, header and tags included.

    Raises:
        ParameterError: the size is negative or over 4 PiB, where the segment numbers end.

    Example:
        >>> ciphertext_size(0), ciphertext_size(2_000_000)
        (56, 2000072)
    """
    if size < 0 or segment_count(size) > MAX_SEGMENTS:
        raise ParameterError("bad size", expected="0 to 4 PiB", found=size)
    return HEADER + size + TAG * segment_count(size)


def plaintext_size(size: int) -> int:
    """Bytes of the plaintext in a ciphertext of ``size`` bytes.

    Raises:
        TamperedError: no ciphertext has this size.

    Example:
        >>> plaintext_size(2_000_072)
        2000000
    """
    count = max(1, -(-size // SEGMENT))
    plain = size - HEADER - TAG * count
    if plain < 0 or segment_count(plain) != count:
        raise TamperedError("no ciphertext has this size", found=f"{size} bytes", advice="get a whole copy")
    return plain


class Segments:
    """The derived key, the nonces and the places of the segments of one ciphertext.

    Args:
        key: 32 bytes, the main key.
        header: the first 40 bytes of the ciphertext.
        size: bytes of plaintext.
        aad: what the ciphertext is bound to.

    Raises:
        ParameterError: the key has not 32 bytes.
        TamperedError: a foreign header.
    """

    __slots__ = ("_cipher", "_prefix", "count", "size")

    def __init__(self, key: bytes, header: bytes, size: int, aad: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ParameterError("bad key", expected=f"{KEY_BYTES} bytes", found=f"{len(key)} bytes")
        if len(header) != HEADER or header[0] != HEADER:
            raise TamperedError("not an AES256_GCM_HKDF_1MB ciphertext", found="a foreign header")
        self.size = size
        self.count = segment_count(size)
        self._prefix = header[33:]
        derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=header[1:33], info=aad).derive(key)
        self._cipher = AESGCM(derived)

    def at(self, offset: int) -> int:
        """The number of the segment that holds plaintext byte ``offset``."""
        return (offset + HEADER) // _PLAIN

    def plain(self, index: int) -> tuple[int, int]:
        """Start and end of a segment in the plaintext."""
        return max(0, index * _PLAIN - HEADER), min(self.size, (index + 1) * _PLAIN - HEADER)

    def sealed(self, index: int) -> tuple[int, int]:
        """Start and end of a segment, its tag included, in the ciphertext."""
        start, end = self.plain(index)
        shift = HEADER + index * TAG
        return start + shift, end + shift + TAG

    def seal(self, index: int, plain: memoryview, out: memoryview) -> None:
        """Encrypt segment ``index`` into ``out``, which is 16 bytes longer."""
        self._cipher.encrypt_into(self._nonce(index), plain, None, out)

    def open(self, index: int, sealed: memoryview, out: memoryview) -> None:
        """Decrypt segment ``index`` into ``out``, which is 16 bytes shorter.

        Raises:
            TamperedError: it is not what was sealed at this place; ``out`` then holds zeros.
        """
        try:
            self._cipher.decrypt_into(self._nonce(index), sealed, None, out)
        except InvalidTag:
            out[:] = bytes(len(out))  # nothing that was not authenticated may be read by accident
            raise TamperedError(f"segment {index} of {self.count} does not authenticate", advice=_ADVICE) from None

    def _nonce(self, index: int) -> bytes:
        return self._prefix + index.to_bytes(4, "big") + bytes([index == self.count - 1])
