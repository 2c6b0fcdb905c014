"""What users get, on the disk: where it goes, what stands there already, and putting it in place.

A copy appears at its place only when the vault knows of it, together with its license. So whatever lies there
after a kill is whole and known, and the same command, run again, makes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealmark.cli.granting import Grant, Person, held_license, license_for
from sealmark.cli.keeping import stem
from sealmark.cli.staging import check_free
from sealmark.core.errors import ModelMismatchError, ParameterError, ServiceError

if TYPE_CHECKING:
    from sealmark.core.secret import Secret
    from sealmark.runtime.issuing import Copy, Order
    from sealmark.vault import Vault

_SUFFIXES = (".sealed", ".safetensors", ".credential")


@dataclass(frozen=True)
class Place:
    """Where one person's things go."""

    person: Person
    copy: Path
    license: Path


@dataclass(frozen=True)
class Delivery:
    """What a person has now, and until when; ``made`` tells whether it was there before."""

    user: str
    copy: str
    license: str
    digest: str
    expires: str
    made: bool


@dataclass(frozen=True)
class Job:
    """What is given to everyone.

    Attributes:
        name: of the secret in the vault.
        secret: that makes copies different.
        make: the copies, one by one as they get done.
        model: digest that licenses are for, where that is not the copy's own.
        lock: key of the lock that copies have, of the level that is granted.
    """

    name: str
    secret: Secret
    make: Callable[[list[Order]], Generator[Copy]]
    model: str = ""
    lock: Secret | None = None


def places(out: Path, persons: list[Person], suffix: str, *, one: bool) -> list[Place]:
    """Where things go: ``out`` itself and a license beside it for one person, else the folder ``out``.

    Args:
        out: of the command line.
        persons: all of them.
        suffix: of copies that are not sealed.
        one: whether one person's copy may be ``out`` itself.

    Raises:
        ParameterError: the folder for several is a file, or the folder above is missing.
    """
    if not out.parent.is_dir():
        raise ParameterError(f"cannot write {out}", expected="an existing folder", found=f"no {out.parent}")
    if one and not out.is_dir():
        return [Place(persons[0], out, out.with_name(f"{_bare(out)}.lic"))]
    if out.exists() and not out.is_dir():
        check_free(out, force=False)
    names = {person.name: file_name(person.name) for person in persons}
    alike = {file.casefold(): user for user, file in names.items()}
    if len(alike) < len(names):
        lost = next(user for user, file in names.items() if alike[file.casefold()] != user)
        raise ParameterError(
            "two users would share a file", expected="names that differ more", found=repr(lost)[:80]
        )
    return [
        Place(person, out / f"{name}{'.sealed' if person.to else suffix}", out / f"{name}.lic")
        for person, name in ((person, names[person.name]) for person in persons)
    ]


def deliver(
    vault: Vault, job: Job, grant: Grant, wanted: list[Place], work: Path, *, force: bool, sources: tuple[Path, ...]
) -> Generator[Delivery]:
    """Everybody's copy and license, one by one: what stands is kept, the rest is made.

    Args:
        vault: is told of each before it appears.
        job: what is made.
        grant: the rights.
        wanted: for whom, and where to.
        work: a hidden folder beside the copies, to make them in; what a killed run left there goes first.
        force: make everything anew.
        sources: what must not be replaced.

    Raises:
        ParameterError: something else is in the way; nothing was begun then.
        ServiceError: the disk is full, or the vault is busy; what was told of stands.
    """
    had = {record.user: record.copy for record in vault.users(job.name)} if _knows(vault, job) else {}
    kept: dict[str, bytes] = {}
    for place in wanted:
        user = place.person.name
        data = b"" if force else _standing(vault, job, grant, place, had.get(user, ""))
        if data:
            kept[user] = data
            continue
        for path in (place.copy, place.license):
            if path.parent.is_dir():
                check_free(path, force=force, sources=sources)
    todo = {place.person.name: place for place in wanted if place.person.name not in kept}
    with _folder(work):
        for place in wanted:
            if place.person.name in kept:
                yield _kept(vault, place, kept[place.person.name], had[place.person.name], work)
        with contextlib.closing(job.make(_orders(work, todo))) as copies:
            for copy in copies:
                yield _hand_over(vault, job, grant, todo[copy.user], copy, had.get(copy.user, ""))


def workplace(out: Path, *, one: bool) -> Path:
    """Where copies are made that go to ``out``."""
    return out.with_name(f".{out.name}.issuing") if one and not out.is_dir() else out / ".issuing"


def file_name(user: str) -> str:
    """A file name for a user; `places` refuses two that are alike."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", user).lstrip(".")
    return safe if safe == user else f"{safe[:80]}-{hashlib.sha256(user.encode()).hexdigest()[:8]}"


def put(place: Path, data: bytes, folder: Path) -> None:
    """Put a small file at its place at once."""
    from sealmark.core.files import atomic_write

    part = folder / place.name
    with atomic_write(part) as file:
        file.write(data)
    move(part, place)


def move(part: Path, place: Path) -> None:
    """Rename.

    Raises:
        ServiceError: the disk refuses.
    """
    try:
        part.replace(place)
    except OSError as error:
        raise ServiceError(f"cannot write {place}", found=error.strerror) from error


def put_all(files: dict[Path, bytes], work: Path) -> None:
    """Put many small files at their places: one sync for all, for one each would take most of the time.

    Raises:
        ServiceError: the disk is full or refuses.
    """
    with _folder(work):
        parts = {place: work / f"{turn}.part" for turn, place in enumerate(files)}
        try:
            for place, data in files.items():
                parts[place].write_bytes(data)
        except OSError as error:
            raise ServiceError(f"cannot write to {work.parent}", found=error.strerror) from error
        os.sync()
        for place, part in parts.items():
            move(part, place)


def _hand_over(vault: Vault, job: Job, grant: Grant, place: Place, copy: Copy, known: str) -> Delivery:
    """Tell the vault of a copy that is whole, then put it and its license in place."""
    from sealmark.runtime.issuing import Copy, seal_copy

    user, folder, ready = copy.user, copy.target.parent, copy.target
    if known not in ("", copy.digest):
        raise ModelMismatchError(
            f"this is not the copy that {user} got before",
            expected=known,
            found=copy.digest,
            advice="check --secret",
        )
    data_key = None
    if place.person.to is not None and not job.model:
        data_key, ready = _data_key(job, user), folder / f"{copy.target.name}.sealed"
        seal_copy(Copy(user, copy.target, copy.digest), ready, data_key)
    with vault.transaction():
        if not _knows(vault, job):
            vault.add_secret(job.name, job.secret)
        if not known:
            vault.issue_user(user, secret=job.name, model=str(job.secret.facts["model"]), copy=copy.digest)
        data = license_for(
            vault, place.person, grant, model=job.model or copy.digest, scheme=job.secret.scheme,
            data_key=data_key, key=job.lock, mark=job.secret.commitment,
        )  # fmt: skip
    move(ready, place.copy)
    put(place.license, data, folder)
    return Delivery(user, str(place.copy), str(place.license), copy.digest, _end(vault, data), made=True)


def _standing(vault: Vault, job: Job, grant: Grant, place: Place, digest: str) -> bytes:
    """A person's license, if the copy is there as the vault noted it, each byte, and no other license is."""
    from sealmark.runtime.issuing import stands

    sealed = place.person.to is not None and not job.model
    key = _data_key(job, place.person.name) if sealed else None
    if not digest or not place.copy.exists() or not stands(place.copy, digest, key):
        return b""
    data = held_license(vault, place.person, grant, job.model or digest)
    return data if not place.license.exists() or place.license.read_bytes() == data else b""


def _kept(vault: Vault, place: Place, data: bytes, digest: str, folder: Path) -> Delivery:
    if not place.license.exists():  # a kill came between the copy and its license
        put(place.license, data, folder)
    return Delivery(place.person.name, str(place.copy), str(place.license), digest, _end(vault, data), made=False)


def _end(vault: Vault, data: bytes) -> str:
    """When a license of this vault ends."""
    from sealmark.formats.license import verify_license
    from sealmark.formats.times import utc_text

    last = verify_license(data, [vault.verify_key]).rights.not_after
    return utc_text(last) if last else "never"


def _data_key(job: Job, user: str) -> bytes:
    """The key of a user's sealed copy: it follows from the secret, so that no copy in the making is lost."""
    return job.secret.key(f"sealed copy/{user}")


def _knows(vault: Vault, job: Job) -> bool:
    return any(record.name == job.name for record in vault.secrets())


def _orders(folder: Path, todo: dict[str, Place]) -> list[Order]:
    from sealmark.runtime.issuing import Order

    return [Order(user, folder / place.copy.name) for user, place in todo.items()]


@contextlib.contextmanager
def _folder(work: Path) -> Iterator[None]:
    """An empty folder while the block runs."""
    made = not work.parent.exists()
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ServiceError(f"cannot write to {work.parent}", found=error.strerror) from error
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                work.parent.rmdir()


def _bare(out: Path) -> str:
    name = out.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name or stem(out)
