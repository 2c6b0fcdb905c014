"""Many users' copies of one model, made here or by the workers of Ray.

Each copy is one pass over the file, whole or not there at all. The model is looked at once and not once a
copy. Workers get the owner's secret through Ray's object store, as the bytes of its file, and read and write
paths as they are given: whoever runs the cluster could mark copies himself, and all of its machines must see
the same folders.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import shutil
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealmark.core import registry
from sealmark.core.errors import ParameterError, SealmarkError, ServiceError, UnsupportedError
from sealmark.core.identity import WeightMark, check_model
from sealmark.core.secret import Secret
from sealmark.core.weights import FileWeights, Progress, rewrite_file
from sealmark.formats.sealed import SUFFIX, open_sealed, roles_of, seal_file
from sealmark.formats.secret import secret_from_bytes, secret_to_bytes


@dataclass(frozen=True)
class Order:
    """A copy to be made.

    Attributes:
        user: whose.
        target: where it is written, a file for a file and a folder for a folder.
    """

    user: str
    target: Path


@dataclass(frozen=True)
class Copy:
    """A copy that was made and is whole on the disk.

    Attributes:
        user: whose.
        target: where it is.
        digest: of its weights.
    """

    user: str
    target: Path
    digest: str


def issue_copies(
    mark: WeightMark,
    source: Path,
    secret: Secret,
    orders: Sequence[Order],
    *,
    workers: int = 1,
    address: str | None = None,
    progress: Progress | None = None,
) -> Generator[Copy]:
    """Mark a copy for each user, and tell of each as it is done; stop asking and no more are begun.

    Args:
        mark: of the secret.
        source: the unmarked model, a weight file or a folder of shards.
        secret: of the users.
        orders: for whom, and where to.
        workers: how many copies are made at a time; more than one takes Ray, started for this call alone. In
            a cluster, 1 stands for all of its cores.
        address: of a Ray cluster to join.
        progress: told each tensor of copies that are made in this process.

    Yields:
        The copies, in the order in which they get done.

    Raises:
        ParameterError: no positive number of workers, a user without a name, or Ray is there in use elsewhere.
        ModelMismatchError: the secret was made for another model.
        UnsupportedError: Ray is needed and not installed.
        ServiceError: the disk is full, or Ray fails; what was told of stands.
    """
    if workers < 1:
        raise ParameterError("bad number of workers", expected="1 or more", found=workers)
    if not all(order.user for order in orders):
        raise ParameterError("bad user", expected="a name", found="an empty one")
    mark.check_secret(secret)
    check_model(FileWeights(source), secret)
    if workers == 1 and address is None:
        return _made_here(mark, source, secret, orders, progress)
    return _made_by_ray(source, secret, orders, workers, address)


def seal_copy(copy: Copy, target: Path, key: bytes) -> None:
    """Encrypt a copy, bound to its digest; the plain one is removed.

    Args:
        copy: a file, or a folder of shards.
        target: a file for a file, a folder for a folder.
        key: the data key, 32 bytes.

    Raises:
        ServiceError: the disk is full or fails.
    """
    if not copy.target.is_dir():
        seal_file(copy.target, target, key, model=copy.digest)
        copy.target.unlink()
        return
    target.mkdir()
    for part, role in roles_of(copy.target.iterdir()).items():
        seal_file(part, target / f"{part.name}{SUFFIX}", key, model=copy.digest, role=role)
    shutil.rmtree(copy.target)


def stands(path: Path, digest: str, key: bytes | None = None) -> bool:
    """Whether a copy is there and whole, by every byte of it.

    Args:
        path: where it should be.
        digest: of its weights.
        key: its data key where it is sealed.
    """
    try:
        if key is None:
            return path.exists() and FileWeights(path).digest() == digest
        parts = roles_of(path.iterdir()) if path.is_dir() else {path: "weights"}
        for part, role in parts.items():
            with open_sealed(part, model=digest, role=role) as sealed:
                sealed.reader(key).copy_to(_nowhere)
    except SealmarkError:
        return False
    return bool(parts)


def _nowhere(offset: int, piece: memoryview) -> None:
    """Takes what was decrypted only to see that it can be."""


def _made_here(
    mark: WeightMark, source: Path, secret: Secret, orders: Sequence[Order], progress: Progress | None
) -> Generator[Copy]:
    for order in orders:
        rewrite_file(source, order.target, mark.marker(secret, order.user), progress=progress)
        yield Copy(order.user, order.target, FileWeights(order.target).digest())


def _made_by_ray(
    source: Path, secret: Secret, orders: Sequence[Order], workers: int, address: str | None
) -> Generator[Copy]:
    with _cluster(workers, address) as (ray, slots):
        work = ray.remote(num_cpus=1)(_made_there)
        key, model = ray.put(secret_to_bytes(secret)), str(source.resolve())
        waiting = list(reversed(orders))
        running: dict[Any, Order] = {}
        while waiting or running:
            while waiting and len(running) < slots:  # what a kill can lose is what is running
                order = waiting.pop()
                running[work.remote(model, str(order.target.resolve()), key, order.user)] = order
            (done, *_), _ = ray.wait(list(running))
            order = running.pop(done)
            found = _answer(ray, done)
            yield Copy(order.user, order.target, found)


def _made_there(source: str, target: str, key: bytes, user: str) -> str | SealmarkError:
    """What a worker does: the digest of the copy. Our errors are answers: Ray would wrap them in its own."""
    try:
        mark, secret = _rebuilt(key)
        (copy,) = _made_here(mark, Path(source), secret, [Order(user, Path(target))], None)
    except SealmarkError as error:
        return error
    return copy.digest


@functools.lru_cache(maxsize=1)  # a worker makes many copies for one secret
def _rebuilt(key: bytes) -> tuple[WeightMark, Secret]:
    secret = secret_from_bytes(key)
    mark = registry.scheme_of(secret)
    if not isinstance(mark, WeightMark):
        raise UnsupportedError(f"{mark.name} marks no files", expected="a mark on weights", found=mark.name)
    return mark, secret


def _answer(ray: Any, done: Any) -> str:
    try:
        found = ray.get(done)
    except ray.exceptions.RayError as error:
        raise ServiceError(
            "a worker failed", found=str(error).strip().splitlines()[-1], advice="run it again: what is done stands"
        ) from error
    if isinstance(found, SealmarkError):
        raise found
    return str(found)


@contextmanager
def _cluster(workers: int, address: str | None) -> Iterator[tuple[Any, int]]:
    """Ray, and how many copies it makes at a time; it is left as it was found."""
    if address is not None:
        _check_answers(address)
    try:
        ray: Any = importlib.import_module("ray")  # an extra
    except ImportError:
        raise UnsupportedError(
            "several workers need Ray",
            expected="the extra 'ray'",
            found="no module ray",
            advice="install it with pip install 'sealmark[ray]', or leave --workers and --ray out",
        ) from None
    if ray.is_initialized():
        raise ParameterError("Ray is in use in this process", expected="no running ray.init", advice="shut it down")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told who issues models
    local = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
    try:
        # "local" where no address is given: the environment must not send secrets to a cluster
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise ServiceError(
            "Ray does not start", found=str(error).strip().splitlines()[0], advice="check --ray ADDRESS"
        ) from error
    try:
        yield ray, workers if workers > 1 else int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse a cluster that does not answer; Ray itself would try for a minute or more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        raise ParameterError("bad address of a cluster", expected="HOST:PORT", found=repr(address)[:80])
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(f"no cluster at {address}", found=error, advice="check --ray and the network") from None
