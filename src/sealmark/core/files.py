"""Writing files so that a reader sees the old bytes or the new ones, never half of them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sealmark.core.errors import ParameterError, ServiceError


@contextlib.contextmanager
def atomic_write(path: Path | str, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Open a new file that takes ``path``'s place only when the block ends well.

    The bytes go to a temporary file in the same folder, are synced to disk, and are renamed over
    ``path``. An error, a full disk or Ctrl-C removes the temporary file and leaves ``path`` as it was.

    Args:
        path: where the file shall be; its folder must exist.
        mode: permission bits of the new file (``0o600`` for secrets).

    Yields:
        A binary file, readable and writable, opened at offset 0.

    Raises:
        ParameterError: the folder does not exist, or ``path`` is a folder itself.
        ServiceError: the disk is full or refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a") as file:
        ...         _ = file.write(b"whole")
        ...     (Path(folder) / "a").read_bytes()
        b'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise ParameterError(f"cannot write {path}", expected="a file", found="a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    except (FileNotFoundError, NotADirectoryError):
        raise ParameterError(
            f"cannot write {path}", expected="an existing folder", found=f"no {path.parent}"
        ) from None
    except OSError as error:
        raise ServiceError(f"cannot write {path}", found=error.strerror) from error
    try:
        with os.fdopen(descriptor, "w+b") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ServiceError(
            f"cannot write {path}", found=error.strerror, advice="free some space; the old file stands"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def reserve(file: BinaryIO, size: int) -> None:
    """Claim ``size`` bytes of disk: a full disk is met before the work, and writing gets faster.

    Raises:
        OSError: the disk is full.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # this file system cannot
                raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
