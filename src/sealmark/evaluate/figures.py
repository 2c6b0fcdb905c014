"""The figures of all schemes and attacks over three seeds: ``python -m sealmark.evaluate.figures OUT``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sealmark.core.evidence import DEFAULT_ALPHA
from sealmark.core.files import atomic_write
from sealmark.evaluate.artifacts import environment, finite, write_json
from sealmark.evaluate.figures_text import as_markdown
from sealmark.evaluate.measure import (
    Effort,
    Figures,
    attack_rows,
    fleet,
    ground,
    issue_figures,
    neural_lock_figures,
    null_log10_p,
    seal_figures,
    sealed_file_figures,
    watermark_figures,
)
from sealmark.evaluate.requirements import TRACED, judged
from sealmark.stats.calibration import super_uniformity

SEEDS = (0, 1, 2)
_PLAUSIBLE = 0.01  # a smaller p-value of the test for super-uniformity says that a null does not hold
_MARKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("uchida", "from scratch", {}),
    ("uchida", "fine-tuning", {}),
    ("uchida", "own loop", {}),
    ("uchida", "from scratch", {"layer": "conv3.weight"}),
    ("adi", "from scratch", {}),
    ("adi", "fine-tuning", {}),
    ("adi", "own loop", {}),
)


def measure_seed(seed: int, effort: Effort, console: Console) -> dict[str, Any]:
    """Everything for one seed: ``figures`` by (group, part), ``attacks`` by name, ``nulls`` by name."""
    base = ground(seed, effort)
    found: dict[tuple[str, str], Figures] = {("plain", "trained without a mark"): {"accuracy": base.accuracy}}
    for name, mode, parameters in _MARKS:
        part = f"{mode}, {parameters['layer']}" if parameters else mode
        console.print(f"seed {seed}: {name} {part}")
        found[name, part] = watermark_figures(base, name, mode, **parameters)
    console.print(f"seed {seed}: locks and seals")
    with tempfile.TemporaryDirectory() as folder:
        found["sealed", "file"] = sealed_file_figures(base, Path(folder))
    found["chaotic_weights", "network"] = neural_lock_figures(base)
    found["reversible", "network"] = seal_figures(base)
    console.print(f"seed {seed}: users, attacks, nulls")
    ships = fleet(base)
    found["spread_spectrum", "as issued"] = issue_figures(ships)
    return {"figures": found, "attacks": attack_rows(ships), "nulls": null_log10_p(ships)}


def run_figures(
    out: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    effort: Effort | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, and write ``figures.json`` and ``figures.md`` into ``out``.

    The same seeds give the same figures on one machine, costs in seconds apart.

    Args:
        out: made if missing.
        seeds: one independent repetition each.
        effort: how much is measured.
        console: for progress; standard error by default.

    Returns:
        What stands in ``figures.json``.
    """
    began, effort, console = time.perf_counter(), effort or Effort(), console or Console(stderr=True)
    runs = [measure_seed(seed, effort, console) for seed in seeds]
    result: dict[str, Any] = finite(
        {
            "environment": environment(),
            "seeds": list(seeds),
            "effort": asdict(effort),
            "figures": _figures([run["figures"] for run in runs]),
            "attacks": _attacks([run["attacks"] for run in runs]),
            "nulls": _nulls([run["nulls"] for run in runs]),
            "seconds": round(time.perf_counter() - began),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "figures.json")
    with atomic_write(out / "figures.md") as file:
        file.write(as_markdown(result).encode())
    return result


def _figures(runs: Sequence[Mapping[tuple[str, str], Figures]]) -> list[dict[str, Any]]:
    return [
        judged(group, part, name, [run[group, part][name] for run in runs])
        for group, part in runs[0]
        for name in runs[0][group, part]
    ]


def _attacks(runs: Sequence[Mapping[str, Figures]]) -> list[dict[str, Any]]:
    """Mean and extremes of each attack; whom the trace named, over all seeds."""
    rows = []
    for attack in runs[0]:
        values = {name: [run[attack][name] for run in runs] for name in runs[0][attack]}
        known = {name: [v for v in column if v is not None] for name, column in values.items()}
        named = all(value and value >= 1 for value in values["guilty accused"])
        innocent = not any(values["innocent accused"])
        rows.append(
            {
                "attack": attack,
                "values": values,
                "mean": {name: float(np.mean(c)) if c else None for name, c in known.items()},
                "requirement": "a guilty user is named, nobody else"
                if attack in TRACED
                else "nobody else is named",
                "met": innocent and (named or attack not in TRACED),
            }
        )
    return rows


def _nulls(runs: Sequence[Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for name in runs[0]:
        values = [value for run in runs for value in run[name]]
        p_values = [10**value for value in values]
        fit = super_uniformity(p_values) if len(p_values) >= 10 else None
        rows.append(
            {
                "name": name,
                "count": len(values),
                "smallest": min(p_values),
                "matches": sum(p <= DEFAULT_ALPHA for p in p_values),
                "super_uniformity": fit,
                "met": min(p_values) > DEFAULT_ALPHA and (fit is None or fit >= _PLAUSIBLE),
                "log10_p": sorted(values),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sealmark.evaluate.figures OUT [--seeds 0 1 2]``."""
    parser = argparse.ArgumentParser(description="Measure every scheme and attack on the digits.")
    parser.add_argument("out", type=Path, help="folder for figures.json and figures.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="repetitions")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run_figures(chosen.out, seeds=chosen.seeds)


if __name__ == "__main__":
    main()
