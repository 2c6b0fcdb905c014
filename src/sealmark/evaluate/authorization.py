"""Figures of the locks: ``python -m sealmark.evaluate.authorization OUT``.

For every lock, over three seeds: service with the right key, with none, with wrong and with near keys; what
it costs; and what each attack gains over the same thief without the stolen model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from sealmark.core import registry
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.files import atomic_write
from sealmark.evaluate.artifacts import environment, finite, write_json
from sealmark.evaluate.authorization_text import as_markdown
from sealmark.evaluate.locks import TRIALS, LockEntry, Trial, lock_measures
from sealmark.evaluate.measure import Effort, Ground, ground
from sealmark.evaluate.plots import Plot, draw
from sealmark.evaluate.seeds import over_seeds

SEEDS = (0, 1, 2)
MEASURED = Path(__file__).parents[1] / "authorization" / "measured.json"  # goes with the package
RESULTS = Path(__file__).parents[3] / "docs" / "results"  # in a checkout
Run = dict[str, Any]


def measure(
    entries: Sequence[LockEntry], seed: int, epochs: int, trials: Sequence[Trial] = TRIALS
) -> dict[str, Run | str]:
    """All locks on the models of one seed; why one failed, where it did."""
    torch.set_num_threads(1)
    grounds: dict[tuple[str, int, int], Ground] = {}
    found: dict[str, Run | str] = {}
    console = Console(stderr=True)
    for entry in entries:
        began = time.perf_counter()
        name = entry.task or entry.make().card.task
        try:
            form = (name, entry.rows, entry.epochs)
            if form not in grounds:
                grounds[form] = ground(seed, Effort(epochs=epochs), name, rows=entry.rows, epochs=entry.epochs)
            found[entry.title] = lock_measures(grounds[form], entry, trials)
        except (MarkFailedError, ParameterError) as error:  # it did not take, or the task's data is not here
            found[entry.title] = str(error)
        console.print(f"seed {seed}: {entry.title}: {time.perf_counter() - began:.0f} s")
    return found


def run(
    out: Path,
    entries: Sequence[LockEntry],
    *,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 15,
    trials: Sequence[Trial] = TRIALS,
    workers: int = 1,
    beside: bool = False,
    measured: Path | None = None,
) -> dict[str, Any]:
    """Measure, and write ``authorization.json``, ``.md`` and two plots into ``out``.

    Args:
        out: made if missing.
        entries: the locks.
        seeds: one independent repetition each.
        epochs: of the owner's training on the digits.
        trials: the attacks.
        workers: processes, one seed in each at a time.
        beside: keep what ``out`` holds of other locks.
        measured: where to write what the package itself has to know: each lock's grade follows from it.
    """
    began = time.perf_counter()
    found = over_seeds(partial(measure, entries, epochs=epochs, trials=trials), seeds, workers)
    rows = {entry.title: [run for by in found if not isinstance(run := by[entry.title], str)] for entry in entries}
    failed = {entry.title: [run for by in found if isinstance(run := by[entry.title], str)] for entry in entries}
    result: dict[str, Any] = finite(
        {
            "environment": environment(),
            "seeds": list(seeds),
            "epochs": epochs,
            "entries": [asdict(entry) | {"title": entry.title} for entry in entries],
            "trials": [asdict(trial) for trial in trials],
            "rows": {title: runs for title, runs in rows.items() if runs},
            "failed": {title: notes for title, notes in failed.items() if notes},
            "seconds": round(time.perf_counter() - began),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    if beside:
        result = _merged(json.loads((out / "authorization.json").read_text("utf-8")), result)
    write_json(result, out / "authorization.json")
    with atomic_write(out / "authorization.md") as file:
        file.write(as_markdown(result).encode())
    for name, plot in plots(result).items():
        draw(plot, out / f"authorization-{name}.svg")
    if measured:
        write_json(digest(result), measured)
    return result


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new figures, and the old ones of other locks.

    Raises:
        ParameterError: those were measured in another way.
    """
    for name in ("seeds", "epochs", "trials"):
        if json.loads(json.dumps(new[name])) != old[name]:
            raise ParameterError(f"the figures there have other {name}", expected=old[name], found=new[name])
    measured = {entry["title"] for entry in new["entries"]}
    entries = [entry for entry in old["entries"] if entry["title"] not in measured] + new["entries"]
    merged = new | {"entries": entries, "seconds": old["seconds"] + new["seconds"]}
    for part in ("rows", "failed"):
        merged[part] = {title: kept for title, kept in old[part].items() if title not in measured} | new[part]
    return merged


def plots(result: dict[str, Any]) -> dict[str, Plot]:
    """Near-key curves, and what fine-tuning gains by the share of the data, of the locks as they are by default."""
    near, gains = {}, {}
    plain = {entry["title"] for entry in result["entries"] if not (entry["parameters"] or entry["task"])}
    for title, runs in sorted((title, runs) for title, runs in result["rows"].items() if title in plain):
        if runs[0]["near keys"]:
            shares = [0.0, *map(float, runs[0]["near keys"])]
            values = [[run["authorized"], *run["near keys"].values()] for run in runs]
            near[title] = list(zip(shares, map(fmean, zip(*values, strict=True)), strict=True))
        tuned = [trial for trial in result["trials"] if trial["attack"] == "fine_tune_unlock"]
        points = [(100 * trial["share"], _gain(runs, trial["title"])) for trial in tuned]
        gains[title] = [(share, gain) for share, gain in points if gain is not None]
    return {
        "near-keys": Plot("Service with a key that is wrong in places", "share of wrong entries", "accuracy", near),
        "gain": Plot(
            "What fine-tuning gains over training from scratch",
            "labeled rows of the thief, % of the owner's",
            "attacker gain",
            gains,
            (0.0, "worth nothing"),
            log=True,
            shown=(-1.0, 1.2),
        ),
    }


def _gain(runs: Sequence[Run], title: str) -> float | None:
    gains = [found["gain"] for run in runs if (found := run["attacks"].get(title)) and found["gain"] is not None]
    return fmean(gains) if gains else None


def digest(result: dict[str, Any]) -> dict[str, Any]:
    """What the package has to know of the figures: by scheme, of its default parameters, means over the seeds."""
    counted = [trial["title"] for trial in result["trials"] if trial["counts"]]
    chosen = {
        entry["scheme"]: entry["title"] for entry in result["entries"] if not (entry["parameters"] or entry["task"])
    }
    found: dict[str, Any] = {}
    for scheme, title in sorted(chosen.items()):
        runs = result["rows"].get(title)
        if not runs:
            continue
        gains = {name: gain for name in counted if (gain := _gain(runs, name)) is not None}
        best = max(gains, key=gains.__getitem__, default=None)
        means = {
            name: round(fmean(values), 4)
            for name in ("plain", "authorized", "no key", "lock seconds", "inference ratio", "effective key bits")
            if (values := [run[name] for run in runs if run[name] is not None])
        }
        wrong = [run["wrong keys"]["worst"] for run in runs if run["wrong keys"]["worst"] is not None]
        found[scheme] = means | {
            "seeds": len(runs),
            "worst wrong key": max(wrong, default=None),
            "best attack": best,
            "gain": None if best is None else round(gains[best], 4),
            "gains": {name: round(gain, 4) for name, gain in gains.items()},
        }
    return found


def entries() -> list[LockEntry]:
    """Every lock with its default parameters, and the settings that are worth comparing."""
    locks = [
        name
        for name, item in registry.items("scheme").items()
        if item.folder == "authorization" or "authorization" in item.card().function  # type: ignore[union-attr]
    ]
    return [*(LockEntry(name) for name in locks), *VARIANTS]


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sealmark.evaluate.authorization OUT [--seeds 0 1 2] [--only NAME ...] [--workers 2]``."""
    parser = argparse.ArgumentParser(description="Measure every lock.")
    parser.add_argument("out", type=Path, help="folder for authorization.json, .md and the plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="repetitions")
    parser.add_argument("--only", nargs="+", default=(), help="schemes; what OUT holds of others is kept")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    chosen = parser.parse_args(arguments)
    picked = [entry for entry in entries() if not chosen.only or entry.scheme in chosen.only]
    committed = tuple(chosen.seeds) == SEEDS and chosen.out.resolve() == RESULTS
    run(
        chosen.out,
        picked,
        seeds=chosen.seeds,
        workers=chosen.workers,
        beside=bool(chosen.only) and (chosen.out / "authorization.json").is_file(),
        measured=MEASURED if committed else None,
    )


_MNIST = {"rows": 6000, "epochs": 8}  # as the digits are too small for large blocks
VARIANTS: tuple[LockEntry, ...] = (
    LockEntry("chen_wu", {"negatives": 0}),
    LockEntry("chen_wu", {"kind": "input_specific"}),
    LockEntry("model_lock", {"negatives": 0}),
    LockEntry("selective_encryption", {"share": 0.08}),
    LockEntry("block_transform", {}, "mnist", **_MNIST),
    LockEntry("block_transform", {"kind": "shuffle", "block": 14}, "mnist", **_MNIST),
    LockEntry("block_transform", {"kind": "shuffle", "block": 2}, "mnist", **_MNIST),
)

if __name__ == "__main__":
    main()
