"""Figures of the black-box schemes: ``python -m sealmark.evaluate.blackbox OUT``.

For every trigger set and every fingerprint, on the digits, over three seeds: fidelity, the match on the
protected model and on ten independent ones, the same after each attack with the surrogate's accuracy beside
it, queries and p-values; and how often a false claim accuses an innocent model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from sealmark.attacks.ambiguity.false_claim import FalseClaim
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, Verdict
from sealmark.core.files import atomic_write
from sealmark.core.ownership import Fingerprint, Verifiable, Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.training import train, train_task
from sealmark.evaluate.artifacts import environment, finite, write_json
from sealmark.evaluate.blackbox_text import as_markdown
from sealmark.evaluate.measure import Effort, Ground, ground
from sealmark.evaluate.whitebox import Entry
from sealmark.stats.populations import population_of

SEEDS = (0, 1, 2)
LEVEL = 0.05  # what a population of twenty references can certify
AttackSpec = tuple[str, str, dict[str, Any]]  # title, name, parameters
ATTACKS: tuple[AttackSpec, ...] = (
    ("fine-tuned", "fine_tune", {"epochs": 20, "rate": 0.05}),
    ("fine-tuned adversarially", "adversarial_fine_tune", {}),
    ("pruned by half", "prune", {"rate": 0.5}),
    ("distilled", "distill", {}),
    ("knockoff, probabilities", "knockoff", {"answers": "probabilities"}),
    ("knockoff, labels", "knockoff", {"answers": "label"}),
    ("blur", "preprocess", {"kind": "blur"}),
    ("jpeg", "preprocess", {"kind": "jpeg"}),
    ("noise", "preprocess", {"kind": "noise"}),
    ("quantized inputs", "preprocess", {"kind": "quantize"}),
    ("query modification", "query_modification", {}),
)


@dataclass(frozen=True)
class Strangers:
    """Models that have nothing to do with the protected one: half of the owner's rows, half of the attacker's.

    On a task of its own, for a scheme that tells who knows the owner's rows, they are all of the attacker's.

    Attributes:
        innocent: suspects that must not be accused.
        references: what laws are learned from; none of them is a suspect.
    """

    innocent: Sequence[nn.Module]
    references: Sequence[nn.Module]

    @classmethod
    def of(cls, base: Ground, innocent: int, references: int) -> Strangers:
        """Train them."""

        def made(label: str, count: int) -> list[nn.Module]:
            rows = (base.task.owner if base.task.name == "digits" else base.task.attacker, base.task.attacker)
            return [
                train_task(base.task, rng=base.generator(f"{label} {i}"), rows=rows[i % 2], recipe=base.recipe)
                for i in range(count)
            ]

        return cls(made("innocent", innocent), made("reference", references))


@dataclass(frozen=True)
class Protected:
    """A protected model, and how it is recognized.

    Attributes:
        base: of the seed.
        entry: what is measured.
        scheme: made from it.
        model: marked, or the plain one of a fingerprint.
        secret: to verify with.
        before: accuracy of the same training without the mark.
    """

    base: Ground
    entry: Entry
    scheme: Verifiable
    model: nn.Module
    secret: Secret
    before: float

    @property
    def alpha(self) -> float:
        """The level: the usual one, or that of a learned law."""
        return LEVEL if isinstance(self.scheme, Fingerprint) else DEFAULT_ALPHA

    def read(self, model: nn.Module) -> dict[str, Any]:
        """Match rate, log10 p, verdict and queries; what a sequential verifier needs, where the scheme can."""
        found = self.scheme.verify(WhiteBox(model), self.secret, alpha=self.alpha)
        rates = [found.details[name] for name in ("trigger_accuracy", "match_rate") if name in found.details]
        in_turn = None
        if isinstance(self.scheme, TriggerMark):
            with contextlib.suppress(UnsupportedError):  # a paper's own mode without a law
                in_turn = self.scheme.verify(WhiteBox(model), self.secret, sequential=True).queries
        return {
            "rate": rates[0] if rates else None,
            "statistic": found.statistic,
            "log10_p": found.log10_p,
            "match": found.verdict is Verdict.MATCH,
            "paper claims": found.details.get("paper_claims"),
            "queries": found.queries,
            "queries in turn": in_turn,
        }


def protect(base: Ground, entry: Entry, strangers: Strangers) -> Protected:
    """Mark or enroll the model of one seed."""
    scheme = registry.scheme(entry.scheme, **entry.parameters)
    secret_rng = base.generator(f"secret {entry.title}")
    if isinstance(scheme, Fingerprint):
        secret = scheme.enroll(base.plain, base.task, references=strangers.references, rng=secret_rng)
        return Protected(base, entry, scheme, base.plain, secret, base.accuracy)
    if not isinstance(scheme, Watermark):
        raise ParameterError(f"{entry.scheme} verifies no ownership", expected="a watermark or a fingerprint")
    trained = entry.trained or scheme.card.needs_trained
    start, before = (base.plain if trained else base.fresh), base.accuracy
    secret = scheme.keygen(start, base.task, rng=secret_rng)
    if trained:  # as long without the mark
        control = copy.deepcopy(base.plain)
        train(control, base.task.owner, loss=base.task.loss, recipe=base.recipe, rng=base.generator(entry.title))
        before = base.task.score(control)
    marked = scheme.embed(start, secret, base.task, rng=base.generator(entry.title), recipe=base.recipe)
    return Protected(base, entry, scheme, marked.model, marked.secret, before)


def figures(found: Protected, strangers: Strangers, attacks: Sequence[AttackSpec]) -> dict[str, Any]:
    """Everything about one scheme, for one seed: plain values."""
    base, task = found.base, found.base.task
    after = {}
    for title, name, parameters in attacks:
        attack = registry.modification(name, **parameters)
        result = attack.run(found.model, Resources.of(task), rng=base.generator(f"{title} on {found.entry.title}"))
        after[title] = {
            "accuracy": task.score(result.model),
            "queries of the thief": result.cost.queries,
            **found.read(result.model),
        }
    return {
        "accuracy before": found.before,
        "accuracy after": task.score(found.model),
        "protected": found.read(found.model),
        "independent": [found.read(model) for model in strangers.innocent],
        "after": after,
    }


def false_claims(base: Ground, entry: Entry, strangers: Strangers) -> dict[str, Any] | None:
    """How many innocent models a false claim accuses: by the paper's rule, and by ours; None where it cannot."""
    scheme, attack = registry.scheme(entry.scheme, **entry.parameters), FalseClaim()
    if not isinstance(scheme, Verifiable) or not attack.fits(scheme):
        return None
    resources, label = Resources.of(base.task), f"false claim of {entry.title}"
    forged = attack.run(base.plain, scheme, resources, rng=base.generator(label)).secret
    claimed = attack.claim(scheme, resources, base.generator(label))
    suspects = [WhiteBox(model) for model in strangers.innocent]
    naive = [bool(scheme.score(suspect, forged).details["paper_claims"]) for suspect in suspects]
    law, alpha = None, DEFAULT_ALPHA
    if isinstance(scheme, Fingerprint):
        law, alpha = population_of(scheme, claimed, map(WhiteBox, strangers.references)), LEVEL
    ours = [
        scheme.verify(suspect, claimed, alpha=alpha, population=law).verdict is Verdict.MATCH
        for suspect in suspects
    ]
    return {"innocent": len(suspects), "naive": sum(naive), "ours": sum(ours), "alpha": alpha}


def run(
    out: Path,
    entries: Sequence[Entry],
    *,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 15,
    innocent: int = 10,
    references: int = 20,
    attacks: Sequence[AttackSpec] = ATTACKS,
) -> dict[str, Any]:
    """Measure, and write ``ownership-blackbox.json`` and ``.md`` into ``out``."""
    began, console = time.perf_counter(), Console(stderr=True)
    rows: dict[str, list[dict[str, Any]]] = {entry.title: [] for entry in entries}
    claims: dict[str, list[dict[str, Any]]] = {entry.title: [] for entry in entries}
    scratch: list[dict[str, float]] = []
    failed: dict[str, list[str]] = {}
    for seed in seeds:
        grounds: dict[str, tuple[Ground, Strangers]] = {}
        for entry in entries:
            console.print(f"seed {seed}: {entry.title}")
            name = _task_of(entry)
            if name not in grounds:
                made = ground(seed, Effort(epochs=epochs), name)
                grounds[name] = (made, Strangers.of(made, innocent, references))
            base, strangers = grounds[name]
            try:
                rows[entry.title].append(figures(protect(base, entry, strangers), strangers, attacks))
                claims[entry.title] += filter(None, [false_claims(base, entry, strangers)])
            except MarkFailedError as error:
                failed.setdefault(entry.title, []).append(f"seed {seed}: {error}")
        scratch += [_scratch(grounds["digits"][0], attacks)] if "digits" in grounds else []
    result: dict[str, Any] = finite(
        {
            "environment": environment(),
            "seeds": list(seeds),
            "epochs": epochs,
            "references": references,
            "entries": [asdict(entry) | {"title": entry.title} for entry in entries],
            "rows": rows,
            "scratch": scratch,
            "false claims": claims,
            "failed": failed,
            "seconds": round(time.perf_counter() - began),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "ownership-blackbox.json")
    with atomic_write(out / "ownership-blackbox.md") as file:
        file.write(as_markdown(result).encode())
    return result


def _task_of(entry: Entry) -> str:
    task: str = registry.item("scheme", entry.scheme).card().task  # type: ignore[union-attr]
    return task


def _scratch(base: Ground, attacks: Sequence[AttackSpec]) -> dict[str, float]:
    """What the same attackers get from a random start."""
    found = {}
    for title, name, parameters in attacks:
        attack, rng = registry.modification(name, **parameters), base.generator(f"scratch of {title}")
        if attack.card.needs_data:
            found[title] = base.task.score(attack.scratch(Resources.of(base.task), rng))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sealmark.evaluate.blackbox OUT [--seeds 0 1 2] [--only NAME ...]``."""
    parser = argparse.ArgumentParser(description="Measure every black-box scheme on the digits.")
    parser.add_argument("out", type=Path, help="folder for ownership-blackbox.json and .md")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="repetitions")
    parser.add_argument("--only", nargs="+", default=(), help="schemes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = [entry for entry in ENTRIES if not chosen.only or entry.scheme in chosen.only]
    run(chosen.out, entries, seeds=chosen.seeds)


ENTRIES: tuple[Entry, ...] = (
    Entry("hash_chain"),
    Entry("hash_chain", {"objective": "plain"}),
    Entry("hash_chain", {"looks": "smooth"}),
    Entry("hash_chain", {"looks": "rows"}),
    Entry("adi"),
    Entry("zhang", {"kind": "content"}),
    Entry("zhang", {"kind": "noise"}),
    Entry("zhang", {"kind": "unrelated"}),
    Entry("exponential_weighting"),
    Entry("message_mark"),
    Entry("evolutionary_triggers"),
    Entry("frontier_stitching"),
    Entry("frontier_stitching", {"labels": "original"}),
    Entry("margin_based"),
    Entry("entangled"),
    Entry("certified"),
    Entry("dawn"),
    Entry("ipguard"),
    Entry("afa"),
    Entry("conferrable"),
    Entry("deepjudge"),
    Entry("dataset_inference"),
    Entry("universal_perturbation"),
)

if __name__ == "__main__":
    main()
