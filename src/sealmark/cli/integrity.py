"""``seal``, ``check``, ``restore``: was it changed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sealmark.cli.keeping import SecretChoice, Where, name_for
from sealmark.cli.kinds import of_kind
from sealmark.cli.options import Architecture, Settings, command
from sealmark.cli.output import Output, facts, size_of, tensor_progress
from sealmark.cli.ownership import EvidenceOut, finish
from sealmark.cli.staging import Force, check_free, staged
from sealmark.core.errors import ParameterError

if TYPE_CHECKING:
    from sealmark.core.integrity import Seal
    from sealmark.core.secret import Secret


@command
def seal(
    model: Annotated[Path, typer.Argument(help="A safetensors file or a folder of shards.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The sealed model.")],
    scheme: Annotated[str, typer.Option(metavar="NAME", help="See `sealmark schemes`.")] = "reversible",
    name: Annotated[str | None, typer.Option(help="Your name for the record; the output's without.")] = None,
    force: Force = False,
    *,
    network: Architecture,
    settings: Settings,
    where: Where,
    output: Output,
) -> None:
    """Seal a model: any later change is found, and the original can be had back, bit for bit.

    --task or --model is needed for schemes that rebuild layers; weights alone do for the others.
    """
    check_free(out, force=force, sources=(model,))
    from sealmark.core import registry
    from sealmark.core.integrity import Seal

    made = of_kind(registry.scheme(scheme, **settings.parameters()), Seal, "seal", "integrity")
    with where.open() as vault:
        chosen = name_for(vault, name, out)
        with staged(out, force=force, sources=(model,)) as work:
            record = _seal(made, model, work, network, vault.verify_key.raw.hex())
            vault.add_secret(chosen, record)
    output.product(
        {"out": str(out), "scheme": made.name, "record": chosen, "commitment": record.commitment},
        facts({"sealed model": out, "scheme": made.name, "record": f"{chosen} in {where.vault}"}),
    )


@command
def check(
    model: Annotated[Path, typer.Argument(help="A sealed model.")],
    evidence_out: EvidenceOut = None,
    force: Force = False,
    *,
    choice: SecretChoice,
    where: Where,
    output: Output,
) -> None:
    """Was it changed since it was sealed? Exit code 0 when it is intact, 1 when not, and where."""
    if evidence_out is not None:
        check_free(evidence_out, force=force)
    from sealmark.core import registry
    from sealmark.core.evidence import Verdict
    from sealmark.core.integrity import Seal

    with choice.read(where) as (record, vault):
        if evidence_out is not None and vault is None:
            raise ParameterError("nothing to sign evidence with", advice="make a vault: sealmark init")
        made = of_kind(registry.scheme_of(record), Seal, "check", "integrity")
        found = made.check(model, record)
        meaning = ": nothing was changed" if found.verdict is Verdict.MATCH else ": it was changed"
        finish(found, model, vault, evidence_out, output, force=force, meaning=meaning)


@command
def restore(
    model: Annotated[Path, typer.Argument(help="A sealed model.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The original.")],
    force: Force = False,
    *,
    network: Architecture,
    choice: SecretChoice,
    where: Where,
    output: Output,
) -> None:
    """Take the seal off: the original, bit for bit."""
    check_free(out, force=force, sources=(model,))
    from sealmark.core import registry
    from sealmark.core.integrity import Seal, WeightSeal
    from sealmark.core.weights import save_model

    with choice.read(where) as (record, _), staged(out, force=force, sources=(model,)) as work:
        made = of_kind(registry.scheme_of(record), Seal, "restore", "integrity")
        if isinstance(made, WeightSeal):
            with tensor_progress("restoring", size_of(model)) as progress:
                made.restore_file(model, work, record, progress=progress)
        else:
            live = network.load(network.load_task(), model, resize=True)
            save_model(made.restore(live, record), work)
    output.product({"out": str(out)}, facts({"original": out}))


def _seal(made: Seal, model: Path, work: Path, network: Architecture, owner: str) -> Secret:
    from sealmark.core.integrity import WeightSeal
    from sealmark.core.weights import save_model

    if isinstance(made, WeightSeal):
        with tensor_progress("sealing", size_of(model)) as progress:
            return made.seal_file(model, work, owner=owner, progress=progress)
    task = network.load_task()
    sealed = made.seal(network.load(task, model), task, owner=owner)
    save_model(sealed.model, work)
    return sealed.secret
