"""``issue``, ``trace``, ``revoke``: which user is this, who leaked it?"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.keeping import Where, keep_evidence, stem
from sealmark.cli.kinds import of_kind, suspect_of
from sealmark.cli.options import Architecture, Settings, command
from sealmark.cli.output import Output, facts, listing, note, p_text, size_of, tensor_progress
from sealmark.cli.ownership import Alpha, Device, EvidenceOut
from sealmark.cli.staging import Force, check_free, staged, write_out
from sealmark.core.errors import ParameterError, RevokedError

if TYPE_CHECKING:
    from sealmark.core.identity import Accusation, UserMark
    from sealmark.core.secret import Secret
    from sealmark.vault import Vault


@command
def issue(
    model: Annotated[Path, typer.Argument(help="Your unmarked model: a file or a folder of shards.")],
    user: Annotated[list[str], typer.Option(metavar="USER", help="Who gets a copy; repeat for more.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The copy; for several users a folder.")],
    secret: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In the vault; made at first, named after the model."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(metavar="NAME", help="For a model that is issued for the first time.")
    ] = "spread_spectrum",
    force: Force = False,
    *,
    settings: Settings,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Write copies of a model, each marked for its user, and note who got one."""
    from sealmark.core.weights import FileWeights
    from sealmark.vault.records import check_user

    users = [check_user(name) for name in user]
    targets = _targets(out, users, model, force=force)
    with where.open() as vault:
        _refuse_revoked(vault, users)
        name, key, mark, known = _user_secret(vault, model, secret, scheme, settings, network, users)
        copies: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            if len(users) > 1 and not out.exists():
                out.mkdir()
                stack.push(lambda *error: _remove_empty(out) if error[0] else None)
            for person, target in targets.items():
                work = stack.enter_context(staged(target, force=force, sources=(model,)))
                _write_copy(mark, model, work, key, person, network)
                copies[person] = FileWeights(work).digest()
            _record(vault, name, key, copies, known)
    document = {
        "secret": name,
        "commitment": key.commitment,
        "copies": [{"user": who, "out": str(targets[who]), "digest": copies[who]} for who in users],
    }
    rows = [[who, str(targets[who]), copies[who][:16]] for who in users]
    output.product(document, listing(["user", "copy", "digest"], rows))
    if not known:
        note(f"Made the secret {name!r}. Before you hand out a copy, publish: sealmark vault commitment {name}")


@command
def trace(
    suspect: Annotated[Path, typer.Argument(help="What leaked: a safetensors file or a folder of shards.")],
    secret: Annotated[str, typer.Option(metavar="NAME", help="That the copies were marked with.")],
    original: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Your unmarked model. With --task or --model, rearranged neurons are put back first.",
        ),
    ] = None,
    alpha: Alpha = 1e-6,
    commitment: Annotated[str | None, typer.Option(metavar="HEX", help="As published before release.")] = None,
    evidence_out: EvidenceOut = None,
    device: Device = "cpu",
    force: Force = False,
    *,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Who leaked it? Exit code 0 when somebody is accused, 1 when nobody is.

    The chance that anyone innocent is accused, over all users together, is at most --alpha.
    """
    if evidence_out is not None:
        check_free(evidence_out, force=force)
    from sealmark.core import registry
    from sealmark.core.identity import UserMark
    from sealmark.core.weights import weights_of
    from sealmark.formats.evidence import SuspectRecord

    with where.open() as vault:
        key = vault.secret(secret)
        scheme = of_kind(registry.scheme_of(key), UserMark, "trace", "identity")
        users = [record.user for record in vault.users(secret)]
        if not users:
            raise ParameterError("nobody has a copy", expected=f"users of {secret}", advice="issue copies first")
        task = network.load_task()
        seen = suspect_of(scheme.access, suspect, network, task=task, device=device)
        live = original is not None and network.given
        mine = network.load(task, original, device=device) if live and original else original
        found = scheme.trace(seen, key, users, alpha=alpha, original=mine, commitment=commitment)
        record = SuspectRecord(weights_of(suspect).digest(), suspect.name)
        data, number = keep_evidence(vault, found, record, subject=suspect.name)
        if evidence_out is not None:
            write_out(evidence_out, data, force=force)
    _show(found, number, output)


@command
def revoke(
    user: Annotated[str, typer.Argument(help="As issued.")],
    reason: Annotated[str, typer.Option(help="For people.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the signed revocation list.")] = None,
    force: Force = False,
    *,
    where: Where,
    output: Output,
) -> None:
    """Take a user's copies back: nothing is issued to them any more, and the signed list says so."""
    if out is not None:
        check_free(out, force=force)
    with where.open() as vault, vault.transaction():
        records = vault.revoke_user(user, reason)
        number, entries, data = _revocations(vault)
        if out is not None:
            write_out(out, data, force=force)
    rows = [[record.user, record.secret, record.revoked, record.reason] for record in records]
    output.product(
        {"user": user, "copies": len(records), "list": number, "entries": entries, "out": str(out or "")},
        listing(["user", "secret", "revoked", "reason"], rows),
    )
    if out is None:
        note("Publish the list of the revoked: sealmark revoke USER --out FILE writes it signed.")


def _show(found: Accusation, number: str, output: Output) -> None:
    """Print a trace, and exit with 1 when nobody is accused."""
    from sealmark.core.evidence import Verdict

    accused = [entry.user for entry in found.accused]
    rows = [
        [entry.user, f"{entry.statistic:.4g}", p_text(entry.log10_p), "yes" if entry.user in accused else "no"]
        for entry in found.ranking
    ]
    lines = {
        "verdict": found.verdict.value,
        "accused": ", ".join(accused) or "nobody",
        "bound": f"anyone innocent of {found.users} users is accused with chance at most {found.alpha:g}",
        "null": f"{found.null}, {found.basis.value}",
        "evidence": f"{number[:16]} in the vault",
    }
    table = listing(["user", "score", "p-value", "accused"], rows)
    output.product({**found.as_dict(), "evidence": number}, facts(lines), "", table)
    if found.verdict is Verdict.INCONCLUSIVE:
        note("Inconclusive: what can be read of this suspect cannot reach alpha, whoever leaked it.")
    if not accused:
        raise typer.Exit(1)


def _targets(out: Path, users: list[str], model: Path, *, force: bool) -> dict[str, Path]:
    """Where each user's copy goes: ``out`` itself for one user, or one each in the folder ``out``."""
    if len(set(users)) != len(users):
        raise ParameterError("a user twice", expected="each user once", found=users)
    suffix = "" if model.is_dir() else ".safetensors"
    targets = {user: out / f"{_file_name(user)}{suffix}" for user in users}
    if len(users) == 1 and not out.is_dir():
        targets = {users[0]: out}
    elif not out.is_dir():
        check_free(out, force=False)
    for target in targets.values():
        if target.parent.is_dir():
            check_free(target, force=force, sources=(model,))
    return targets


def _file_name(user: str) -> str:
    """A file name that no other user has."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", user).lstrip(".")
    return safe if safe == user else f"{safe[:80]}-{hashlib.sha256(user.encode()).hexdigest()[:8]}"


def _refuse_revoked(vault: Vault, users: list[str]) -> None:
    for record in vault.users():
        if record.user in users and record.revoked:
            raise RevokedError(
                f"{record.user} was revoked",
                found=f"{record.revoked} {record.reason}".strip(),
                advice="issue to another user, or ask the owner",
            )


def _user_secret(
    vault: Vault,
    model: Path,
    name: str | None,
    scheme: str,
    settings: Settings,
    network: Architecture,
    users: list[str],
) -> tuple[str, Secret, UserMark, bool]:
    """The secret for this model's users, its scheme, and whether the vault has it already."""
    from sealmark.core import registry
    from sealmark.core.identity import UserMark, WeightMark

    chosen = name or stem(model)
    if name is not None or any(record.name == chosen for record in vault.secrets()):
        key = vault.secret(chosen)
        mark = of_kind(registry.scheme_of(key), UserMark, "issue", "identity")
        return chosen, key, mark, True
    mark = of_kind(registry.scheme(scheme, **settings.parameters()), UserMark, "issue", "identity")
    owner = vault.verify_key.raw.hex()
    if isinstance(mark, WeightMark):
        return chosen, mark.enroll(model, users=users, owner=owner), mark, False
    task = network.load_task()
    return chosen, mark.enroll(network.load(task, model), task, users=users, owner=owner), mark, False


def _write_copy(mark: UserMark, model: Path, work: Path, key: Secret, user: str, network: Architecture) -> None:
    from sealmark.core.identity import WeightMark
    from sealmark.core.weights import save_model

    if isinstance(mark, WeightMark):
        with tensor_progress(f"issuing to {user}", size_of(model)) as progress:
            mark.issue_file(model, work, key, user, progress=progress)
    else:
        task = network.load_task()
        save_model(mark.issue(network.load(task, model), key, user, task=task).model, work)


def _record(vault: Vault, name: str, key: Secret, copies: dict[str, str], known: bool) -> None:
    """Note who got a copy; whoever had one got the very same again."""
    with vault.transaction():
        if not known:
            vault.add_secret(name, key)
        had = {record.user for record in vault.users(name)}
        for user, copy in copies.items():
            if user not in had:
                vault.issue_user(user, secret=name, model=str(key.facts["model"]), copy=copy)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _revocations(vault: Vault) -> tuple[int, list[dict[str, str]], bytes]:
    """The signed list of everything revoked so far; its number grows with every user's copy."""
    from sealmark.formats.envelope import verify_document
    from sealmark.formats.revocation import Revocation, RevocationList, sign_revocations
    from sealmark.formats.times import parse_utc

    revoked = [record for record in vault.users() if record.revoked]
    users = {record.user: record for record in revoked}
    # a copy is known by its digest, a license by its id
    named = [(record.copy or record.commitment, record) for record in revoked]
    for held in vault.licenses():
        if held.subject in users:
            body = verify_document(vault.document(held.id), "license", [vault.verify_key])
            named.append((str(body["id"]), users[held.subject]))
    entries = tuple(Revocation(number, parse_utc(record.revoked), record.reason) for number, record in named)
    data = sign_revocations(RevocationList(len(entries), entries), vault.signing_key)
    plain = [{"license": entry.license, "reason": entry.reason} for entry in entries]
    return len(entries), plain, data
