"""Run one experiment: ``python experiments/run.py cifar10-uchida`` reads params.toml, writes result.json.

An experiment marks one model of a task and compares it with the same training without the mark. The
plain models are kept in ``.models`` (not committed), so that the experiments of a task share them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.ownership import Watermark
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Task
from sealmark.core.training import train, train_task
from sealmark.core.weights import save_model
from sealmark.evaluate.markdown import table
from sealmark.runtime.models import load_weights

FOLDER = Path(__file__).parent


def plain_model(task: Task, seed: int) -> tuple[nn.Module, float]:
    """The model that the owner trains without a mark, and how many seconds its training took."""
    path = FOLDER / ".models" / f"{task.name}-{task.recipe.epochs}-{seed}.safetensors"
    began = time.perf_counter()
    if path.is_file():
        model = task.model(np.random.default_rng(seed))
        load_weights(model, path)
    else:
        model = train_task(task, rng=np.random.default_rng(seed), on_epoch=_tell)
        path.parent.mkdir(exist_ok=True)
        save_model(model, path)
    return model, time.perf_counter() - began


def run(params: dict[str, Any]) -> dict[str, Any]:
    """One result for each seed."""
    task = registry.task(params["task"])
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, **params.get("recipe", {})))
    return {
        "task": task.name,
        "recipe": dataclasses.asdict(task.recipe),
        "runs": [_one(task, params, seed) for seed in params["seeds"]],
    }


def _one(task: Task, params: dict[str, Any], seed: int) -> dict[str, Any]:
    plain, seconds = plain_model(task, seed)
    found: dict[str, Any] = {"seed": seed, "accuracy_plain": task.score(plain)}
    if "scheme" not in params:
        return found | {"parameters": sum(p.numel() for p in plain.parameters()), "seconds_plain": seconds}
    scheme = cast("Watermark", registry.scheme(params["scheme"], **params.get("parameters", {})))
    rng = np.random.default_rng(seed)
    trained = params.get("start", "scratch") == "trained"
    start = plain if trained else task.model(rng)
    secret = scheme.keygen(start, task, rng=np.random.default_rng([1, seed]))
    recipe = dataclasses.replace(task.recipe, **params.get("embedding", {}))
    if trained:  # as long without the mark: what the mark costs, apart from the training
        control = copy.deepcopy(plain)
        train(
            control,
            task.owner,
            loss=task.loss,
            recipe=recipe,
            rng=np.random.default_rng(seed),
            augment=task.augment,
        )
        found["accuracy_plain"], found["accuracy_start"] = task.score(control), found["accuracy_plain"]
    began = time.perf_counter()
    marked = scheme.embed(start, secret, task, rng=rng, recipe=recipe, on_epoch=_tell)
    seconds = time.perf_counter() - began
    save_model(marked.model, FOLDER / ".models" / f"{params['name']}-{seed}.safetensors")
    return found | {
        "accuracy_marked": task.score(marked.model),
        "evidence": _plain(scheme.verify(WhiteBox(marked.model), marked.secret)),
        "control_independent_model": _plain(scheme.verify(WhiteBox(plain), marked.secret)),
        "seconds_marked": seconds,
        **_after(task, scheme, marked.model, marked.secret, seed),
    }


def _after(task: Task, scheme: Watermark, model: nn.Module, secret: Any, seed: int) -> dict[str, Any]:
    """The mark after pruning half of the weights and after fine-tuning on the attacker's rows."""
    from sealmark.core.attack import Resources

    found = {}
    for name, parameters in (("prune", {"rate": 0.5}), ("fine_tune", {"epochs": 5, "rate": 0.01})):
        attack = registry.modification(name, **parameters)
        surrogate = attack.run(model, Resources.of(task), rng=np.random.default_rng([2, seed])).model
        found[f"after_{name}"] = {
            "parameters": parameters,
            "accuracy": task.score(surrogate),
            **_plain(scheme.verify(WhiteBox(surrogate), secret)),
        }
    return found


def _plain(evidence: Any) -> dict[str, Any]:
    return {"verdict": str(evidence.verdict), "log10_p": evidence.log10_p, **evidence.details}


def _tell(epoch: int, epochs: int, loss: float) -> None:
    sys.stderr.write(f"epoch {epoch} of {epochs}, loss {loss:.3f}\n")


def page() -> str:
    """README.md: what every experiment came to, beside the paper's figure."""
    rows = []
    for folder in sorted(path.parent for path in FOLDER.glob("*/result.json")):
        params = tomllib.loads((folder / "params.toml").read_text("utf-8"))
        result = json.loads((folder / "result.json").read_text("utf-8"))
        rows += [[folder.name, *_cells(run), *_paper(params)] for run in result["runs"]]
    head = [
        "experiment",
        "seed",
        "plain",
        "marked",
        "mark",
        "pruned by half",
        "fine-tuned",
        "paper: plain",
        "marked",
    ]
    return _INTRODUCTION + "\n" + "\n".join(table(head, rows))


_INTRODUCTION = """\
# Experiments

One folder an experiment: `params.toml` says what is run, `result.json` what came out. `SEALMARK_DATA` names a
folder with `cifar10/train.parquet` and `test.parquet` in the Hugging Face layout; `make setup` brings what reads
them.

    python experiments/run.py cifar10-plain      # first: the others compare with its model
    python experiments/run.py cifar10-uchida
    python experiments/run.py                    # this page

ResNet-9 of width 16, 45,000 rows (JPEG at quality 75, so a little under the original set), 6 to 8 epochs in mixed
precision on one thread; one seed, so that differences of half a point say little. The papers train larger nets for
200 epochs: their accuracies stand beside ours and are not to be reached. Cells: accuracy; BER, log10 p. Fine-tuned:
5 epochs at 0.01 on 5,000 other rows. Where a mark goes into a trained model, plain is that model trained on as long
without the mark. Each `params.toml` tells the paper's setting.
"""


def _cells(run: dict[str, Any]) -> list[str]:
    def mark(found: dict[str, Any] | None) -> str:
        return f"{found['ber']:.3f}, {found['log10_p']:.0f}" if found else ""

    def after(found: dict[str, Any] | None) -> str:
        return f"{found['accuracy']:.4f}; {mark(found)}" if found else ""

    marked = run.get("accuracy_marked")
    return [
        str(run["seed"]),
        f"{run['accuracy_plain']:.4f}",
        f"{marked:.4f}" if marked else "",
        mark(run.get("evidence")),
        after(run.get("after_prune")),
        after(run.get("after_fine_tune")),
    ]


def _paper(params: dict[str, Any]) -> list[str]:
    paper = params.get("paper", {})
    return [str(paper.get(name, "")) for name in ("accuracy_plain", "accuracy_marked")]


def main(name: str) -> None:
    """Run the experiment of that folder."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    params = tomllib.loads((FOLDER / name / "params.toml").read_text("utf-8")) | {"name": name}
    result = run(params)
    (FOLDER / name / "result.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    (FOLDER / "README.md").write_text(page(), "utf-8")
