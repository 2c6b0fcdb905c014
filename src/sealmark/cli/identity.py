"""``issue``, ``revoke``: who has which copy?"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.copies import Delivery, Job, deliver, places, workplace
from sealmark.cli.credentials import credential_job
from sealmark.cli.granting import Grant, Person, people
from sealmark.cli.keeping import Where, stem
from sealmark.cli.kinds import of_kind
from sealmark.cli.licenses import hand_out_keys, key_of_level
from sealmark.cli.options import Architecture, Settings, command
from sealmark.cli.output import Output, listing, note, size_of, tensor_progress
from sealmark.cli.staging import Force, check_free, write_out
from sealmark.core.errors import ParameterError, RevokedError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Generator

    from sealmark.core.identity import UserMark
    from sealmark.core.secret import Secret
    from sealmark.runtime.issuing import Copy, Order
    from sealmark.vault import Vault


@dataclass(frozen=True)
class Crew:
    """Who makes the copies."""

    workers: Annotated[int, typer.Option(min=1, help="Copies at a time; more than one takes Ray.")] = 1
    ray: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster that you trust.")] = None

    @property
    def given(self) -> bool:
        """Whether Ray is asked for."""
        return self != Crew()


@command
def issue(
    model: Annotated[Path, typer.Argument(help="Your unmarked model: a file or a folder of shards.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The copy; for several users a folder.")],
    user: Annotated[
        list[str] | None, typer.Option(metavar="USER", help="Who gets a copy; repeat for more.")
    ] = None,
    users_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A user a line; after a tab, perhaps, the recipient."),
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In the vault; made at first, named after the model."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(metavar="NAME", help="For a model that is issued for the first time.")
    ] = "spread_spectrum",
    force: Force = False,
    *,
    grant: Grant,
    crew: Crew,
    settings: Settings,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Give users a copy of a model, marked for each of them, and a license.

    The license lies beside the copy, as USER.lic or like the copy with .lic at its end. A copy appears when it
    is whole and the vault knows of it: run the same command again after a failure and it makes what is missing.
    With --lock-key the model is a locked one, and each license opens its lock to the level that is granted.
    With the secret of a scheme of credentials, users get these instead.
    """
    persons = people(user or [], users_file, grant)
    one = len(persons) == 1 and users_file is None
    with where.open() as vault:
        _refuse_revoked(vault, persons)
        if grant.license_only:
            hand_out_keys(vault, model, persons, grant, out, output, one=one, force=force)
            return
        lock = None
        if grant.lock_key is not None:
            lock, grant = key_of_level(vault, model, persons, grant)
        job, suffix, known = _job(vault, model, secret, scheme, settings, network, persons, crew)
        job = replace(job, lock=lock)
        if lock is not None and job.model:
            raise UnsupportedError("credentials are for a model that is served", expected="no --lock-key")
        wanted = places(out, persons, suffix, one=one)
        steps = deliver(vault, job, grant, wanted, workplace(out, one=one), force=force, sources=(model,))
        with contextlib.closing(steps):
            found = {delivery.user: delivery for delivery in steps}
    _show([found[person.name] for person in persons], job, output)
    if not known:
        note(f"Made the secret {job.name!r}. Before you hand out a copy: sealmark vault commitment {job.name}")


@command
def revoke(
    name: Annotated[
        str | None, typer.Argument(metavar="[USER|ID]", help="A user, or one license; nobody new without.")
    ] = None,
    reason: Annotated[str, typer.Option(help="For people.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the signed revocation list.")] = None,
    after: Annotated[
        int, typer.Option(min=0, help="Number of the last list, where this vault came from a backup.")
    ] = 0,
    force: Force = False,
    *,
    where: Where,
    output: Output,
) -> None:
    """Take a user's copies and licenses back, and he gets no others; or one license, by its id.

    The signed list says so, once it is written and published.
    """
    if name is None and out is None:
        raise ParameterError("who is revoked?", expected="a user, the id of a license, or --out FILE", found="none")
    if out is not None:
        check_free(out, force=force)
    with where.open() as vault, vault.transaction():
        rows = [] if name is None else _taken_back(vault, name, reason)
        document: dict[str, object] = {"list": None, "entries": []}
        if out is not None:
            data = vault.revocation_list(after=after)
            document = _listed(data, vault)
            write_out(out, data, force=force)
    kinds = [row[0] for row in rows]
    told = {"name": name, "copies": kinds.count("copy"), "licenses": kinds.count("license"), "out": str(out or "")}
    output.product(told | document, listing(["what", "of", "revoked", "reason"], rows))
    if out is None:
        note("Publish the list of the revoked: sealmark revoke --out FILE writes it signed.")


def _taken_back(vault: Vault, name: str, reason: str) -> list[list[str]]:
    """What was revoked: one license, or all that a user has."""
    with contextlib.suppress(UnknownNameError):
        vault.license_record(name)
        record = vault.revoke_license(name, reason)
        return [["license", record.id, record.revoked, record.reason]]
    rows = [["copy", record.secret, record.revoked, record.reason] for record in vault.revoke_user(name, reason)]
    licenses = vault.license_records(name)
    return rows + [["license", record.id, record.revoked, record.reason] for record in licenses]


def _job(
    vault: Vault,
    model: Path,
    name: str | None,
    scheme: str,
    settings: Settings,
    network: Architecture,
    persons: list[Person],
    crew: Crew,
) -> tuple[Job, str, bool]:
    """What is made for everyone, the suffix of its files, and whether the vault has its secret already."""
    from sealmark.core import registry
    from sealmark.core.credentials import CredentialMark
    from sealmark.core.identity import UserMark, WeightMark

    chosen = name or stem(model)
    known = name is not None or any(record.name == chosen for record in vault.secrets())
    if known:
        key = vault.secret(chosen)
        made = registry.scheme_of(key)
        if isinstance(made, CredentialMark):
            _refuse_crew(crew, made.name)
            if any(person.to for person in persons):
                raise UnsupportedError(f"{made.name} encrypts nothing", expected="no recipient", found="--to")
            return credential_job(chosen, key, made, model, network), ".credential", True
    else:
        made = registry.scheme(scheme, **settings.parameters())
    mark = of_kind(made, UserMark, "issue", "identity")
    if not isinstance(mark, WeightMark):
        _refuse_crew(crew, mark.name)
    if not known:
        key = _enroll(vault, mark, model, network, [person.name for person in persons])

    def make(orders: list[Order]) -> Generator[Copy]:
        return _copies(mark, model, key, orders, network, crew)

    return Job(chosen, key, make), "" if model.is_dir() else ".safetensors", known


def _enroll(vault: Vault, mark: UserMark, model: Path, network: Architecture, users: list[str]) -> Secret:
    from sealmark.core.identity import WeightMark

    owner = vault.verify_key.raw.hex()
    if isinstance(mark, WeightMark):
        return mark.enroll(model, users=users, owner=owner)
    task = network.load_task()
    return mark.enroll(network.load(task, model), task, users=users, owner=owner)


def _copies(
    mark: UserMark, model: Path, key: Secret, orders: list[Order], network: Architecture, crew: Crew
) -> Generator[Copy]:
    """The copies that were ordered, as they get done."""
    from sealmark.core.identity import WeightMark
    from sealmark.core.weights import FileWeights, save_model
    from sealmark.runtime.issuing import Copy, issue_copies

    if isinstance(mark, WeightMark):
        size, told = size_of(model), not crew.given
        with tensor_progress("issuing", len(orders) * size) as progress:
            for copy in issue_copies(
                mark,
                model,
                key,
                orders,
                workers=crew.workers,
                address=crew.ray,
                progress=progress if told else None,
            ):
                if not told:  # workers tell of whole copies alone
                    progress(copy.user, size)
                yield copy
        return
    task = network.load_task()
    for order in orders:
        save_model(mark.issue(network.load(task, model), key, order.user, task=task).model, order.target)
        yield Copy(order.user, order.target, FileWeights(order.target).digest())


def _refuse_crew(crew: Crew, scheme: str) -> None:
    if crew.given:
        raise UnsupportedError(
            f"{scheme} runs the network",
            expected="no --workers and no --ray",
            advice="marks on weights take workers",
        )


def _refuse_revoked(vault: Vault, persons: list[Person]) -> None:
    revoked = vault.revoked_users()
    for person in persons:
        if person.name in revoked:
            raise RevokedError(
                f"{person.name} was revoked",
                found=revoked[person.name],
                advice="issue to another user, or ask the owner",
            )


def _show(found: list[Delivery], job: Job, output: Output) -> None:
    document = {
        "secret": job.name,
        "commitment": job.secret.commitment,
        "copies": [asdict(delivery) for delivery in found],
    }
    rows = [[d.user, d.copy, d.license, d.digest[:16], d.expires, "made" if d.made else "stands"] for d in found]
    output.product(document, listing(["user", "copy", "license", "digest", "expires", ""], rows))


def _listed(data: bytes, vault: Vault) -> dict[str, object]:
    """A signed list as plain JSON."""
    from sealmark.formats.revocation import read_revocations

    found = read_revocations(data, [vault.verify_key])
    entries = [{"license": entry.license, "reason": entry.reason} for entry in found.entries]
    return {"list": found.number, "entries": entries}
