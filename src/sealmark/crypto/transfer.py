"""Where the bytes of a stream come from, where they go, and the threads that move them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from sealmark.core.errors import FormatError, ParameterError, ServiceError

Fetch = Callable[[int, memoryview], None]
"""Fills the buffer with the bytes of the source from an offset on. Called from several threads."""

Store = Callable[[int, memoryview], None]
"""Puts the buffer into the target at an offset. Called from several threads, in any order."""

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes in all, after each segment, from one thread at a time."""

Work = Callable[[int, memoryview], int]
"""Does one piece with a scratch buffer of its own; answers with the plaintext bytes it did."""


def file_fetch(file: BinaryIO, start: int = 0) -> Fetch:
    """Read from an open file, whose byte ``start`` is the stream's byte 0.

    The function that is returned raises FormatError where the file ends too early, ParameterError once
    it was closed, and ServiceError where the disk fails.
    """

    def fetch(offset: int, buffer: memoryview) -> None:
        if file.closed:
            raise ParameterError("the file is closed", advice="keep it open while it is read")
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(file.fileno(), [buffer[done:]], start + offset + done)
            except OSError as error:
                raise ServiceError("cannot read the source", found=error.strerror) from error
            if not count:
                raise FormatError(
                    "the file is truncated",
                    expected=f"{len(buffer)} bytes from {start + offset} on",
                    found=done,
                    advice="it was cut while it was read; get a whole copy",
                )
            done += count

    return fetch


def file_store(file: BinaryIO, start: int = 0) -> Store:
    """Write to an open file, whose byte ``start`` is the stream's byte 0; OSError passes through."""

    def store(offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            done += os.pwrite(file.fileno(), buffer[done:], start + offset + done)

    return store


def memory_fetch(data: bytes | bytearray | memoryview) -> Fetch:
    """Read from bytes in memory.

    Example:
        >>> buffer = bytearray(3)
        >>> memory_fetch(b"abcdef")(2, memoryview(buffer))
        >>> buffer
        bytearray(b'cde')
    """
    view = memoryview(data).cast("B")

    def fetch(offset: int, buffer: memoryview) -> None:
        buffer[:] = view[offset : offset + len(buffer)]

    return fetch


def memory_store(target: bytearray | memoryview) -> Store:
    """Write to a buffer in memory that is as large as the stream."""
    view = memoryview(target).cast("B")

    def store(offset: int, buffer: memoryview) -> None:
        view[offset : offset + len(buffer)] = buffer

    return store


def spread(pieces: range, work: Work, *, scratch: int, threads: int, total: int, progress: Progress | None) -> None:
    """Do ``work`` on every piece, on the calling thread and ``threads - 1`` helpers.

    The first error, Ctrl-C included, stops the others after the piece that they are at, and is
    raised. Memory is ``scratch`` bytes a thread, however many pieces there are.

    Args:
        pieces: their numbers.
        work: called once for each.
        scratch: bytes of the buffer that each thread hands to ``work``.
        threads: at least 1. More than the number of cores does not help.
        total: bytes in all, for ``progress``.
        progress: told after each piece.

    Raises:
        ParameterError: ``threads`` is under 1.
    """
    if threads < 1:
        raise ParameterError("bad number of threads", expected="1 or more", found=threads)
    todo, gate, stop = iter(pieces), threading.Lock(), threading.Event()
    done = 0

    def take() -> int | None:
        with gate:
            return None if stop.is_set() else next(todo, None)

    def run() -> None:
        nonlocal done
        buffer = memoryview(bytearray(scratch))
        try:
            while (piece := take()) is not None:
                count = work(piece, buffer)
                with gate:
                    done += count
                    if progress:
                        progress(done, total)
        finally:
            stop.set()  # either nothing is left, or something failed

    helpers = min(threads, len(pieces)) - 1
    if helpers < 1:
        run()
        return
    with ThreadPoolExecutor(helpers) as pool:
        futures = [pool.submit(run) for _ in range(helpers)]
        run()
        for future in futures:
            future.result()
