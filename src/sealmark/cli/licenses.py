"""``open``, ``renew``, ``list``, ``device``: licenses, on both sides."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.authorization import FILE_PASSPHRASE
from sealmark.cli.copies import file_name, put_all, workplace
from sealmark.cli.granting import (
    Device,
    Feature,
    Grant,
    Level,
    Person,
    Seats,
    held_license,
    key_text,
    license_for,
    moment,
)
from sealmark.cli.keeping import Where, ask_passphrase, first_line
from sealmark.cli.kinds import of_kind
from sealmark.cli.options import Architecture, command
from sealmark.cli.output import Output, facts, listing, note
from sealmark.cli.staging import Force, check_free, write_out
from sealmark.core.errors import ModelMismatchError, ParameterError

if TYPE_CHECKING:
    from sealmark.core.secret import Secret
    from sealmark.crypto.recipients import Identity, Passphrase
    from sealmark.crypto.signing import VerifyKey
    from sealmark.runtime.licensed import Opened
    from sealmark.vault import LicenseRecord, Vault


@command
def open_(
    model: Annotated[Path, typer.Argument(help="Your copy: a sealed file, a folder of them, or safetensors.")],
    license: Annotated[Path, typer.Option(metavar="FILE", help="As you got it.")],  # noqa: A002 - the word for it
    identity: Annotated[Path | None, typer.Option(metavar="FILE", help="Your private recipient key.")] = None,
    with_passphrase: Annotated[
        bool, typer.Option("--with-passphrase", help=f"A passphrase opens it: ${FILE_PASSPHRASE}, or a prompt.")
    ] = False,
    anchor: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="The owner's verify key, a text or a file; your own vault's without."),
    ] = None,
    revocations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The owner's newest list of the revoked.")
    ] = None,
    *,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Open a copy with a license, in memory, and say what it is; with --task, how well it does.

    A refusal names its reason: MODEL_MISMATCH, DEVICE_MISMATCH, EXPIRED, REVOKED ...
    """
    from sealmark.runtime.licensed import open as open_licensed

    opened = open_licensed(
        model,
        license,
        anchors=_anchors(anchor or [], where),
        opener=_opener(identity, with_passphrase),
        revocations=revocations,
    )
    document = _told(opened, network)
    output.product(document, facts({name: value for name, value in document.items() if value not in ("", [])}))


@command
def renew(
    name: Annotated[str, typer.Argument(metavar="USER|ID", help="A user with one license, or a license's id.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new license.")],
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="A day, a time, as 30d or 1y, or never; as it was without.")
    ] = None,
    level: Level = None,
    feature: Feature = None,
    seats: Seats = None,
    device: Device = None,
    force: Force = False,
    *,
    where: Where,
    output: Output,
) -> None:
    """Issue a license again, with another end and whatever else is named; keys and all that is not named stay.

    The copy needs no change. Where the new license grants less, the next signed list of the revoked takes
    the old one back.
    """
    check_free(out, force=force)
    with where.open() as vault, vault.transaction():
        before = vault.license_to_renew(name)
        end = before.not_after or None if expires is None else expires
        signed = vault.renew_license(
            name,
            not_after=None if end == "never" else moment(end, end=True),
            level=level,
            seats=seats,
            features=feature,
            devices=device,
        )
        write_out(out, signed.data, force=force)
    record = signed.record
    lines = {
        "license": out,
        "id": record.id,
        "user": record.user,
        "expires": record.not_after or "never",
        "before": before.not_after or "never",
    }
    output.product({"out": str(out), **asdict(record)}, facts(lines))
    if record.superseded == record.issued:
        note(
            "Some of what was granted before is gone. To take it back, publish the list: sealmark revoke --out FILE"
        )


@command
def list_(
    user: Annotated[str | None, typer.Option(help="Of this user only.")] = None,
    *,
    where: Where,
    output: Output,
) -> None:
    """List licenses: who may use which copy, until when, and whether it still holds."""
    with where.open() as vault:
        records = vault.license_records(user)
    document = [{**asdict(record), "status": record.status()} for record in records]
    columns = ["user", "id", "model", "level", "expires", "devices", "status"]
    output.product({"licenses": document}, listing(columns, [_row(record) for record in records]))


@command
def device(*, output: Output) -> None:
    """Print an id of this machine, for the owner of a model to bind your license to.

    It tells nothing about the machine to whoever does not know it.
    """
    from sealmark.runtime.device import device_id

    number = device_id()
    output.product({"device": number}, number)


def hand_out_keys(
    vault: Vault,
    model: Path,
    persons: list[Person],
    grant: Grant,
    out: Path,
    output: Output,
    *,
    one: bool,
    force: bool,
) -> None:
    """Licenses with the key of a lock, of the level that is granted. The locked model is the same for all.

    Args:
        vault: has the lock's key.
        model: as it was locked.
        persons: who gets a license.
        grant: the lock's key and the rights.
        out: a file for one, a folder for several.
        output: of the command.
        one: whether ``out`` is the license itself.
        force: whether files may be replaced.

    Raises:
        ParameterError: somebody has no recipient, no such level, or something is in the way.
        ModelMismatchError: the model is not locked.
    """
    from sealmark.core.weights import FileWeights

    key, named = key_of_level(vault, model, persons, grant)
    scheme, digest = key.scheme, FileWeights(model).digest()
    folder = None if one and not out.is_dir() else out
    files = {person.name: folder / f"{file_name(person.name)}.lic" if folder else out for person in persons}
    if not out.parent.is_dir():
        raise ParameterError(f"cannot write {out}", expected="an existing folder", found=f"no {out.parent}")
    for person in persons:
        file = files[person.name]
        held = held_license(vault, person, named, digest) if file.is_file() and not force else b""
        if file.parent.is_dir() and not (held and file.read_bytes() == held):
            check_free(file, force=force, sources=(model,))
    with vault.transaction():
        made = {
            person.name: license_for(vault, person, named, model=digest, scheme=scheme, key=key)
            for person in persons
        }
    # the vault has them: what a kill keeps from its place, the same command puts there
    put_all({files[user]: data for user, data in made.items()}, workplace(out, one=one))
    document = {
        "key": grant.lock_key,
        "model": digest,
        "licenses": {user: str(file) for user, file in files.items()},
    }
    output.product(document, listing(["user", "license"], [[user, str(file)] for user, file in files.items()]))
    note("The locked model is the same for all and carries no mark; without --license-only each copy has one.")


def key_of_level(vault: Vault, model: Path, persons: list[Person], grant: Grant) -> tuple[Secret, Grant]:
    """The lock's key of the level that is granted, and the grant with that level.

    Raises:
        ParameterError: somebody has no recipient, or no such level.
        ModelMismatchError: the model is not locked.
        UnsupportedError: it is no lock's key.
    """
    from sealmark.core import registry
    from sealmark.core.lock import Lock
    from sealmark.core.weights import FileWeights

    if grant.lock_key is None:
        raise ParameterError("--license-only hands out the key of a lock", expected="--lock-key NAME", found="none")
    key = vault.secret(grant.lock_key)
    lock = of_kind(registry.scheme_of(key), Lock, "hand out keys", "authorization")
    missing = [person.name for person in persons if person.to is None]
    if missing:
        raise ParameterError("a key for nobody", expected="--to RECIPIENT", found=f"none for {missing[:5]}")
    level = grant.level or str(lock.levels)
    if not level.isdecimal():
        raise ParameterError("bad level of a lock", expected=f"1 to {lock.levels}", found=repr(level)[:40])
    if FileWeights(model).digest() == key.facts["model"]:
        raise ModelMismatchError(
            "this model is not locked", expected=f"what {grant.lock_key} locked", found="the model before it",
            advice="pass the output of sealmark lock",
        )  # fmt: skip
    return lock.graded(key, int(level)), replace(grant, level=level)


def _told(opened: Opened, network: Architecture) -> dict[str, object]:
    """What a license opened."""
    from sealmark.formats.times import utc_text

    granted, rights = opened.license, opened.license.rights
    document: dict[str, object] = {
        "user": granted.user,
        "license": granted.id,
        "model": granted.model,
        "level": rights.level,
        "expires": utc_text(rights.not_after) if rights.not_after else "never",
        "features": list(rights.features),
        "tensors": len(opened.weights),
        "parameters": sum(info.count for info in opened.weights.info.values()),
        "lock": opened.key.scheme if opened.key else "",
    }
    task = network.load_task()
    if task is not None:
        import numpy as np

        model = opened.load_into(network.build(task, rng=np.random.default_rng(0)), resize=True)
        document["accuracy"] = round(task.score(model), 4)
    return document


def _anchors(texts: list[str], where: Where) -> list[VerifyKey]:
    from sealmark.crypto.signing import VerifyKey

    if texts:
        return [VerifyKey.parse(key_text(text, "verify key")) for text in texts]
    if not where.is_there:
        raise ParameterError(
            "whose licenses do you trust?", expected="--anchor KEY", found="no vault here",
            advice="ask the owner for the verify key, on another way than the license came",
        )  # fmt: skip
    with where.open() as vault:
        return [vault.verify_key]


def _opener(identity: Path | None, with_passphrase: bool) -> Identity | Passphrase | None:
    from sealmark.crypto.recipients import Identity, Passphrase

    if identity is not None and with_passphrase:
        raise ParameterError("what opens it?", expected="one of --identity, --with-passphrase")
    if identity is not None:
        return Identity.parse(first_line(identity))
    return Passphrase(ask_passphrase("Passphrase of the license", FILE_PASSPHRASE)) if with_passphrase else None


def _row(record: LicenseRecord) -> list[str]:
    devices, expires = str(len(record.devices) or "any"), record.not_after or "never"
    return [record.user, record.id, record.model[:16], record.level, expires, devices, record.status()]
