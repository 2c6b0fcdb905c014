"""What a mark costs: each training step beside the plain step, and reading a mark of ten million weights.

    python benchmarks/training.py [--rounds 15] [--out docs/results/training-speed.md]

ResNet-9, 128 images a step, one thread, full precision. Plain and marked steps take turns in one run and
each ratio is one of medians: only ratios mean something.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train
from sealmark.tasks.cifar10 import ResNet9

ROWS = 128
# scheme, parameters, aim
MARKS: list[tuple[str, dict[str, Any], float | None]] = [
    ("uchida", {}, 1.05),
    ("greedy_residuals", {}, 1.05),
    ("neuralmark", {}, 1.05),
    ("memorization", {"carrier": "sign"}, 1.05),
    ("memorization", {"carrier": "correlation"}, 1.05),
    ("deepsigns", {}, 1.5),
    ("diction", {}, 1.5),
    ("passports", {}, 1.5),
    ("passport_normalization", {}, None),
]


def task() -> Task:
    """Random images: what they show does not matter here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(ROWS, 3, 32, 32, generator=generator)
    rows = Batch(images, torch.randint(10, (ROWS,), generator=generator))
    return Task(
        "images", ResNet9, rows, rows, rows, classes=10, recipe=Recipe(epochs=1, batch_size=ROWS, rate=1e-4)
    )


def step_costs(made: Task, rounds: int) -> list[tuple[str, float, float | None]]:
    """(mark, ratio of its step to the plain step, aim)."""
    results = []
    for name, parameters, aim in MARKS:
        scheme = cast("Watermark", registry.scheme(name, **parameters))
        model = made.model(np.random.default_rng(0))
        secret = scheme.keygen(model, made, rng=np.random.default_rng(1))
        marked = made.model(np.random.default_rng(0))
        embedding = scheme.embedding(marked, secret, made, np.random.default_rng(2))
        plain, ours = [], []
        for _ in range(rounds):
            plain.append(_step(made, model, [], []))
            ours.append(_step(made, marked, embedding.terms, embedding.extras))
        title = " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])
        results.append((title, statistics.median(ours[2:]) / statistics.median(plain[2:]), aim))
    return results


def _step(made: Task, model: nn.Module, terms: list[Any], extras: list[Any]) -> float:
    began = time.perf_counter()
    rng = np.random.default_rng(3)
    train(model, made.owner, loss=made.loss, recipe=made.recipe, rng=rng, terms=terms, extras=extras)
    return time.perf_counter() - began


def reading() -> list[tuple[str, float, float]]:
    """(scheme, seconds to verify a mark in a network of ten million weights, and after alignment)."""
    model = nn.Sequential(nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 1900), nn.ReLU(), nn.Linear(1900, 10))
    results = []
    for name in ("uchida", "greedy_residuals", "neuralmark"):
        scheme = cast("Watermark", registry.scheme(name))
        secret = scheme.keygen(model, rng=np.random.default_rng(0))
        seconds = []
        for original in (None, model):
            cold = Secret(secret.reveal_seed(), secret.facts)  # what follows from the seed is drawn anew
            began = time.perf_counter()
            scheme.verify(WhiteBox(model), cold, original=original)
            seconds.append(time.perf_counter() - began)
        results.append((name, *seconds))
    return results


def main() -> None:
    """Measure and print; with --out also write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    costs, read = step_costs(task(), chosen.rounds), reading()
    lines = [
        "# Cost of marking",
        "",
        f"Written by `make bench`; one thread, ResNet-9, {ROWS} images a step, {chosen.rounds} rounds.",
        "",
        "| mark | step, marked / plain | aim |",
        "|---|---|---|",
        *(f"| {name} | {ratio:.3f} | {aim or ''} |" for name, ratio, aim in costs),
        "",
        "| verifying ten million weights, from the seed | seconds | aim | aligned to the original first |",
        "|---|---|---|---|",
        *(f"| {name} | {seconds:.2f} | 1 | {aligned:.1f} |" for name, seconds, aligned in read),
        "",
    ]
    text = "\n".join(lines)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
