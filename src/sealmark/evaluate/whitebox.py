"""Figures of the white-box marks: ``python -m sealmark.evaluate.whitebox OUT``.

For every mark that reads weights or activations, on the digits, over three seeds: fidelity, capacity,
the mark itself, and the mark after removal attacks and after rewrites that change no output, with and
without the owner's original; and what innocent models and wrong secrets say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Modification, Resources
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError
from sealmark.core.evidence import Evidence
from sealmark.core.files import atomic_write
from sealmark.core.identity import UserMark
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, WhiteBox
from sealmark.core.training import train_task
from sealmark.core.weights import weights_of
from sealmark.evaluate.artifacts import environment, finite, write_json
from sealmark.evaluate.measure import Effort, Ground, ground
from sealmark.evaluate.steps import generator
from sealmark.evaluate.whitebox_seals import seal_rows
from sealmark.evaluate.whitebox_text import as_markdown

SEEDS = (0, 1, 2)
_USERS = ("alice", "bob", "carol")
REMOVAL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fine-tuned", "fine_tune", {"epochs": 20, "rate": 0.05}),
    ("pruned by half", "prune", {"rate": 0.5}),
    ("int8", "quantize", {"bits": 8}),
)
REWRITES = ("permute", "rescale", "sign_flip", "dummy_neurons", "all four")


@dataclass(frozen=True)
class Entry:
    """One mark to measure.

    Attributes:
        scheme: its name.
        parameters: that differ from the defaults.
        trained: whether it goes into a trained model; otherwise it is trained in from scratch.
    """

    scheme: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False

    @property
    def title(self) -> str:
        """Scheme, settings and start, in words."""
        settings = [f"{name}={value}" for name, value in self.parameters.items()]
        return " ".join([self.scheme, *settings, *(["into a trained model"] if self.trained else [])])


@dataclass
class Marking:
    """A marked model and how to read it: a watermark's secret, or a user's mark.

    Attributes:
        base: of the seed.
        entry: what is measured.
        scheme: made from it.
        model: marked.
        secret: as embedding left it.
        original: what the owner aligns a suspect to: the unmarked start where there is one.
    """

    base: Ground
    entry: Entry
    scheme: Watermark | UserMark
    model: nn.Module
    secret: Secret
    original: nn.Module

    def read(self, model: nn.Module, *, align: bool = False, secret: Secret | None = None) -> dict[str, Any]:
        """log10 p and bit error rate; where the suspect's form cannot be read, p is 1 and that is said."""
        try:
            found = self._evidence(model, align, secret or self.secret)
        except ModelMismatchError:
            return {"log10_p": 0.0, "ber": None, "readable": False}
        return {"log10_p": found.log10_p, "ber": found.details.get("ber"), "readable": True}

    def _evidence(self, model: nn.Module, align: bool, secret: Secret) -> Evidence:
        if isinstance(self.scheme, Watermark):
            return self.scheme.verify(WhiteBox(model), secret, original=self.original if align else None)
        original = self.base.plain if align else weights_of(self.base.plain)
        return self.scheme.authenticate(WhiteBox(model), secret, _USERS[0], original=original)

    def wrong_secret(self, number: int) -> Secret:
        """Another secret of the same form."""
        return Secret(
            generator(self.base.seed, f"wrong {self.entry.title} {number}").bytes(32),
            self.secret.facts,
            self.secret.tensors,
        )


def mark(base: Ground, entry: Entry) -> Marking:
    """Put a mark into the model of one seed."""
    scheme = registry.scheme(entry.scheme, **entry.parameters)
    rng, start = base.generator(entry.title), base.plain if entry.trained else base.fresh
    if isinstance(scheme, UserMark):
        secret = scheme.enroll(base.plain, base.task, users=_USERS, rng=base.generator(f"secret {entry.title}"))
        model = scheme.issue(base.plain, secret, _USERS[0], task=base.task).model
        return Marking(base, entry, scheme, model, secret, base.plain)
    if not isinstance(scheme, Watermark):
        raise ParameterError(f"{entry.scheme} is no mark", expected="a watermark or a user mark")
    secret = scheme.keygen(start, base.task, rng=base.generator(f"secret {entry.title}"))
    marked = scheme.embed(start, secret, base.task, rng=rng, recipe=base.recipe)
    return Marking(base, entry, scheme, marked.model, marked.secret, base.plain if entry.trained else marked.model)


def figures(marking: Marking, innocent: Sequence[nn.Module], wrong: int) -> dict[str, Any]:
    """Everything about one mark, for one seed: plain values."""
    base, task = marking.base, marking.base.task
    found: dict[str, Any] = {
        "accuracy before": base.accuracy,
        "accuracy after": task.score(marking.model),
        "marked": marking.read(marking.model),
        "bits": _bits(marking),
    }
    for name, attack, parameters in REMOVAL:
        found[name] = _removed(marking, registry.modification(attack, **parameters))
    if isinstance(marking.scheme, Watermark):
        settings = dict(marking.entry.parameters)
        overwriting = registry.modification(
            "overwrite", scheme=marking.entry.scheme, settings=settings, epochs=20, rate=0.05
        )
        found["overwritten"] = _removed(marking, overwriting)
    found["rewrites"] = dict(rewrites(marking))
    found["independent"] = [marking.read(model)["log10_p"] for model in innocent]
    found["independent, aligned"] = [_aligned_p(marking, model) for model in innocent]
    found["wrong secrets"] = [
        marking.read(marking.model, secret=marking.wrong_secret(number))["log10_p"] for number in range(wrong)
    ]
    return found


def rewrites(marking: Marking) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each rewrite that keeps the function: how far outputs move, and the mark before and after alignment."""
    inputs = marking.base.task.test.inputs
    resources = Resources.of(marking.base.task, 0.0)
    before = WhiteBox(marking.model).logits(inputs)
    for name in REWRITES:
        model = marking.model
        for part in REWRITES[:-1] if name == "all four" else (name,):
            attack = registry.modification(part)
            model = attack.run(model, resources, rng=marking.base.generator(f"{name} {part}")).model
        moved = (WhiteBox(model).logits(inputs) - before).abs().max() / before.abs().max()
        yield (
            name,
            {
                "outputs moved by": float(moved),
                "as it is": marking.read(model),
                "aligned": _aligned(marking, model),
            },
        )


def _aligned(marking: Marking, model: nn.Module) -> dict[str, Any] | None:
    """What the mark says of a suspect that is aligned first; None where the scheme needs no alignment."""
    scheme = marking.scheme
    if isinstance(scheme, Watermark) and not scheme.access & (Access.WEIGHTS | Access.MODULE):
        return None
    return marking.read(model, align=True)


def _aligned_p(marking: Marking, model: nn.Module) -> float:
    found = _aligned(marking, model)
    return 0.0 if found is None else float(found["log10_p"])


def _removed(marking: Marking, attack: Modification) -> dict[str, Any]:
    task, rng = marking.base.task, marking.base.generator(f"{attack} on {marking.entry.title}")
    model = attack.run(marking.model, Resources.of(task), rng=rng).model
    return {"accuracy": task.score(model), **marking.read(model)}


def _bits(marking: Marking) -> int | None:
    for name in ("bits", "triggers"):
        if isinstance(marking.scheme, Watermark):
            details = marking.scheme.verify(WhiteBox(marking.model), marking.secret).details
            if name in details:
                return int(details[name])
    return None


def run(
    out: Path, entries: Sequence[Entry], *, seeds: Sequence[int] = SEEDS, wrong: int = 20, epochs: int = 15
) -> dict[str, Any]:
    """Measure, and write ``ownership-whitebox.json`` and ``.md`` into ``out``."""
    began, console = time.perf_counter(), Console(stderr=True)
    rows: dict[str, list[dict[str, Any]]] = {entry.title: [] for entry in entries}
    failed: dict[str, list[str]] = {}
    seals = []
    for seed in seeds:
        base = ground(seed, Effort(epochs=epochs))
        seals.append(seal_rows(base))
        innocent = [
            train_task(base.task, rng=base.generator(f"independent {i}"), recipe=base.recipe) for i in range(4)
        ]
        for entry in entries:
            console.print(f"seed {seed}: {entry.title}")
            try:
                rows[entry.title].append(figures(mark(base, entry), innocent, wrong))
            except MarkFailedError as error:
                failed.setdefault(entry.title, []).append(f"seed {seed}: {error}")
    result: dict[str, Any] = finite(
        {
            "environment": environment(),
            "seeds": list(seeds),
            "epochs": epochs,
            "entries": [asdict(entry) | {"title": entry.title} for entry in entries],
            "rows": rows,
            "failed": failed,
            "seals": seals,
            "seconds": round(time.perf_counter() - began),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "ownership-whitebox.json")
    with atomic_write(out / "ownership-whitebox.md") as file:
        file.write(as_markdown(result).encode())
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sealmark.evaluate.whitebox OUT [--seeds 0 1 2] [--only NAME ...]``."""
    parser = argparse.ArgumentParser(description="Measure every white-box mark on the digits.")
    parser.add_argument("out", type=Path, help="folder for ownership-whitebox.json and .md")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="repetitions")
    parser.add_argument("--only", nargs="+", default=(), help="schemes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = [entry for entry in ENTRIES if not chosen.only or entry.scheme in chosen.only]
    run(chosen.out, entries, seeds=chosen.seeds)


ENTRIES: tuple[Entry, ...] = (
    Entry("uchida"),
    Entry("uchida", trained=True),
    Entry("uchida", {"objective": "hinge"}),
    Entry("uchida", {"projection": "direct", "strength": 1.0}),
    Entry("uchida", {"projection": "diff", "strength": 1.0}),
    Entry("uchida", {"distill": True}, trained=True),
    Entry("greedy_residuals"),
    Entry("neuralmark"),
    Entry("deepsigns", trained=True),
    Entry("deepsigns", {"mode": "black-box"}, trained=True),
    Entry("passports"),
    Entry("passport_normalization"),
    Entry("memorization", {"carrier": "sign"}),
    Entry("memorization", {"carrier": "correlation"}),
    Entry("memorization", {"carrier": "lsb"}, trained=True),
    Entry("memorization", {"carrier": "capacity"}),
    Entry("riga"),
    Entry("diction", trained=True),
    Entry("deepmarks", trained=True),
    Entry("spread_spectrum", trained=True),
)

if __name__ == "__main__":
    main()
