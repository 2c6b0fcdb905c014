"""The vault as commands use it: opening it, naming what goes in, keeping evidence."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealmark.cli.output import note
from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import ParameterError

if TYPE_CHECKING:
    from sealmark.core.evidence import Evidence
    from sealmark.core.identity import Accusation
    from sealmark.core.secret import Secret
    from sealmark.formats.evidence import SuspectRecord
    from sealmark.vault import Vault

PASSPHRASE = "SEALMARK_PASSPHRASE"  # noqa: S105 - the name of a variable


@dataclass(frozen=True)
class Where:
    """The vault, and what opens it."""

    vault: Annotated[Path, typer.Option(metavar="DIR", envvar="SEALMARK_VAULT", help="Your vault.")] = Path(
        ".sealmark"
    )
    passphrase_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Its first line opens the vault; otherwise ${PASSPHRASE}, or a prompt."),
    ] = None
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="SEALMARK_KEY_FILE", help="A key file opens the vault instead of a passphrase."
        ),
    ] = None

    def opener(self, *, new: bool = False) -> dict[str, Any]:
        """What opens the vault, as keyword arguments of `Vault.open`.

        Raises:
            ParameterError: a file is missing, or there is nobody to ask.
        """
        if self.key_file is not None:
            if self.passphrase_file is not None:
                raise ParameterError("what opens the vault?", expected="--passphrase-file or --key-file, not both")
            return {"key_file": self.key_file}
        if self.passphrase_file is not None:
            return {"passphrase": first_line(self.passphrase_file)}
        return {"passphrase": ask_passphrase("Passphrase of the vault", PASSPHRASE, new=new)}

    @property
    def is_there(self) -> bool:
        """Whether there is a vault at all."""
        return self.vault.exists()

    def open(self) -> Vault:
        """The open vault; use it in a ``with`` block.

        Raises:
            ParameterError: no vault there, or nothing opens it.
            WrongKeyError: a wrong passphrase or key file.
            ArtifactError: it is damaged.
        """
        if not self.is_there:
            raise ParameterError(
                "no vault there", expected=f"a folder {self.vault}", advice="make one with: sealmark init"
            )
        from sealmark.vault import Vault

        return Vault.open(self.vault, **self.opener())


@dataclass(frozen=True)
class SecretChoice:
    """A secret out of the vault or a file."""

    secret: Annotated[
        str | None,
        typer.Option("--secret", "--key", metavar="NAME", help="A secret or key in the vault."),
    ] = None
    secret_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A secret or key in a file of its own."),
    ] = None

    @property
    def given(self) -> bool:
        """Whether one was named at all."""
        return self.secret is not None or self.secret_file is not None

    @contextlib.contextmanager
    def read(self, where: Where) -> Iterator[tuple[Secret, Vault | None]]:
        """The secret, and the open vault where there is one.

        Raises:
            ParameterError: neither or both were named.
            UnknownNameError: the vault has no such secret.
            ArtifactError: the file is bad.
        """
        from sealmark.formats.secret import read_secret

        if (self.secret is None) == (self.secret_file is None):
            raise ParameterError("which secret?", expected="--secret NAME or --secret-file FILE, one of the two")
        if self.secret_file is not None and not where.is_there:
            yield read_secret(self.secret_file), None
            return
        with where.open() as vault:
            if self.secret is None:
                yield read_secret(str(self.secret_file)), vault
            else:
                yield vault.secret(self.secret), vault


def first_line(path: Path) -> str:
    """The first line of a text file.

    Raises:
        ParameterError: no such file, or not text.
    """
    if not path.is_file():
        raise ParameterError("no such file", expected="a text file", found=path)
    try:
        return path.read_text("utf-8").partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not text", expected="one line of UTF-8") from None


def ask_passphrase(what: str, variable: str, *, new: bool = False) -> str:
    """A passphrase from the environment or the person at the keyboard.

    Raises:
        ParameterError: there is neither.
    """
    if variable in os.environ:
        return os.environ[variable]
    if not sys.stdin.isatty():
        raise ParameterError(
            f"{what}: nobody to ask", expected=f"a terminal or ${variable}", advice=f"set {variable}"
        )
    answer: str = typer.prompt(what, hide_input=True, confirmation_prompt=new, err=True)
    return answer


def name_for(vault: Vault, name: str | None, path: Path) -> str:
    """A name for something new in the vault: the one given, or the file's.

    Raises:
        ParameterError: the name is taken or cannot be used.
    """
    from sealmark.vault.records import check_name

    chosen = check_name(name or stem(path))
    if any(record.name == chosen for record in vault.secrets()):
        raise ParameterError(
            f"the vault has a secret {chosen!r} already", expected="a new name", advice="choose one with --name"
        )
    return chosen


def stem(path: Path) -> str:
    """The name of a model's file or folder, as a vault can use it.

    Example:
        >>> stem(Path("models/My net.safetensors"))
        'My_net'
    """
    base = path.resolve().name
    for suffix in (".sealed", ".safetensors"):
        base = base.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]", "_", base).lstrip("._-")[:100] or "model"


def keep_evidence(
    vault: Vault, found: Evidence | Accusation, suspect: SuspectRecord, *, subject: str
) -> tuple[bytes, str]:
    """Sign a finding and keep it in the vault; its bytes and its id there."""
    from sealmark.core.evidence import Evidence
    from sealmark.formats.envelope import sign_document
    from sealmark.formats.evidence import sign_evidence
    from sealmark.formats.times import utc_now, utc_text

    if isinstance(found, Evidence):
        data, kind = sign_evidence(found, suspect, vault.signing_key), "verification"
    else:
        body = {
            "type": "accusation",
            "evidence": found.as_dict(),
            "suspect": {"digest": suspect.digest, "description": suspect.description},
            "issued": utc_text(utc_now()),
        }
        data, kind = sign_document("evidence", body, vault.signing_key), "accusation"
    number = sha256_hex(data)
    # the same finding within one second is the same document
    if all(record.id != number for record in vault.evidence()):
        vault.add_evidence(data, kind, subject)
    return data, number


def warn_unsigned() -> None:
    """Say that there is no vault to sign with."""
    note("note: no vault here, so this finding is not signed; make one with: sealmark init")
