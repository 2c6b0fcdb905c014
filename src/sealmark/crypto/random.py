"""Keyed random streams: AES-256 in counter mode under HKDF-SHA-256.

Every random part of a secret comes from its own labelled stream, so that it can be derived again,
at any offset, on any platform. Numpy and torch generators promise neither secrecy nor the same
numbers in the next version; they serve training, never secrets.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy.special import ndtri

from sealmark.core.errors import ParameterError

_BLOCK = 16
_CHUNK = 1 << 20


def derive_key(seed: bytes, *, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA-256 (RFC 5869) of ``seed``; ``info`` separates the uses of one seed."""
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(seed)


class Stream:
    """An endless keyed stream that is read at any offset; reading changes nothing.

    Two reads of the same range agree, so give every purpose a stream of its own.

    Args:
        key: 32 bytes.

    Example:
        >>> stream = Stream(bytes(32))
        >>> bool((stream.raw(40)[8:] == stream.raw(32, offset=8)).all())
        True
        >>> stream.signs(4).tolist()
        [-1, -1, 1, -1]
    """

    __slots__ = ("_algorithm",)

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ParameterError("bad stream key", expected="32 bytes", found=f"{len(key)} bytes")
        self._algorithm = algorithms.AES256(key)

    def raw(self, count: int, *, offset: int = 0) -> NDArray[np.uint8]:
        """``count`` bytes of the stream from byte ``offset``: (count,) uint8."""
        if count < 0 or offset < 0:
            raise ParameterError("bad range", expected="count and offset >= 0", found=(count, offset))
        first, skip = divmod(offset, _BLOCK)
        encryptor = Cipher(self._algorithm, modes.CTR(first.to_bytes(_BLOCK, "big"))).encryptor()
        total = skip + count
        out = np.empty(total + _BLOCK, np.uint8)  # update_into asks for a block of slack
        view = out.data
        for start in range(0, total, _CHUNK):
            size = min(_CHUNK, total - start)
            encryptor.update_into(_ZEROS[:size], view[start : start + size + _BLOCK - 1])
        return out[skip:total]

    def bits(self, count: int, *, offset: int = 0) -> NDArray[np.uint8]:
        """``count`` fair bits from bit ``offset``: (count,) uint8 of 0 and 1."""
        first, skip = divmod(offset, 8)
        packed = self.raw((skip + count + 7) // 8, offset=first)
        return np.unpackbits(packed, count=skip + count)[skip:]

    def signs(self, count: int, *, offset: int = 0) -> NDArray[np.int8]:
        """``count`` fair signs: (count,) int8 of -1 and +1."""
        return (1 - 2 * self.bits(count, offset=offset)).astype(np.int8)

    def words(self, count: int, *, offset: int = 0) -> NDArray[np.uint64]:
        """``count`` little-endian 64-bit words from word ``offset``: (count,) uint64."""
        return self.raw(8 * count, offset=8 * offset).copy().view("<u8").astype(np.uint64, copy=False)

    def uniform(self, count: int, *, offset: int = 0) -> NDArray[np.float64]:
        """``count`` numbers, uniform in the open interval (0, 1), 53 bits each."""
        high_bits = (self.words(count, offset=offset) >> np.uint64(11)).astype(np.float64)
        return (high_bits + 0.5) * 2.0**-53

    def normal(self, count: int, *, offset: int = 0) -> NDArray[np.float64]:
        """``count`` standard normal numbers, by inversion."""
        return np.asarray(ndtri(self.uniform(count, offset=offset)), np.float64)

    def integers(self, count: int, high: int) -> NDArray[np.int64]:
        """``count`` integers uniform in ``0 .. high - 1`` without modulo bias.

        Raises:
            ParameterError: ``high`` is not in 1 .. 2**63.
        """
        if not 1 <= high <= 2**63:
            raise ParameterError("bad range", expected="high in 1 .. 2**63", found=high)
        limit = np.uint64(2**64 // high * high - 1)
        kept, offset = np.empty(0, np.uint64), 0
        while kept.size < count:
            words = self.words(count - kept.size, offset=offset)
            offset += words.size
            kept = np.concatenate([kept, words[words <= limit]])
        return (kept % np.uint64(high)).astype(np.int64)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniform permutation of ``0 .. count - 1``: the order of ``count`` random words."""
        words = self.words(count)
        ordered = np.sort(words)
        equal = bool((ordered[1:] == ordered[:-1]).any())  # else any sort finds the one order
        return np.argsort(words, kind="stable" if equal else "quicksort")


class Streams:
    """A keyed stream for each of any number of names, all under one key: a million of them in seconds.

    A `Stream` a name would cost more in deriving and setting up its key than in what is read of it. Here a
    name's stream is AES-256 in counter mode from the first 128 bits of its HMAC-SHA-256.

    Args:
        key: 32 bytes.

    Example:
        >>> streams = Streams(bytes(32))
        >>> streams.raw(["alice", "bob"], 3).tolist()
        [[42, 34, 231], [171, 182, 82]]
    """

    __slots__ = ("_algorithm", "_names")

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ParameterError("bad key of streams", expected="32 bytes", found=f"{len(key)} bytes")
        derived = derive_key(key, salt=b"", info=b"sealmark/streams/v1", length=64)
        self._names, self._algorithm = derived[:32], algorithms.AES256(derived[32:])

    def raw(self, names: Sequence[str], count: int) -> NDArray[np.uint8]:
        """The first ``count`` bytes of each name's stream: (N, count) uint8.

        A name is any text, and two texts that differ in a code point are two names.

        Raises:
            ParameterError: a negative count.
        """
        if count < 0:
            raise ParameterError("bad count", expected="0 or more", found=count)
        encryptor = Cipher(self._algorithm, modes.CTR(bytes(_BLOCK))).encryptor()
        out = np.empty(len(names) * count + _BLOCK, np.uint8)
        view, zeros = out.data, bytes(count)
        for row, name in enumerate(names):
            # half a surrogate is no Unicode, but an operating system may hand it out as a part of a name
            encoded = name.encode("utf-8", "surrogatepass")
            encryptor.reset_nonce(hmac.digest(self._names, encoded, "sha256")[:_BLOCK])
            encryptor.update_into(zeros, view[row * count : (row + 1) * count + _BLOCK - 1])
        return out[: len(names) * count].reshape(len(names), count)


_ZEROS = bytes(_CHUNK)
