"""``init`` and the group ``vault``: the owner's folder of keys, secrets, users and evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sealmark.cli.keeping import Where, first_line
from sealmark.cli.options import command
from sealmark.cli.output import Output, facts, listing, note
from sealmark.cli.staging import Force, check_free, write_out
from sealmark.core.errors import ParameterError

app = typer.Typer(no_args_is_help=True, help="Look into the vault, back it up, take things out.")

_PublicOut = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there, too.")]
_Out = Annotated[Path, typer.Option("--out", metavar="PATH", help="Where to write it.")]


@command
def init(*, where: Where, output: Output) -> None:
    """Make a vault: signing key, recipient key, and room for secrets, users and evidence.

    With --key-file FILE a key file opens it; FILE is made if it is not there.
    """
    from sealmark.vault import Vault, write_key_file

    if where.vault.exists() and any(where.vault.iterdir() if where.vault.is_dir() else [where.vault]):
        raise ParameterError(
            f"{where.vault} is there already", expected="a new folder", advice="choose another --vault"
        )
    made = where.key_file is not None and not where.key_file.exists()
    opener = where.opener(new=True)
    try:
        if made:
            write_key_file(opener["key_file"])
        with Vault.create(where.vault, **opener) as vault:
            public = vault.public()
    except BaseException:
        if made:
            opener["key_file"].unlink(missing_ok=True)
        raise
    output.product(
        {"vault": str(where.vault), **public},
        facts({"vault": where.vault, "verify key": public["verify"], "recipient": public["recipient"]}),
    )
    note("Both keys are public: the first checks your signatures, the second seals files for you.")
    note("Back the vault up, and keep what opens it somewhere else.")


@app.command("list")
@command
def list_contents(*, where: Where, output: Output) -> None:
    """List what the vault holds; nothing secret is shown."""
    with where.open() as vault:
        contents, public = vault.contents(), vault.public()
    parts: list[Any] = [facts({"verify key": public["verify"], "recipient": public["recipient"]})]
    columns = {
        "secrets": ["name", "scheme", "commitment", "model"],
        "users": ["user", "secret", "issued", "revoked", "reason"],
        "evidence": ["id", "kind", "subject", "added"],
        "licenses": ["id", "user", "model", "level", "not_after", "revoked"],
    }
    for part, names in columns.items():
        rows = [[_short(name, record[name]) for name in names] for record in contents[part]]
        parts += ["", f"{part}: {len(rows)}", *([listing(names, rows)] if rows else [])]
    output.product({**contents, "public": public}, *parts)


@app.command()
@command
def export(
    out: _Out,
    secret: Annotated[str | None, typer.Option(help="Only this secret or key.")] = None,
    document: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only this document; the start of its id will do."),
    ] = None,
    identity: Annotated[bool, typer.Option("--identity", help="Only your private recipient key.")] = False,
    force: Force = False,
    *,
    where: Where,
    output: Output,
) -> None:
    """Take things out, in the clear: everything to a new folder, or one thing to a file."""
    from sealmark.vault import export_all

    if (secret is not None) + (document is not None) + identity > 1:
        raise ParameterError("what to export?", expected="at most one of --secret, --document, --identity")
    check_free(out, force=force)
    with where.open() as vault:
        if secret is not None:
            vault.export_secret(secret, out)
        elif document is not None:
            write_out(out, find_document(vault, document), force=force)
        elif identity:
            write_out(out, vault.identity.reveal().encode() + b"\n", force=force, mode=0o600)
        else:
            export_all(vault, out)
    output.product({"out": str(out)}, str(out))
    if document is None:
        note("It is not encrypted any more: guard it.")


@app.command()
@command
def backup(out: _Out, force: Force = False, *, where: Where, output: Output) -> None:
    """Write an encrypted copy of the whole vault to one file."""
    check_free(out, force=force)
    with where.open() as vault:
        vault.backup(out)
    output.product({"out": str(out)}, str(out))


@app.command()
@command
def restore(
    backup: Annotated[Path, typer.Argument(help="What `vault backup` wrote.")], *, where: Where, output: Output
) -> None:
    """Make the vault anew from a backup, once every byte of it was checked."""
    from sealmark.vault import Vault

    with Vault.restore(backup, where.vault, **where.opener()) as vault:
        contents = vault.contents()
    counts = {name: len(records) for name, records in contents.items()}
    output.product({"vault": str(where.vault), **counts}, facts({"vault": where.vault, **counts}))


@app.command()
@command
def commitment(
    name: Annotated[str, typer.Argument(help="Of the secret.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it signed.")] = None,
    force: Force = False,
    *,
    where: Where,
    output: Output,
) -> None:
    """Print a secret's commitment, to be published before the model is released."""
    if out is not None:
        check_free(out, force=force)
    with where.open() as vault:
        value = vault.secret(name).commitment
        if out is not None:
            write_out(out, vault.publish_commitment(name), force=force)
    output.product({"secret": name, "commitment": value}, value)


@app.command()
@command
def recipient(out: _PublicOut = None, force: Force = False, *, where: Where, output: Output) -> None:
    """Print your public recipient key: whoever has it can encrypt for you."""
    _publish("recipient", out, force, where, output)


@app.command("verify-key")
@command
def verify_key(out: _PublicOut = None, force: Force = False, *, where: Where, output: Output) -> None:
    """Print your public verify key: whoever has it can check what you sign."""
    _publish("verify", out, force, where, output)


def _publish(name: str, out: Path | None, force: bool, where: Where, output: Output) -> None:
    if out is not None:
        check_free(out, force=force)
    with where.open() as vault:
        value = vault.public()[name]
    if out is not None:
        write_out(out, value.encode() + b"\n", force=force)
    output.product({name: value}, value)


@app.command()
@command
def rekey(
    new_passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line will open the vault.")
    ] = None,
    new_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This key file will open the vault.")
    ] = None,
    *,
    where: Where,
    output: Output,
) -> None:
    """Open the vault with another passphrase or key file from now on; old backups keep theirs."""
    passphrase = None if new_passphrase_file is None else first_line(new_passphrase_file)
    with where.open() as vault:
        vault.change_opener(passphrase=passphrase, key_file=new_key_file)
    output.product({"vault": str(where.vault)}, str(where.vault))


def find_document(vault: Any, number: str) -> bytes:
    """A document by its id or the start of it.

    Raises:
        ParameterError: none, or several.
    """
    licenses = [record.id for record in vault.license_records()]
    known = [*(record.id for record in vault.evidence()), *licenses]
    found = [each for each in known if number and each.startswith(number)]
    if len(found) != 1:
        raise ParameterError(
            "which document?",
            expected="a file, or the start of one id in the vault",
            found=f"{number!r}, which fits {len(found)}",
            advice="list the ids: sealmark vault list",
        )
    data: bytes = (vault.license_document if found[0] in licenses else vault.document)(found[0])
    return data


def _short(column: str, value: str) -> str:
    return value[:16] if column in ("id", "commitment", "model") else value
