"""``authenticate``, and what ``embed`` and ``issue`` do for schemes of one served model."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.copies import Job
from sealmark.cli.keeping import Where, name_for
from sealmark.cli.kinds import of_kind
from sealmark.cli.options import Architecture, Settings, Training, command
from sealmark.cli.output import Output, console, facts, note, p_text
from sealmark.cli.staging import staged
from sealmark.core.errors import FormatError, ModelMismatchError, ParameterError

if TYPE_CHECKING:
    from torch import Tensor

    from sealmark.core.credentials import CredentialMark
    from sealmark.core.secret import Secret
    from sealmark.core.task import Task
    from sealmark.runtime.issuing import Copy, Order

_QUERIES = 16  # inputs of the task that carry a credential, where each query must


@command
def authenticate(
    shown: Annotated[
        Path, typer.Argument(metavar="CREDENTIAL|ROWS", help="A credential, or rows as somebody sent them.")
    ],
    served: Annotated[Path, typer.Option(metavar="FILE", help="The model that takes credentials.")],
    secret: Annotated[str, typer.Option(metavar="NAME", help="That the credentials were issued from.")],
    alpha: Annotated[
        float, typer.Option(help="Largest accepted chance of letting in what nobody was issued.")
    ] = 1e-6,
    commitment: Annotated[str | None, typer.Option(metavar="HEX", help="As published before release.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    *,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Whose credential is this, and may he come in? Exit code 0 if so, 1 if not, with the reason.

    A credential can be copied: whoever holds it passes. Signatures authenticate people.
    """
    from sealmark.core import registry
    from sealmark.core.credentials import CredentialMark
    from sealmark.core.suspect import WhiteBox

    with where.open() as vault:
        key = vault.secret(secret)
        records = vault.users(secret)
    mark = of_kind(registry.scheme_of(key), CredentialMark, "authenticate", "identity")
    if not records:
        raise ParameterError("nobody has a credential", expected=f"users of {secret}", advice="issue them first")
    task = network.load_task()
    model = network.load(task, served, device=device, resize=True)
    found = mark.authenticate(
        WhiteBox(model),
        key,
        shown_rows(shown, mark, task),
        [record.user for record in records],
        alpha=alpha,
        revoked=[record.user for record in records if record.revoked],
        commitment=commitment,
    )
    answer = found.reason.value
    if found.accepted and (refused := _outside(where, str(found.user), served)):
        answer = refused
    accepted = found.accepted and answer == found.reason.value
    lines = {
        "answer": answer,
        "user": found.user or "nobody",
        "p-value": f"{p_text(found.log10_p)} (alpha {found.alpha:g}, {found.users} users)",
        "null": f"{found.null}, {found.basis.value}",
        "the model alone": "lets it in" if found.served else "refuses",
    }
    output.product({**found.as_dict(), "reason": answer, "accepted": accepted}, facts(lines))
    if not accepted:
        raise typer.Exit(1)


def _outside(where: Where, user: str, served: Path) -> str:
    """Why the licenses that came with a user's credential do not hold now; empty where one does, or none came."""
    from sealmark.core.weights import FileWeights

    with where.open() as vault:
        states = [record.status() for record in vault.license_records(user, model=FileWeights(served).digest())]
    if not states or "valid" in states:
        return ""
    return states[-1].upper().replace(" ", "_")


def serve(
    scheme: str,
    weights: Path | None,
    out: Path,
    name: str | None,
    settings: Settings,
    training: Training,
    task: str,
    where: Where,
    output: Output,
    *,
    force: bool,
) -> None:
    """Train a model that knows credentials, write it, and keep its secret.

    Args:
        scheme: its name.
        weights: of the trained model to start from.
        out: the served model.
        name: of the secret; the output's without.
        settings: parameters of the scheme.
        training: where, and from which seed.
        task: name of the network and its data.
        where: the vault.
        output: of the command.
        force: whether a file may be replaced.

    Raises:
        ParameterError: no trained model, or the name is taken.
        UnsupportedError: the scheme is of another kind.
    """
    from sealmark.core import registry
    from sealmark.core.credentials import CredentialMark
    from sealmark.core.weights import ModelWeights, save_model

    mark = of_kind(registry.scheme(scheme, **settings.parameters()), CredentialMark, "embed", "identity")
    if weights is None:
        raise ParameterError(f"{scheme} starts from a trained model", expected="--weights FILE", found="none")
    with where.open() as vault:
        chosen, owner = name_for(vault, name, out), vault.verify_key.raw.hex()
        data = registry.task(task)
        plain = Architecture(task=task).load(data, weights, device=training.device)
        with staged(out, force=force, sources=(weights,)) as work, console(stderr=True).status(f"{scheme} ..."):
            made = mark.enroll(plain, data, owner=owner, rng=training.rng())
            save_model(made.model, work)
            vault.add_secret(chosen, made.secret)
    document = {
        "out": str(out),
        "digest": ModelWeights(made.model).digest(),
        "scheme": scheme,
        "secret": chosen,
        "commitment": made.secret.commitment,
    }
    output.product(document, facts({"served model": out, "scheme": scheme, "secret": f"{chosen} in {where.vault}"}))
    note(f"Publish its commitment, then issue credentials: sealmark issue {out} --secret {chosen} ...")


def credential_job(name: str, key: Secret, mark: CredentialMark, model: Path, network: Architecture) -> Job:
    """Credentials for everyone, made of a served model.

    Raises:
        ParameterError: nobody said which network it is.
        ModelMismatchError: the weights are of another network.
    """
    from sealmark.core.weights import FileWeights
    from sealmark.formats.credential import HeldCredential, write_credential
    from sealmark.runtime.issuing import Copy

    task = network.load_task()
    served, digest = network.load(task, model, resize=True), FileWeights(model).digest()

    def make(orders: list[Order]) -> Generator[Copy]:
        for order in orders:
            made = mark.issue(served, key, order.user, task=task)
            write_credential(HeldCredential(made, mark.name, digest), order.target)
            yield Copy(order.user, order.target, FileWeights(order.target).digest())

    return Job(name, key, make, model=digest)


def shown_rows(shown: Path, mark: CredentialMark, task: Task | None) -> Tensor:
    """What somebody sends: ``images`` or the only tensor of a file; of a credential, what its holder would send.

    Raises:
        FormatError: several tensors, and none of that name.
        ModelMismatchError: a credential of another scheme.
    """
    from sealmark.core.weights import weights_of
    from sealmark.formats.credential import read_credential

    tensors = weights_of(shown)
    try:
        held = read_credential(shown)
    except FormatError:  # rows that somebody sent
        name = "images" if "images" in tensors else next(iter(tensors), "")
        if name != "images" and len(tensors) != 1:
            raise FormatError(
                f"{shown}: which rows?", expected="a tensor images, or one alone", found=[*tensors][:8]
            ) from None
        return tensors[name]
    if held.scheme != mark.name:
        raise ModelMismatchError("a credential of another scheme", expected=mark.name, found=held.scheme)
    return mark.present(held.credential, None if task is None else task.test.inputs[:_QUERIES])
