"""``seal``, ``check``, ``restore``: was it changed?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealmark.cli.keeping import SecretChoice, Where, name_for
from sealmark.cli.kinds import of_kind
from sealmark.cli.options import Settings, command
from sealmark.cli.output import Output, facts, size_of, tensor_progress
from sealmark.cli.ownership import EvidenceOut, finish
from sealmark.cli.staging import Force, check_free, staged
from sealmark.core.errors import ParameterError


@command
def seal(
    model: Annotated[Path, typer.Argument(help="A safetensors file or a folder of shards.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The sealed model.")],
    scheme: Annotated[str, typer.Option(metavar="NAME", help="See `sealmark schemes`.")] = "reversible",
    name: Annotated[str | None, typer.Option(help="Your name for the record; the output's without.")] = None,
    force: Force = False,
    *,
    settings: Settings,
    where: Where,
    output: Output,
) -> None:
    """Seal a model: any later change is found, and the original can be had back, bit for bit."""
    check_free(out, force=force, sources=(model,))
    from sealmark.core import registry
    from sealmark.core.integrity import WeightSeal

    made = of_kind(registry.scheme(scheme, **settings.parameters()), WeightSeal, "seal", "integrity")
    with where.open() as vault:
        chosen = name_for(vault, name, out)
        with staged(out, force=force, sources=(model,)) as work:
            with tensor_progress("sealing", size_of(model)) as progress:
                record = made.seal_file(model, work, owner=vault.verify_key.raw.hex(), progress=progress)
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
    from sealmark.core.integrity import WeightSeal

    with choice.read(where) as (record, vault):
        if evidence_out is not None and vault is None:
            raise ParameterError("nothing to sign evidence with", advice="make a vault: sealmark init")
        made = of_kind(registry.scheme_of(record), WeightSeal, "check", "integrity")
        found = made.check(model, record)
        meaning = ": nothing was changed" if found.verdict is Verdict.MATCH else ": it was changed"
        finish(found, model, vault, evidence_out, output, force=force, meaning=meaning)


@command
def restore(
    model: Annotated[Path, typer.Argument(help="A sealed model.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The original.")],
    force: Force = False,
    *,
    choice: SecretChoice,
    where: Where,
    output: Output,
) -> None:
    """Take the seal off: the original, bit for bit."""
    check_free(out, force=force, sources=(model,))
    from sealmark.core import registry
    from sealmark.core.integrity import WeightSeal

    with choice.read(where) as (record, _), staged(out, force=force, sources=(model,)) as work:
        made = of_kind(registry.scheme_of(record), WeightSeal, "restore", "integrity")
        with tensor_progress("restoring", size_of(model)) as progress:
            made.restore_file(model, work, record, progress=progress)
    output.product({"out": str(out)}, facts({"original": out}))
