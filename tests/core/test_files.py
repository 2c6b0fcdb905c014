"""Atomic writing: the old bytes or the new ones, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from sealmark.core.errors import ParameterError, ServiceError
from sealmark.core.files import atomic_write, reserve


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    with atomic_write(path, mode=mode) as file:
        file.write(data)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_file_appears_whole(tmp_path: Path) -> None:
    _write(tmp_path / "a", b"whole")
    assert _contents(tmp_path) == {"a": b"whole"}


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old and longer")
    _write(tmp_path / "a", b"new")
    assert _contents(tmp_path) == {"a": b"new"}


def test_a_reader_sees_the_old_bytes_until_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_the_file_can_be_read_and_sought_while_it_is_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as file:
        file.write(b"head")
        file.seek(0)
        assert file.read() == b"head"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_passes_and_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert _contents(tmp_path) == {"a": b"old"}


def test_an_error_inside_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as file:
        file.write(b"%d" % (1 // 0))
    assert _contents(tmp_path) == {}


def test_a_full_disk_is_a_service_error_and_the_old_file_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServiceError, match="No space left"):
        _write(tmp_path / "a", b"new")
    assert _contents(tmp_path) == {"a": b"old"}


def test_a_folder_that_refuses_new_files_is_a_service_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ServiceError, match="Permission denied"):
        _write(tmp_path / "a", b"new")


def test_a_missing_folder_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="expected an existing folder"):
        _write(tmp_path / "nowhere" / "a", b"x")
    assert _contents(tmp_path) == {}


def test_a_file_in_the_place_of_the_folder_is_the_callers_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ParameterError, match="expected an existing folder"):
        _write(tmp_path / "file" / "a", b"x")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ParameterError, match="found a folder"):
        _write(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_file_has_the_mode_that_was_asked_for_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077 if mode == 0o644 else 0)
    try:
        _write(tmp_path / "a", b"x", mode=mode)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_a_secret_file_is_private_from_the_first_byte(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a", mode=0o600) as file:
        file.write(b"secret")
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_mode & 0o777 == 0o600


def test_room_is_reserved_and_a_full_disk_is_met_at_once(tmp_path: Path, monkeypatch):
    with (tmp_path / "target").open("w+b") as target:
        reserve(target, 5000)
        assert (tmp_path / "target").stat().st_size == 5000
        monkeypatch.setattr("os.posix_fallocate", fail_with(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            reserve(target, 5000)


def test_a_file_system_that_cannot_reserve_is_accepted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("os.posix_fallocate", fail_with(errno.EOPNOTSUPP))
    with (tmp_path / "target").open("w+b") as target:
        reserve(target, 5000)
    assert (tmp_path / "target").stat().st_size == 0


def fail_with(number: int):
    import os

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
