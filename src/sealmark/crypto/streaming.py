"""Authenticated encryption of data of any size: Tink's streaming AEAD `AES256_GCM_HKDF_1MB`.

    ciphertext = header || segment 0 || segment 1 || ... || segment n-1
    header     = 40 (1 byte) || salt (32 bytes) || nonce prefix (7 bytes)
    segment i  = AES-256-GCM(HKDF-SHA-256(key, salt, info=AAD), prefix || i (u32, big endian) || is_last)

The header with segment 0, and every further segment but the last, are 1 MiB of ciphertext, of which
16 bytes are the segment's tag. The nonce names the place, so that no segment can be moved, dropped or
added. The format is Tink's to the byte, so that any Tink opens what is written here; see
https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming and, for the construction,
Hoang, Reyhanitabar, Rogaway and Vizár (2015), "Online authenticated-encryption and its nonce-reuse
misuse-resistance".

An AEAD cannot tell a wrong key from changed bytes: everything here raises `TamperedError` for both. A
container that stores a commitment to its key can tell them apart, and `sealmark.formats.sealed` does.
"""

from __future__ import annotations

import io
import secrets

from sealmark.core.errors import ParameterError
from sealmark.crypto.segments import (
    HEADER,
    KEY_BYTES,
    SEGMENT,
    TAG,
    Segments,
    ciphertext_size,
    plaintext_size,
)
from sealmark.crypto.transfer import Fetch, Progress, Store, memory_fetch, memory_store, spread


def draw_key() -> bytes:
    """A fresh key of 32 bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def encrypt_stream(
    key: bytes,
    size: int,
    fetch: Fetch,
    store: Store,
    *,
    aad: bytes = b"",
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """Encrypt ``size`` bytes; memory is 2 MiB a thread, whatever the size.

    Args:
        key: 32 bytes; it may serve for many streams, since each draws a salt of its own.
        size: bytes of plaintext.
        fetch: reads the plaintext.
        store: writes the ciphertext, `ciphertext_size` bytes, in any order.
        aad: what the ciphertext is bound to; it must be given again to decrypt, and is not stored.
        threads: that many segments are worked on at a time.
        progress: told the plaintext bytes done and in all, after each segment.

    Raises:
        ParameterError: a key that has not 32 bytes, or over 4 PiB.

    Example:
        >>> out = bytearray(ciphertext_size(5))
        >>> encrypt_stream(bytes(32), 5, memory_fetch(b"layer"), memory_store(out), aad=b"model 1")
        >>> SeekableReader(bytes(32), len(out), memory_fetch(out), aad=b"model 1").read()
        b'layer'
    """
    ciphertext_size(size)  # refuses a size that the format cannot hold
    header = bytes([HEADER]) + secrets.token_bytes(HEADER - 1)
    segments = Segments(key, header, size, aad)
    store(0, memoryview(header))

    def seal(index: int, scratch: memoryview) -> int:
        start, end = segments.plain(index)
        plain = scratch[: end - start]
        sealed = scratch[SEGMENT : SEGMENT + end - start + TAG]
        fetch(start, plain)
        segments.seal(index, plain, sealed)
        store(segments.sealed(index)[0], sealed)
        return end - start

    spread(range(segments.count), seal, scratch=2 * SEGMENT, threads=threads, total=size, progress=progress)


class SeekableReader(io.RawIOBase):
    """The plaintext of a stream as a read-only binary file; only the segments that are touched are decrypted.

    Opening it decrypts the last segment, so that the size is authenticated and a cut stream is refused
    before any byte is given out. The last segment that was touched is kept, so that small reads in a
    row decrypt it once.

    Args:
        key: 32 bytes.
        size: bytes of ciphertext.
        fetch: reads the ciphertext.
        aad: what it was bound to.
        threads: that many segments are decrypted at a time where a read covers several.

    Raises:
        ParameterError: the key has not 32 bytes.
        TamperedError: a foreign header, bytes changed, cut, added or moved, another key or other ``aad``;
            also from every read.
    """

    def __init__(self, key: bytes, size: int, fetch: Fetch, *, aad: bytes = b"", threads: int = 2) -> None:
        super().__init__()
        header = bytearray(HEADER)
        plain = plaintext_size(size)
        fetch(0, memoryview(header))
        self._segments = Segments(key, bytes(header), plain, aad)
        self._fetch = fetch
        self._threads = threads
        self._position = 0
        self._kept = (-1, memoryview(b""))
        self._segment(self._segments.count - 1, memoryview(bytearray(SEGMENT)))

    @property
    def size(self) -> int:
        """Bytes of plaintext."""
        return self._segments.size

    def read_at(self, offset: int, count: int) -> bytearray:
        """The ``count`` bytes of plaintext from ``offset`` on.

        Raises:
            ParameterError: the range is not inside the plaintext.
            TamperedError: a segment of the range does not authenticate.
        """
        self._check(offset, count)
        result = bytearray(count)
        self.read_into(offset, memoryview(result))
        return result

    def read_into(self, offset: int, target: memoryview, *, progress: Progress | None = None) -> None:
        """Fill ``target`` with the plaintext from ``offset`` on, without a copy in between.

        Fast where the memory of ``target`` is fresh and in huge pages: `numpy.empty`, or a private
        anonymous `mmap`.

        Raises:
            ParameterError: the range is not inside the plaintext, or the buffer is read-only.
            TamperedError: a segment of the range does not authenticate; its place then holds zeros.
        """
        target = target.cast("B")
        self._check(offset, len(target))
        if target.readonly:
            raise ParameterError("cannot decrypt into this buffer", expected="a writable one", found="read-only")
        if not len(target):
            return
        end = offset + len(target)

        def open_into(index: int, scratch: memoryview) -> int:
            first, last = self._segments.plain(index)
            low, high = max(first, offset), min(last, end)
            part = target[low - offset : high - offset]
            if (low, high) == (first, last):
                self._open(index, scratch, part)
            else:
                part[:] = self._segment(index, scratch)[low - first : high - first]
            return high - low

        touched = range(self._segments.at(offset), self._segments.at(end - 1) + 1)
        spread(touched, open_into, scratch=SEGMENT, threads=self._threads, total=len(target), progress=progress)

    def copy_to(self, store: Store, *, progress: Progress | None = None) -> None:
        """Decrypt everything to ``store`` in bounded memory.

        Whoever owns the target must discard it if this raises: what was stored was authentic at its
        place, but it is not whole.

        Raises:
            TamperedError: a segment does not authenticate.
        """

        def open_and_store(index: int, scratch: memoryview) -> int:
            start, end = self._segments.plain(index)
            plain = scratch[SEGMENT : SEGMENT + end - start]
            self._open(index, scratch, plain)
            store(start, plain)
            return end - start

        spread(
            range(self._segments.count),
            open_and_store,
            scratch=2 * SEGMENT,
            threads=self._threads,
            total=self.size,
            progress=progress,
        )

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed wants any buffer
        """Read on from the position; the number of bytes read, 0 at the end."""
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self.size - self._position))
        self.read_into(min(self._position, self.size), target[:count])
        self._position += count
        return count

    def readall(self) -> bytes:
        """Everything from the position to the end."""
        start = min(self._position, self.size)
        self._position = self.size
        return bytes(self.read_at(start, self.size - start))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, and tell it.

        Raises:
            ParameterError: ``whence`` is unknown, or the position would be negative.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise ParameterError("cannot seek there", expected="a position from 0 on", found=(offset, whence))
        self._position = base + offset
        return self._position

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ParameterError(
                "bad range", expected=f"inside 0 .. {self.size}", found=f"{count} bytes from {offset}"
            )

    def _open(self, index: int, scratch: memoryview, target: memoryview) -> None:
        start, end = self._segments.sealed(index)
        sealed = scratch[: end - start]
        self._fetch(start, sealed)
        self._segments.open(index, sealed, target)

    def _segment(self, index: int, scratch: memoryview) -> memoryview:
        number, plain = self._kept
        if number == index:
            return plain
        start, end = self._segments.plain(index)
        fresh = memoryview(bytearray(end - start))  # readers of the old one keep theirs
        self._open(index, scratch, fresh)
        self._kept = (index, fresh)
        return fresh


def encrypt_bytes(key: bytes, data: bytes | bytearray | memoryview, *, aad: bytes = b"") -> bytes:
    """The ciphertext of bytes in memory."""
    size = memoryview(data).nbytes
    result = bytearray(ciphertext_size(size))
    encrypt_stream(key, size, memory_fetch(data), memory_store(result), aad=aad, threads=1)
    return bytes(result)


def decrypt_bytes(key: bytes, data: bytes | bytearray | memoryview, *, aad: bytes = b"") -> bytes:
    """The plaintext of a ciphertext in memory.

    Raises:
        TamperedError: as `SeekableReader`.

    Example:
        >>> decrypt_bytes(bytes(32), encrypt_bytes(bytes(32), b"layer"))
        b'layer'
    """
    return SeekableReader(key, memoryview(data).nbytes, memory_fetch(data), aad=aad, threads=1).readall()
