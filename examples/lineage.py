"""Is one transformer derived from another? AWM, HuRef and REEF on all-MiniLM-L6-v2 and on small nets.

    pip install sealmark[transformers]
    python examples/lineage.py --out docs/results

Nobody marked these models. Derived ones are fine-tuned, pruned, quantized, permuted, rotated; unrelated ones
are small nets trained from other seeds, and, for want of a second model of its kind, untrained nets in the
form of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from minilm import reordered
from paraphrases import load_encoder, paraphrases
from rich.console import Console
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.files import atomic_write
from sealmark.core.ownership import Fingerprint
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Recipe, Task
from sealmark.core.training import train_task
from sealmark.evaluate.artifacts import environment, write_json
from sealmark.evaluate.markdown import number, table
from sealmark.evaluate.steps import generator

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "awm": ("awm", {}),
    "awm, assignment alone": ("awm", {"matching": "assignment"}),
    "huref": ("huref", {}),
    "reef": ("reef", {}),
}
READS = ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")
READS_SMALL = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")
WRITES = ("attention.output.dense.weight", "output.dense.weight", "o_proj.weight", "down_proj.weight")


def turned(model: nn.Module, seed: int = 5) -> nn.Module:
    """The residual stream in another basis, as conversions to rotated nets leave the weights."""
    result = copy.deepcopy(model)
    tables = [p for name, p in result.named_parameters() if "word_embeddings" in name or "embed_tokens" in name]
    width = tables[0].shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
    with torch.no_grad():
        tables[0].copy_(tables[0] @ turn)
        for name, weight in result.named_parameters():
            if name.endswith(WRITES):
                weight.copy_(turn.T @ weight)
            elif name.endswith((*READS, *READS_SMALL)):
                weight.copy_(weight @ turn)
    return result


def attacked(task: Task, model: nn.Module, name: str, **parameters: Any) -> nn.Module:
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(task), rng=generator(0, name)).model


def measured(
    task: Task,
    model: nn.Module,
    derived: dict[str, nn.Module],
    references: Sequence[nn.Module],
    strangers: Sequence[nn.Module],
) -> dict[str, Any]:
    """Similarity of every derived model, and the range over references and strangers, by method."""
    rows: dict[str, dict[str, float]] = {name: {} for name in derived}
    ranges = {}
    for title, (name, parameters) in METHODS.items():
        scheme = cast("Fingerprint", registry.scheme(name, **parameters))
        secret = scheme.enroll(model, task, references=references, rng=np.random.default_rng(0))
        for kind, suspect in derived.items():
            rows[kind][title] = scheme.score(WhiteBox(suspect), secret).statistic
        found = [scheme.score(WhiteBox(suspect), secret).statistic for suspect in strangers]
        ranges[title] = {"references": secret.host["null"], "strangers": found}
    return {"derived": rows, "unrelated": ranges}


def small() -> dict[str, Any]:
    """Transformers of 130,000 parameters, trained here."""
    task, rng = registry.task("tokens"), np.random.default_rng
    base = train_task(task, rng=rng(0))
    others = [
        train_task(task, rng=rng(100 + i), recipe=Recipe(1 + i % 8, 64, task.recipe.rate, clip=1.0))
        for i in range(40)
    ]
    derived = {
        "fine-tuned": attacked(task, base, "fine_tune", epochs=10, rate=0.1),
        "50 % pruned": attacked(task, base, "prune", rate=0.5),
        "int8": attacked(task, base, "quantize", bits=8),
        "permuted": attacked(task, base, "permute"),
        "rotated": turned(base),
        "rotated and pruned": attacked(task, turned(base), "prune", rate=0.5),
    }
    return measured(task, base, derived, others[:20], others[20:])


def minilm() -> dict[str, Any]:
    """all-MiniLM-L6-v2, 22.7 M parameters."""
    model, task = load_encoder(), paraphrases()
    untrained = [task.model(np.random.default_rng(100 + i)) for i in range(24)]
    order = torch.from_numpy(generator(0, "order").permutation(model.config.hidden_size))
    derived = {
        "fine-tuned": attacked(task, model, "fine_tune", rate=0.2, epochs=5),
        "50 % pruned": attacked(task, model, "prune", rate=0.5),
        "int8": attacked(task, model, "quantize", scheme="channel"),
        "permuted": reordered(model, order),
        "rotated": turned(model),
        "rotated and pruned": attacked(task, turned(model), "prune", rate=0.5),
    }
    return measured(task, model, derived, untrained[:20], untrained[20:])


def as_markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Lineage",
        "",
        "Is one transformer derived from another that nobody marked? Similarities, 1 for the same weights. Written",
        "by `make lineage`; do not edit. With 20 unrelated models p is 1/21 at the least: no claim at 1e-6.",
        "",
    ]
    titles = {
        "small": "Small transformers (130,000 parameters; unrelated: 40 trained from other seeds)",
        "minilm": "all-MiniLM-L6-v2 (22.7 M parameters; unrelated: 24 untrained nets of its form, a weaker null)",
    }
    for part, title in titles.items():
        if part not in found:
            continue
        rows = [[kind, *(number(value[m]) for m in METHODS)] for kind, value in found[part]["derived"].items()]
        for name in ("references", "strangers"):
            values = [found[part]["unrelated"][m][name] for m in METHODS]
            rows.append(
                [
                    f"unrelated ({name}), least to largest",
                    *(f"{number(min(v))} to {number(max(v))}" for v in values),
                ]
            )
        lines += [f"## {title}", "", *table(["suspect", *METHODS], rows)]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for lineage.json and lineage.md.")],
    only: Annotated[str, typer.Option(help="small, minilm, or both.")] = "both",
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    found: dict[str, Any] = {}
    for name, measure in {"small": small, "minilm": minilm}.items():
        if only in (name, "both"):
            console.print(name)
            found[name] = measure()
    write_json({"environment": environment(), **found}, out / "lineage.json")
    with atomic_write(out / "lineage.md") as file:
        file.write(as_markdown(found).encode())


if __name__ == "__main__":
    typer.run(main)
