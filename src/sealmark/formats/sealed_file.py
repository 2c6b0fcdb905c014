"""Opening sealed files: check what it is, unwrap the key, decrypt to memory, to a file or piece by piece."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sealmark.core.errors import (
    FormatError,
    ModelMismatchError,
    ParameterError,
    ServiceError,
    TamperedError,
    WrongKeyError,
)
from sealmark.core.files import atomic_write, reserve
from sealmark.crypto.recipients import Identity, Passphrase
from sealmark.crypto.segments import SEGMENT, ciphertext_size
from sealmark.crypto.streaming import SeekableReader
from sealmark.crypto.transfer import Fetch, Progress, file_fetch, file_store, memory_fetch
from sealmark.crypto.wrapping import key_id, unwrap
from sealmark.formats.sealed_header import PREFIX, SealedHeader, unpack_prefix

Opener = bytes | Identity | Passphrase
"""What opens a sealed file: its data key, an identity or a passphrase."""


def open_sealed(
    source: Path | str | bytes, *, model: str | None = None, role: str | None = None, kind: str | None = None
) -> SealedFile:
    """Read the header of a sealed file and check it against what the caller expects.

    Args:
        source: a path, or the bytes of a sealed file.
        model: the model that it must be for, if the caller knows it.
        role: the part of the model that it must be.
        kind: what it must be.

    Returns:
        The file, to be used in a ``with`` or closed.

    Raises:
        ParameterError: no such file.
        FormatError: not a sealed file, truncated, with bytes added, or of another kind.
        ModelMismatchError: made for another model, or another part of it.
        ServiceError: the disk fails.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            sealed = SealedFile(memory_fetch(source), len(source))
        else:
            file = stack.enter_context(open_regular(source))
            size = os.fstat(file.fileno()).st_size
            sealed = SealedFile(file_fetch(file), size, path=Path(source), close=file.close)
        sealed.expect(model=model, role=role, kind=kind)
        stack.pop_all()  # all is well: the file stays open
    return sealed


class SealedFile:
    """A sealed file whose header was read; `open_sealed` makes them.

    Where a method takes an opener, that is the data key, an identity or a passphrase. Each of them raises

    - WrongKeyError: it is another key, no stanza is for this identity, or the passphrase opens none;
    - TamperedError: bytes of the file were changed, cut, added or moved.

    Attributes:
        header: what the file says of itself. Proven by opening it, not before.
        start: the offset of the ciphertext in the file.
    """

    def __init__(
        self, fetch: Fetch, size: int, *, path: Path | None = None, close: Callable[[], None] = lambda: None
    ) -> None:
        self._name = str(path or "the sealed bytes")
        self._path = path
        self._close = close
        self._fetch = fetch
        length = unpack_prefix(self._read(0, min(PREFIX.size, size)))
        self.start = PREFIX.size + length
        if size < self.start:
            raise FormatError(f"{self._name} is truncated", expected="a whole header", found=f"{size} bytes")
        self.header = SealedHeader.unpack(self._read(PREFIX.size, length))
        self._size = ciphertext_size(self.header.size)
        if size != self.start + self._size:
            state = "truncated" if size < self.start + self._size else "too long"
            raise FormatError(
                f"{self._name} is {state}",
                expected=f"{self.start + self._size} bytes",
                found=size,
                advice="get a whole copy",
            )

    def expect(self, *, model: str | None = None, role: str | None = None, kind: str | None = None) -> None:
        """Refuse a file that is not for this model, in this role, of this kind; None accepts any.

        Raises:
            ModelMismatchError: another model or role.
            FormatError: another kind.
        """
        if kind not in (None, self.header.kind):
            raise FormatError(f"{self._name} is of another kind", expected=kind, found=self.header.kind)
        for name, expected, found in (("model", model, self.header.model), ("role", role, self.header.role)):
            if expected not in (None, found):
                raise ModelMismatchError(
                    f"{self._name} was sealed for another {name}",
                    expected=expected,
                    found=found,
                    advice="get the file that belongs to this model",
                )

    def unwrap(self, opener: Opener) -> bytes:
        """The data key."""
        if isinstance(opener, bytes):
            if key_id(opener) != self.header.key_id:
                raise WrongKeyError(
                    f"this key does not open {self._name}",
                    expected=f"a key with the id {self.header.key_id}",
                    found=key_id(opener),
                    advice="get the key that it was sealed with",
                )
            return opener
        key = unwrap(self.header.wraps, opener, context=self.header.context())
        if key_id(key) != self.header.key_id:
            raise TamperedError(
                f"a stanza of {self._name} holds another key", advice="get a fresh copy from the owner"
            )
        return key

    def reader(self, opener: Opener, *, threads: int = 2) -> SeekableReader:
        """The plaintext as a binary file, decrypted where it is read; it works while this file is open."""

        def fetch(offset: int, buffer: memoryview) -> None:
            self._fetch(self.start + offset, buffer)

        context = self.header.context()
        return SeekableReader(self.unwrap(opener), self._size, fetch, aad=context, threads=threads)

    def read_all(self, opener: Opener, *, threads: int = 2, progress: Progress | None = None) -> memoryview:
        """The whole plaintext in fresh memory, writable; `numpy.frombuffer` and torch take it as it is.

        Raises:
            ServiceError: there is not enough memory.
        """
        reader = self.reader(opener, threads=threads)
        target = _fresh_memory(reader.size)
        reader.read_into(0, target, progress=progress)
        return target

    def decrypt_to(
        self, opener: Opener, target: Path | str, *, threads: int = 2, progress: Progress | None = None
    ) -> None:
        """Write the plaintext to a file that its owner alone can read, in bounded memory.

        The file appears once the last segment was authenticated, and not at all if one was not.

        Raises:
            ParameterError: the target is the sealed file, or its folder does not exist.
            ServiceError: the disk is full or fails.
        """
        if self._path is not None:
            check_apart(self._path, target)
        reader = self.reader(opener, threads=threads)
        with atomic_write(target, mode=0o600) as file:
            reserve(file, reader.size)
            reader.copy_to(file_store(file), progress=progress)

    def copy_ciphertext(self, file: BinaryIO) -> None:
        """Write the ciphertext as it is: what Tink, and another header, can take."""
        end = self.start + self._size
        for offset in range(self.start, end, SEGMENT):
            file.write(self._read(offset, min(SEGMENT, end - offset)))

    def close(self) -> None:
        """Close the file; what was decrypted stays, readers do not."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._fetch(offset, memoryview(buffer))
        return bytes(buffer)


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        ParameterError: there is none, or it is a folder or a device.
        ServiceError: the disk, or its permissions, refuse.
    """
    if not Path(path).is_file():
        raise ParameterError("no such file", expected="a file", found=str(path))
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise ServiceError(f"cannot read {path}", found=error.strerror) from error


def check_apart(source: Path | str, target: Path | str) -> None:
    """Refuse to write a file over its own source.

    Raises:
        ParameterError: both are the same file.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ParameterError("source and target are the same file", found=str(target))


def _fresh_memory(size: int) -> memoryview:
    if not size:
        return memoryview(bytearray())
    try:
        # private and anonymous: shared or file-backed memory is several times slower to fill
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ServiceError("not enough memory", expected=f"{size} bytes", found=error) from error
    with contextlib.suppress(OSError, AttributeError):  # not every kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
