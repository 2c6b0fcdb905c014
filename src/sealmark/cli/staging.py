"""Outputs that appear when all that belongs to them is done, or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from sealmark.core.errors import ParameterError, ServiceError
from sealmark.core.files import atomic_write

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]


@contextlib.contextmanager
def staged(path: Path, *, force: bool, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A name beside ``path`` to write a file or a folder to; it becomes ``path`` when the block ends well.

    Args:
        path: where the output shall be.
        force: whether a file there may be replaced. A folder never is.
        sources: what the output must not be.

    Raises:
        ParameterError: something is there already, it is a source, or its folder is missing.
        ServiceError: the file cannot be put in place.
    """
    check_free(path, force=force, sources=sources)
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield work
        try:
            work.replace(path)
        except OSError as error:
            raise ServiceError(f"cannot write {path}", found=error.strerror) from error
    finally:
        if work.is_dir():
            shutil.rmtree(work)
        else:
            work.unlink(missing_ok=True)


def check_free(path: Path, *, force: bool, sources: tuple[Path, ...] = ()) -> None:
    """Refuse an output that would replace something by mistake; raises as `staged`."""
    if any(path.resolve() == source.resolve() for source in sources):
        raise ParameterError("source and target are the same", found=path, advice="choose another --out")
    if path.is_dir():
        raise ParameterError(f"{path} is a folder", expected="a new name", advice="choose another --out")
    if path.exists() and not force:
        raise ParameterError(f"{path} is there already", expected="a new name", advice="pass --force to replace it")
    if not path.parent.is_dir():
        raise ParameterError(f"cannot write {path}", expected="an existing folder", found=f"no {path.parent}")


def write_out(path: Path, data: bytes, *, force: bool, mode: int = 0o644) -> None:
    """Write a small file; raises as `staged`."""
    check_free(path, force=force)
    with atomic_write(path, mode=mode) as file:
        file.write(data)
