"""``lock``, ``unlock``: may this person use it?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.keeping import SecretChoice, Where, ask_passphrase, first_line, name_for
from sealmark.cli.kinds import of_kind
from sealmark.cli.options import Architecture, Settings, command
from sealmark.cli.output import Output, byte_progress, console, facts, note, size_of, tensor_progress
from sealmark.cli.staging import Force, check_free, staged
from sealmark.core.errors import FormatError, ParameterError, UnsupportedError, WrongKeyError

if TYPE_CHECKING:
    from sealmark.core.lock import Lock
    from sealmark.core.secret import Secret
    from sealmark.crypto.recipients import Passphrase, Recipient
    from sealmark.formats.sealed import Opener
    from sealmark.vault import Vault

FILE_PASSPHRASE = "SEALMARK_FILE_PASSPHRASE"  # noqa: S105 - the name of a variable
_WithPassphrase = Annotated[
    bool, typer.Option("--with-passphrase", help=f"A passphrase opens the file: ${FILE_PASSPHRASE}, or a prompt.")
]


@command
def lock(
    model: Annotated[Path, typer.Argument(help="A safetensors file or a folder of shards.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The locked model, as you ship it.")],
    scheme: Annotated[
        str, typer.Option(metavar="NAME", help="sealed encrypts; see `sealmark schemes`.")
    ] = "sealed",
    name: Annotated[str | None, typer.Option(help="Your name for the key; the output's without.")] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="RECIPIENT", help="Who may open it: a text or a file; repeat for more."),
    ] = None,
    with_passphrase: _WithPassphrase = False,
    force: Force = False,
    *,
    settings: Settings,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Lock a model: without its key it is useless. The key goes to the vault.

    A lock that needs data takes the network and the rows of --task.
    """
    check_free(out, force=force, sources=(model,))
    from sealmark.core import registry
    from sealmark.core.lock import Lock

    made = of_kind(registry.scheme(scheme, **settings.parameters()), Lock, "lock", "authorization")
    openers = _openers(to or [], with_passphrase)
    if openers and made.name != "sealed":
        raise UnsupportedError(
            f"{made.name} takes no recipients", expected="--scheme sealed", advice="hand out its key instead"
        )
    with where.open() as vault:
        chosen = name_for(vault, name, out)
        with staged(out, force=force, sources=(model,)) as work:
            key = _lock(made, model, work, network, vault.verify_key.raw.hex())
            for file in _sealed_files(work) if openers else []:
                _admit(file, key, openers)
            vault.add_secret(chosen, key)
    output.product(
        {
            "out": str(out),
            "scheme": made.name,
            "key": chosen,
            "commitment": key.commitment,
            "openers": len(openers),
        },
        facts({"locked model": out, "scheme": made.name, "key": f"{chosen} in {where.vault}"}),
    )


def _lock(made: Lock, model: Path, work: Path, network: Architecture, owner: str) -> Secret:
    if not made.needs_data:
        with tensor_progress("locking", size_of(model)) as progress:
            return made.lock_file(model, work, owner=owner, progress=progress)
    from sealmark.core.weights import save_model

    task = network.load_task()
    if task is None:
        raise ParameterError(f"{made.name} needs data", expected="--task NAME", advice="see sealmark tasks")
    plain = network.load(task, model)
    with console(stderr=True).status(f"{made.name} ..."):
        locked = made.lock(plain, task, owner=owner)
    save_model(locked.model, work)
    return locked.key


@command
def unlock(
    locked: Annotated[Path, typer.Argument(help="A locked file or folder.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The usable model.")],
    identity: Annotated[Path | None, typer.Option(metavar="FILE", help="Your private recipient key.")] = None,
    with_passphrase: _WithPassphrase = False,
    force: Force = False,
    *,
    choice: SecretChoice,
    where: Where,
    output: Output,
) -> None:
    """Unlock a model with its key, your identity or a passphrase.

    Without any of these the vault is asked: for the key of a sealed file, then for your identity.
    """
    check_free(out, force=force, sources=(locked,))
    if choice.given + (identity is not None) + with_passphrase > 1:
        raise ParameterError(
            "what opens it?", expected="one of --key, --secret-file, --identity, --with-passphrase"
        )
    if not locked.exists():
        raise ParameterError("no such file", expected="a locked model", found=locked)
    with _unlocker(locked, choice, identity, with_passphrase, where) as run, staged(out, force=force) as work:
        run(work)
    output.product({"out": str(out)}, facts({"unlocked model": out}))
    note("It is not locked any more: guard it.")


@contextlib.contextmanager
def _unlocker(
    locked: Path, choice: SecretChoice, identity: Path | None, with_passphrase: bool, where: Where
) -> Iterator[Callable[[Path], None]]:
    """What writes the unlocked model, once every key that it needs is at hand."""
    from sealmark.crypto.recipients import Identity, Passphrase

    if choice.given:
        with choice.read(where) as (key, _):
            yield lambda work: _unlock_with_key(locked, work, key)
    elif identity is not None:
        opener = Identity.parse(first_line(identity))
        yield lambda work: _decrypt(locked, work, opener)
    elif with_passphrase:
        words = Passphrase(ask_passphrase("Passphrase of the file", FILE_PASSPHRASE))
        yield lambda work: _decrypt(locked, work, words)
    else:
        with where.open() as vault:
            yield lambda work: _unlock_from_vault(locked, work, vault)


def _unlock_with_key(locked: Path, work: Path, key: Secret) -> None:
    from sealmark.core import registry
    from sealmark.core.lock import Lock

    made = of_kind(registry.scheme_of(key), Lock, "unlock", "authorization")
    with tensor_progress("unlocking", size_of(locked)) as progress:
        made.unlock_file(locked, work, key, progress=progress)


def _unlock_from_vault(locked: Path, work: Path, vault: Vault) -> None:
    from sealmark.formats.sealed import open_sealed

    parts = list(_parts(locked))
    if not parts or not _is_sealed(parts[0]):
        raise ParameterError(
            "which key opens it?",
            expected="--key NAME",
            found="no sealed file",
            advice="list your keys with: sealmark vault list",
        )
    with open_sealed(parts[0]) as file:
        model = file.header.model
    for record in vault.secrets():
        if record.scheme == "sealed" and record.model == model:
            with contextlib.suppress(WrongKeyError):
                _unlock_with_key(locked, work, vault.secret(record.name))
                return
    _decrypt(locked, work, vault.identity)


def _decrypt(locked: Path, work: Path, opener: Opener) -> None:
    """Open a sealed file, or every part of a sealed folder, without the scheme's secret."""
    from sealmark.formats.sealed import open_sealed

    parts = _parts(locked)
    if not parts:
        raise FormatError("nothing sealed there", expected="a .sealed file or a folder of them", found=locked)
    model: str | None = None
    for part, role in parts.items():
        target = work
        if locked.is_dir():
            work.mkdir(exist_ok=True)
            target = work / part.name.removesuffix(".sealed")
        with open_sealed(part, model=model, role=role) as sealed, byte_progress("unlocking") as progress:
            sealed.decrypt_to(opener, target, progress=progress)
            model = sealed.header.model


def _parts(locked: Path) -> dict[Path, str]:
    """The sealed files and the role of each: of a folder no part may be moved, dropped or added."""
    if not locked.is_dir():
        return {locked: "weights"}
    from sealmark.formats.sealed import roles_of

    return roles_of(_sealed_files(locked))


def _openers(to: list[str], with_passphrase: bool) -> list[Recipient | Passphrase]:
    from sealmark.crypto.recipients import Passphrase, Recipient

    texts = [first_line(Path(text)) if ":" not in text and Path(text).is_file() else text for text in to]
    found: list[Recipient | Passphrase] = [Recipient.parse(text) for text in texts]
    if with_passphrase:
        found.append(Passphrase(ask_passphrase("Passphrase for the file", FILE_PASSPHRASE, new=True)))
    return found


def _admit(file: Path, key: Secret, openers: list[Recipient | Passphrase]) -> None:
    from sealmark.formats.sealed import rewrap

    rewrap(file, key.key("data"), add=openers)


def _sealed_files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and _is_sealed(file)]


def _is_sealed(file: Path) -> bool:
    from sealmark.formats.sealed_header import MAGIC

    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
