"""``keygen``, ``embed``, ``verify``: is this suspect mine?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealmark.cli.credentials import serve
from sealmark.cli.keeping import SecretChoice, Where, keep_evidence, name_for, warn_unsigned
from sealmark.cli.kinds import of_kind, suspect_of
from sealmark.cli.options import Architecture, Settings, Training, command
from sealmark.cli.output import Output, epoch_progress, facts, note, p_text
from sealmark.cli.staging import Force, check_free, staged, write_out
from sealmark.cli.suspects import Remote, about, record_of
from sealmark.core.errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    from sealmark.core.evidence import Evidence
    from sealmark.core.ownership import Verifiable
    from sealmark.core.scheme import Scheme
    from sealmark.core.secret import Secret
    from sealmark.core.task import Task
    from sealmark.runtime.endpoint import Endpoint
    from sealmark.vault import Vault

Alpha = Annotated[float, typer.Option(help="Largest accepted chance of a false claim.")]
EvidenceOut = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the signed evidence here too.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]


@command
def keygen(
    scheme: Annotated[str, typer.Argument(help="Its name; see `sealmark schemes`.")],
    name: Annotated[str, typer.Option(help="Your name for the secret.")],
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model that it is for; untrained without."),
    ] = None,
    payload: Annotated[str, typer.Option(metavar="TEXT", help="A message for the mark to carry.")] = "",
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An unrelated model, for fingerprints that compare; repeat for more."),
    ] = None,
    commitment_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the signed commitment.")
    ] = None,
    force: Force = False,
    *,
    network: Architecture,
    settings: Settings,
    training: Training,
    where: Where,
    output: Output,
) -> None:
    """Make a scheme's secret, keep it in the vault, print its commitment.

    Publish the commitment before you release the model: it proves that the secret came first.
    """
    if commitment_out is not None:
        check_free(commitment_out, force=force)
    from sealmark.core import registry

    made = registry.scheme(scheme, **settings.parameters())
    with where.open() as vault:
        chosen = name_for(vault, name, Path(name))
        owner = vault.verify_key.raw.hex()
        secret = _new_secret(
            made, weights, network, training, owner=owner, payload=payload.encode(), references=reference or []
        )
        with vault.transaction():
            vault.add_secret(chosen, secret)
            if commitment_out is not None:
                write_out(commitment_out, vault.publish_commitment(chosen), force=force)
    document = {"secret": chosen, "scheme": made.name, "commitment": secret.commitment}
    output.product(document, secret.commitment)
    note(f"Kept as {chosen!r} in {where.vault}. Publish the commitment before you release the model.")


@command
def embed(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The marked model.")],
    task: Annotated[str, typer.Option(metavar="NAME", help="The network and the data to train with.")],
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A secret in the vault; repeat for more.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: a scheme of credentials, whose secret is made now.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --scheme: your name for that secret.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A trained model to start from; from scratch without."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Passes over the data.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    force: Force = False,
    *,
    settings: Settings,
    training: Training,
    where: Where,
    output: Output,
) -> None:
    """Train a model that carries one or more watermarks, or one that knows its users' credentials."""
    check_free(out, force=force)
    if bool(secret) == bool(scheme):
        raise ParameterError("what is embedded?", expected="--secret NAME or --scheme NAME, one of the two")
    if scheme is not None:
        serve(scheme, weights, out, name, settings, training, task, where, output, force=force)
        return
    from sealmark.core import registry
    from sealmark.core.modes import pick_device
    from sealmark.core.ownership import Watermark, embed_all
    from sealmark.core.suspect import WhiteBox
    from sealmark.core.weights import ModelWeights, save_model
    from sealmark.runtime.models import load_weights

    device, rng = pick_device(training.device), training.rng()
    with where.open() as vault:
        secrets = [vault.secret(each) for each in secret or []]
    marks = [(of_kind(registry.scheme_of(found), Watermark, "embed", "ownership"), found) for found in secrets]
    made = registry.task(task)
    model = made.model(rng)
    if weights is not None:
        load_weights(model, weights)
    changes = {name: value for name, value in (("epochs", epochs), ("rate", rate)) if value is not None}
    recipe = dataclasses.replace(made.recipe, **changes)  # type: ignore[arg-type]
    with epoch_progress("embedding") as on_epoch, staged(out, force=force) as work:
        marked, kept = embed_all(marks, model.to(device), made, rng=rng, recipe=recipe, on_epoch=on_epoch)
        save_model(marked, work)
        names = _keep_learned(where, secret or [], secrets, kept)
    schemes = [scheme for scheme, _ in marks]
    found = {
        name: scheme.verify(WhiteBox(marked), key) for name, scheme, key in zip(names, schemes, kept, strict=True)
    }
    score, digest = made.score(marked), ModelWeights(marked).digest()
    document = {
        "out": str(out),
        "digest": digest,
        "metric": score,
        "marks": {name: evidence.as_dict() for name, evidence in found.items()},
    }
    lines = {f"mark {name}": f"p = {p_text(evidence.log10_p)}" for name, evidence in found.items()}
    output.product(document, facts({"marked model": out, "accuracy": f"{score:.4f}", **lines}))


@dataclass(frozen=True)
class Law:
    """By which law, and how sure."""

    alpha: Alpha = 1e-6
    tries: Annotated[
        float, typer.Option(help="How many keys, models or seeds were tried; 1.8e19 allows for grinding.")
    ] = 1
    commitment: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="As published before release; another secret is refused."),
    ] = None
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--all-at-once",
            help="Stop asking as soon as the verdict is sure; for trigger sets, and the default with --endpoint.",
        ),
    ] = None
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A model of the judge's own, to learn the law from; repeat for more. See --task."
        ),
    ] = None

    def applied(
        self,
        scheme: Verifiable,
        secret: Secret,
        network: Architecture,
        *,
        task: Task | None,
        device: str,
        remote: bool,
    ) -> dict[str, Any]:
        """Keyword arguments of `Verifiable.verify`; what the judge's own models say is learned here.

        Args:
            scheme: of the secret.
            secret: to verify with.
            network: of the judge's models.
            task: of the network, where one was named.
            device: where they run.
            remote: whether queries cost money, so that asking stops early where it can.

        Raises:
            AccessError: the scheme must run the judge's models and nobody said which network they are.
            ArtifactError: a file is bad, or of another network.
        """
        from sealmark.blackbox.triggers import TriggerMark
        from sealmark.stats.populations import population_of

        files = self.reference or []
        models = (suspect_of(scheme.access, path, network, task=task, device=device) for path in files)
        in_turn = remote and not files and isinstance(scheme, TriggerMark)
        return {
            "alpha": self.alpha,
            "tries": self.tries,
            "commitment": self.commitment,
            "population": population_of(scheme, secret, models) if files else None,
            "sequential": in_turn if self.sequential is None else self.sequential,
        }


@command
def verify(
    suspect: Annotated[
        Path | None, typer.Argument(help="A safetensors file or a folder of shards; or see --endpoint.")
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Your own model, to undo permuted, scaled, flipped or added neurons; see --task."
        ),
    ] = None,
    evidence_out: EvidenceOut = None,
    device: Device = "cpu",
    force: Force = False,
    *,
    law: Law,
    remote: Remote,
    choice: SecretChoice,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Is this suspect mine? Exit code 0 for a match, 1 for none.

    --task or --model is needed for schemes that ask a file questions, and with --original or --reference;
    weights are read without.
    """
    remote.check(suspect, force=force)
    if evidence_out is not None:
        check_free(evidence_out, force=force)
    if original is not None and (suspect is None or law.reference):
        raise ParameterError("--original aligns one file", expected="no --endpoint and no --reference")
    from sealmark.core import registry
    from sealmark.core.ownership import Verifiable
    from sealmark.core.suspect import Access

    with choice.read(where) as (secret, vault):
        if evidence_out is not None and vault is None:
            raise ParameterError("nothing to sign evidence with", advice="make a vault: sealmark init")
        scheme = of_kind(registry.scheme_of(secret), Verifiable, "verify", "ownership")
        task = network.load_task()
        mine = None if original is None else network.load(task, original, device=device)
        law_of = law.applied(scheme, secret, network, task=task, device=device, remote=suspect is None)
        if suspect is None:
            with remote.open(scheme, secret, task) as asked:
                evidence = about(scheme.verify(asked, secret, **law_of), asked)
        else:
            access = scheme.access if mine is None else Access.WEIGHTS
            seen = suspect_of(access, suspect, network, task=task, device=device)
            evidence = scheme.verify(seen, secret, original=mine, **law_of)
        finish(evidence, suspect or asked, vault, evidence_out, output, force=force)


def finish(
    evidence: Evidence,
    suspect: Path | Endpoint,
    vault: Vault | None,
    evidence_out: Path | None,
    output: Output,
    *,
    force: bool,
    meaning: str = "",
) -> None:
    """Sign, keep and print a verdict, and exit with its code; ``meaning`` is for people."""
    from sealmark.core.evidence import Verdict

    number = ""
    if vault is None:
        warn_unsigned()
    else:
        record = record_of(suspect)
        data, number = keep_evidence(vault, evidence, record, subject=record.description)
        if evidence_out is not None:
            write_out(evidence_out, data, force=force)
    details = {name: _figure(value) for name, value in evidence.details.items()}
    saved = details.pop("queries_saved", None)
    lines = {
        "verdict": f"{evidence.verdict.value}{meaning}",
        "p-value": f"{p_text(evidence.log10_p)} (alpha {evidence.alpha:g}, {evidence.tries:g} tried)",
        "scheme": evidence.scheme,
        "statistic": f"{evidence.statistic:.6g} against {evidence.null}, {evidence.basis.value}",
        "queries": evidence.queries if saved is None else f"{evidence.queries}, {saved} saved",
        **details,
        "evidence": f"{number[:16]} in the vault" if number else "not signed",
    }
    output.product({**evidence.as_dict(), "evidence": number}, facts(lines))
    if evidence.verdict is Verdict.INCONCLUSIVE:
        note("Inconclusive: this can never reach alpha. Ask for a larger --alpha, or more: queries, models, bits.")
    if evidence.verdict is not Verdict.MATCH:
        raise typer.Exit(1)


def _keep_learned(where: Where, names: list[str], before: list[Secret], after: list[Secret]) -> list[str]:
    """Keep the secrets that learned something with the model; the names under which each is found."""
    kept = []
    for name, old, new in zip(names, before, after, strict=True):
        kept.append(name if new == old else f"{name}.learned")
        if new != old:
            with where.open() as vault:
                vault.add_secret(kept[-1], new)
            note(
                f"{name} learned its reader with the model: verify with --secret {kept[-1]}, publish its commitment"
            )
    return kept


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _new_secret(
    scheme: Scheme,
    weights: Path | None,
    network: Architecture,
    training: Training,
    *,
    owner: str,
    payload: bytes,
    references: list[Path],
) -> Secret:
    from sealmark.core.identity import UserMark, WeightMark
    from sealmark.core.ownership import Fingerprint, Watermark

    if not isinstance(scheme, (Watermark, Fingerprint, UserMark)):
        raise UnsupportedError(
            f"{scheme.name} makes its own key",
            expected="a watermark, a fingerprint or a user mark",
            found=", ".join(scheme.card.function),
            advice="use sealmark lock or sealmark seal",
        )
    if payload and not isinstance(scheme, Watermark):
        raise ParameterError(f"{scheme.name} carries no payload", expected="none", found=f"{len(payload)} bytes")
    if weights is not None and not network.given:
        if isinstance(scheme, WeightMark):
            return scheme.enroll(weights, owner=owner)
        if isinstance(scheme, Fingerprint):
            return scheme.enroll(weights, references=references, owner=owner)
    if weights is None and not isinstance(scheme, Watermark):
        raise ParameterError(f"{scheme.name} enrolls a trained model", expected="--weights FILE", found="none")
    task = network.load_task()
    if weights is None:
        model = network.build(task, rng=training.rng())
    else:
        model = network.load(task, weights, device=training.device)
    if isinstance(scheme, Watermark):
        return scheme.keygen(model, task, owner=owner, payload=payload)
    if isinstance(scheme, Fingerprint):
        others = [network.load(task, path, device=training.device) for path in references]
        return scheme.enroll(model, task, references=others, owner=owner)
    return scheme.enroll(model, task, owner=owner)
