"""Sealed files and the machine: damage, full disks, interruptions, memory."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sealmark.core.errors import (
    FormatError,
    ParameterError,
    ServiceError,
    TamperedError,
)
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.segments import SEGMENT
from sealmark.formats.sealed import open_sealed, rewrap, seal_file

KEY = bytes(range(32))
OWNER, USER = (Identity(bytes(31) + bytes([i])) for i in (1, 2))
WORDS = Passphrase("correct horse", cost=Cost(iterations=1, memory_kib=64, lanes=1))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(secrets.token_bytes(3_000_000))
    return path


@pytest.fixture
def sealed(plain: Path) -> Path:
    path = plain.with_name("model.sealed")
    seal_file(plain, path, KEY, model="m", wraps=[OWNER.recipient, WORDS])
    return path


def folder(path: Path) -> list[str]:
    return sorted(item.name for item in path.parent.iterdir())


def test_a_truncated_file_says_how_long_it_should_be(sealed: Path):
    whole = sealed.stat().st_size
    os.truncate(sealed, whole - 1)
    with pytest.raises(FormatError, match=f"truncated: expected {whole} bytes, found {whole - 1}"):
        open_sealed(sealed)


def test_a_file_with_bytes_added_is_refused(sealed: Path):
    with sealed.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="too long"):
        open_sealed(sealed)


@pytest.mark.parametrize("name", ["a.safetensors", "license.json", "a.npz"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, name):
    (tmp_path / name).write_bytes(b'{"payload": "eyJ9", "payloadType": "application/vnd.sealmark.license"}')
    with pytest.raises(FormatError, match="not a sealed file"):
        open_sealed(tmp_path / name)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ParameterError, match="no such file"):
            open_sealed(path)
        with pytest.raises(ParameterError, match="no such file"):
            seal_file(path, tmp_path / "s", KEY, model="m")


def test_a_file_that_may_not_be_read_is_a_service_error(sealed: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ServiceError, match="Permission denied"):
        open_sealed(sealed)


def test_a_file_is_never_written_over_its_own_source(plain: Path, sealed: Path):
    with pytest.raises(ParameterError, match="the same file"):
        seal_file(plain, plain.parent / "." / "plain", KEY, model="m")
    with open_sealed(sealed) as file, pytest.raises(ParameterError, match="the same file"):
        file.decrypt_to(KEY, sealed)


def test_only_the_owner_may_read_what_was_decrypted(sealed: Path, tmp_path: Path):
    with open_sealed(sealed) as file:
        file.decrypt_to(KEY, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_damage_leaves_no_plaintext_behind(sealed: Path, tmp_path: Path, segment):
    data = bytearray(sealed.read_bytes())
    with open_sealed(sealed) as file:
        data[file.start + segment * SEGMENT + 500] ^= 1
    sealed.write_bytes(data)
    before = folder(sealed)
    with open_sealed(sealed) as file, pytest.raises(TamperedError):
        file.decrypt_to(KEY, tmp_path / "out", threads=1)
    assert folder(sealed) == before


def full_disk(after: int) -> Callable[..., int]:
    """A pwrite that meets a full disk after that many calls."""
    whole, calls = os.pwrite, itertools.count()

    def write(*args: object) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args)  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_leaves_the_old_files(plain: Path, sealed: Path, monkeypatch, after, threads):
    out = plain.with_name("out")
    out.write_bytes(b"old")
    before, names = sealed.read_bytes(), folder(sealed)
    monkeypatch.setattr("os.pwrite", full_disk(after))
    with pytest.raises(ServiceError, match="No space left"):
        seal_file(plain, sealed, KEY, model="n", threads=threads)
    monkeypatch.setattr("os.pwrite", full_disk(after))
    with open_sealed(sealed) as file, pytest.raises(ServiceError, match="No space left"):
        file.decrypt_to(KEY, out, threads=threads)
    assert (sealed.read_bytes(), out.read_bytes(), folder(sealed)) == (before, b"old", names)


def test_a_disk_that_is_too_small_is_met_before_the_work(plain: Path, sealed: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    seen: list[int] = []
    with pytest.raises(ServiceError, match="No space left"):
        seal_file(plain, sealed, KEY, model="n", progress=lambda done, _: seen.append(done))
    assert seen == []


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_leaves_the_old_files(plain: Path, sealed: Path, threads):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = plain.with_name("out")
    out.write_bytes(b"old")
    before, names = sealed.read_bytes(), folder(sealed)
    with pytest.raises(KeyboardInterrupt):
        seal_file(plain, sealed, KEY, model="n", threads=threads, progress=interrupt)
    with open_sealed(sealed) as file, pytest.raises(KeyboardInterrupt):
        file.decrypt_to(KEY, out, threads=threads, progress=interrupt)
    assert (sealed.read_bytes(), out.read_bytes(), folder(sealed)) == (before, b"old", names)


def test_a_failed_rewrap_leaves_the_old_file(sealed: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before, names = sealed.read_bytes(), folder(sealed)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(ServiceError):
        rewrap(sealed, KEY, add=[USER.recipient])
    assert (sealed.read_bytes(), folder(sealed)) == (before, names)


def test_a_machine_without_enough_memory_says_so(sealed: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuse)
    with open_sealed(sealed) as file, pytest.raises(ServiceError, match="not enough memory"):
        file.read_all(KEY)


def test_it_works_without_torch_and_numpy():
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, scipy=None)\n"
        "from sealmark.formats.sealed import open_sealed, seal_bytes\n"
        "assert open_sealed(seal_bytes(b'layer', bytes(32), model='m')).read_all(bytes(32)) == b'layer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PEAK = """
import sys
from sealmark.formats.sealed import open_sealed, seal_file
folder, size = sys.argv[1], int(sys.argv[2])
with open(folder + "/plain", "wb") as file:
    file.truncate(size)
seal_file(folder + "/plain", folder + "/sealed", bytes(32), model="m")
with open_sealed(folder + "/sealed") as file:
    file.decrypt_to(bytes(32), folder + "/out")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    def peak(mib: int) -> int:  # KiB
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), str(mib << 20)], check=True, capture_output=True
        )
        return int(run.stdout)

    assert peak(96) - peak(4) < 12 * 1024
