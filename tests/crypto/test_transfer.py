"""Moving bytes between files, memory and threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sealmark.core.errors import FormatError, ParameterError, ServiceError
from sealmark.crypto.streaming import (
    encrypt_stream,
)
from sealmark.crypto.transfer import (
    file_fetch,
    file_store,
    memory_store,
    spread,
)

KEY = bytes(range(32))


def test_a_source_that_ends_too_early_is_named(tmp_path: Path):
    (tmp_path / "short").write_bytes(b"lay")
    with (tmp_path / "short").open("rb") as source, pytest.raises(FormatError, match="truncated"):
        encrypt_stream(KEY, 5, file_fetch(source), memory_store(bytearray(100)))


def test_a_closed_source_is_named(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"layer")
    with (tmp_path / "plain").open("rb") as source:
        fetch = file_fetch(source)
    with pytest.raises(ParameterError, match="closed"):
        fetch(0, memoryview(bytearray(5)))


def test_a_disk_that_cannot_be_read_is_a_service_error(tmp_path: Path):
    with (tmp_path / "write-only").open("wb") as source, pytest.raises(ServiceError, match="cannot read"):
        file_fetch(source)(0, memoryview(bytearray(5)))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch):
    import os

    whole = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, data, offset: whole(file, data[:3], offset))
    with (tmp_path / "target").open("w+b") as target:
        file_store(target, 2)(1, memoryview(b"0123456789"))
        assert (tmp_path / "target").read_bytes() == b"\0\0\0" + b"0123456789"


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_each_piece_is_done_once(threads):
    done: list[int] = []
    spread(
        range(3, 50), lambda piece, _: done.append(piece) or 1, scratch=1, threads=threads, total=47,
        progress=None,
    )  # fmt: skip
    assert sorted(done) == list(range(3, 50))


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("in_main", [True, False])
def test_the_first_error_stops_all_threads_and_is_raised(fault, in_main):
    done: list[int] = []
    before = threading.active_count()
    both = threading.Barrier(2, timeout=10)

    def work(piece: int, scratch: memoryview) -> int:
        if piece < 2:
            both.wait()  # one piece for each thread
            if (threading.current_thread() is threading.main_thread()) is in_main:
                raise fault
        done.append(piece)
        return 1

    with pytest.raises(fault):
        spread(range(10_000_000), work, scratch=1, threads=2, total=1, progress=None)
    assert len(done) < 1_000_000
    assert threading.active_count() == before


def test_no_threads_are_refused():
    with pytest.raises(ParameterError, match="1 or more"):
        spread(range(1), lambda *_: 0, scratch=1, threads=0, total=0, progress=None)
