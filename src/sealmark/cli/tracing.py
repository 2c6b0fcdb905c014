"""``trace``: who leaked it?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sealmark.cli.credentials import shown_rows
from sealmark.cli.keeping import Where, keep_evidence
from sealmark.cli.kinds import of_kind, suspect_of
from sealmark.cli.options import Architecture, command
from sealmark.cli.output import Output, facts, listing, note, p_text
from sealmark.cli.ownership import Alpha, Device, EvidenceOut
from sealmark.cli.staging import Force, check_free, write_out
from sealmark.core.errors import ParameterError

if TYPE_CHECKING:
    from torch import nn

    from sealmark.core.identity import Accusation, UserMark
    from sealmark.core.secret import Secret
    from sealmark.core.suspect import Suspect
    from sealmark.core.weights import Weights
    from sealmark.vault import Vault


@dataclass(frozen=True)
class Reading:
    """What a leak is read with."""

    original: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Your unmarked model. With --task or --model, rearranged neurons are put back first.",
        ),
    ] = None
    lock_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In the vault: the leak is unlocked, and --original locked with it."),
    ] = None
    served: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Credentials: the model that takes them; SUSPECT holds the rows."),
    ] = None

    def check(self, *, credentials: bool) -> None:
        """Refuse what makes no sense for marked copies, or for credentials.

        Raises:
            ParameterError: so.
        """
        if credentials and (self.served is None or self.original is not None or self.lock_key is not None):
            raise ParameterError(
                "this secret is of credentials", expected="--served PATH, no --original and no --lock-key"
            )
        if not credentials and self.served is not None:
            raise ParameterError("this secret is of marked copies", expected="--original PATH, not --served")
        if self.lock_key is not None and self.original is None:
            raise ParameterError("--lock-key says what the original was locked with", expected="--original PATH")


@command
def trace(
    suspect: Annotated[
        Path, typer.Argument(help="What leaked: a safetensors file or a folder of shards; or a credential's rows.")
    ],
    secret: Annotated[str, typer.Option(metavar="NAME", help="That copies were marked, or credentials made with.")],
    alpha: Alpha = 1e-6,
    commitment: Annotated[str | None, typer.Option(metavar="HEX", help="As published before release.")] = None,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot everybody's score, the threshold and the accused: .svg or .png."),
    ] = None,
    evidence_out: EvidenceOut = None,
    device: Device = "cpu",
    force: Force = False,
    *,
    reading: Reading,
    network: Architecture,
    where: Where,
    output: Output,
) -> None:
    """Who leaked it? Exit code 0 when somebody is accused, 1 when nobody is.

    The chance that anyone innocent is accused, over all users together, is at most --alpha. Tensors are found
    under other names, in another order or form; what is missing is left out.
    """
    from sealmark.core.weights import weights_of
    from sealmark.formats.evidence import SuspectRecord

    for path in filter(None, (explain, evidence_out)):
        check_free(path, force=force)
    draw = _plotter(explain, suspect.name)
    with where.open() as vault:
        users = [record.user for record in vault.users(secret)]
        find = _finder(vault, vault.secret(secret), suspect, reading, network, device)
        if not users:
            raise ParameterError("nobody has a copy", expected=f"users of {secret}", advice="issue copies first")
        found = find(users, alpha=alpha, commitment=commitment)
        record = SuspectRecord(weights_of(suspect).digest(), suspect.name)
        data, number = keep_evidence(vault, found, record, subject=suspect.name)
        if evidence_out is not None:
            write_out(evidence_out, data, force=force)
    draw(found)
    _show(found, number, output)


def _finder(
    vault: Vault, key: Secret, suspect: Path, reading: Reading, network: Architecture, device: str
) -> Callable[..., Accusation]:
    """What traces among users: the scheme with everything that it reads."""
    from sealmark.core import registry
    from sealmark.core.credentials import CredentialMark
    from sealmark.core.identity import UserMark
    from sealmark.core.suspect import WhiteBox
    from sealmark.core.weights import weights_of

    scheme = registry.scheme_of(key)
    reading.check(credentials=isinstance(scheme, CredentialMark))
    task = network.load_task()
    if isinstance(scheme, CredentialMark):
        served = network.load(task, Path(str(reading.served)), device=device, resize=True)
        return functools.partial(scheme.trace, WhiteBox(served), key, shown_rows(suspect, scheme, task))
    mark = of_kind(scheme, UserMark, "trace", "identity")
    seen = suspect_of(mark.access, suspect, network, task=task, device=device)
    mine: nn.Module | Weights | None = None
    if reading.original is not None:
        live = network.given
        mine = network.load(task, reading.original, device=device) if live else weights_of(reading.original)
    if reading.lock_key is None or mine is None:
        return functools.partial(mark.trace, seen, key, original=mine)
    opener = vault.secret(reading.lock_key)
    return functools.partial(_unlocked, mark, seen, key, mine=mine, opener=opener)


def _unlocked(
    mark: UserMark,
    suspect: Suspect,
    key: Secret,
    users: list[str],
    *,
    mine: nn.Module | Weights,
    opener: Secret,
    **law: Any,
) -> Accusation:
    """Trace an unlocked copy of a model that was marked as locked."""
    from sealmark.core import registry
    from sealmark.core.leak import relocked
    from sealmark.core.lock import WeightLock
    from sealmark.core.weights import weights_of

    lock = of_kind(registry.scheme_of(opener), WeightLock, "lock a leak again", "authorization")
    told, seen = relocked(suspect, mine, lock, opener)
    found = mark.trace(seen, key, users, original=weights_of(mine), **law)
    details = {**found.details, "relocked": {"scheme": lock.name, "key": opener.commitment, **told}}
    return dataclasses.replace(found, details=details)


def _plotter(path: Path | None, title: str) -> Callable[[Accusation], None]:
    """What draws, found out before anything is traced; nothing without a path."""
    if path is None:
        return lambda _: None
    from sealmark.evaluate.explain import check_plot, draw_trace

    check_plot(path)
    return functools.partial(draw_trace, path=path, title=title)


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
        **_undone(found),
        "evidence": f"{number[:16]} in the vault",
    }
    table = listing(["user", "score", "p-value", "accused"], rows)
    output.product({**found.as_dict(), "evidence": number}, facts(lines), "", table)
    if found.verdict is Verdict.INCONCLUSIVE:
        note("Inconclusive: what can be read of this suspect cannot reach alpha, whoever leaked it.")
    if not accused:
        raise typer.Exit(1)


def _undone(found: Accusation) -> dict[str, str]:
    """What had to be undone to read the leak, in words."""
    told = {**found.details.get("relocked", {}), **found.details}
    lines = {}
    if form := told.get("form"):
        lines["form"] = ", ".join(
            f"{len(many) if isinstance(many, list) else many} {what}" for what, many in form.items()
        )
    if alignment := told.get("alignment"):
        words = ("moved", "flipped", "scaled", "dropped")
        undone = [f"{alignment[word]} {word}" for word in words if alignment.get(word)]
        lines["neurons"] = alignment.get("impossible") or ", ".join(undone) or "as in the original"
    return lines
