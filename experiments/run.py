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

from sealmark.blackbox.answer_key import Answered, AnswerKey
from sealmark.core import registry
from sealmark.core.attack import Extraction, Resources
from sealmark.core.credentials import CredentialMark
from sealmark.core.identity import UserMark
from sealmark.core.lock import Lock
from sealmark.core.ownership import Fingerprint, Verifiable, Watermark
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Task
from sealmark.core.training import train, train_task
from sealmark.core.weights import save_model
from sealmark.evaluate.copies import MarkEntry, copy_figures, joined
from sealmark.evaluate.credentials import CredentialEntry, credential_figures
from sealmark.evaluate.identity_text import COPY_HEAD, copy_cells, credential_tables
from sealmark.evaluate.locks import LockEntry, Trial, lock_measures
from sealmark.evaluate.markdown import number, table
from sealmark.evaluate.measure import Effort, Ground
from sealmark.ownership.dawn import Dawn
from sealmark.runtime.models import load_weights

FOLDER = Path(__file__).parent
_JUDGED = 2500  # test rows behind each of the many figures of a lock


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
    scheme = registry.scheme(params["scheme"], **params.get("parameters", {}))
    if isinstance(scheme, Lock):
        return found | _locked(task, params, seed, plain)
    if isinstance(scheme, UserMark | CredentialMark):
        return found | _identified(task, params, seed, plain)
    protect = (
        _served if params.get("start") == "served" else _marked if isinstance(scheme, Watermark) else _enrolled
    )
    return protect(task, params, seed, cast("Any", scheme), plain, found)


def _base(task: Task, seed: int, plain: nn.Module) -> Ground:
    """What measuring functions need, judged on the first of the test rows."""
    judged = dataclasses.replace(task, test=task.test.take(slice(0, _JUDGED)))
    return Ground(judged, seed, Effort(), task.model(np.random.default_rng(seed)), plain, judged.score(plain))


def _identified(task: Task, params: dict[str, Any], seed: int, plain: nn.Module) -> dict[str, Any]:
    """Marks in users' copies and whom a trace names, or credentials and who is let in."""
    base, given = _base(task, seed, plain), params.get("parameters", {})
    if "users" in params:
        return {"credentials": credential_figures(base, CredentialEntry(params["scheme"], given, params["users"]))}
    entry = MarkEntry(params["scheme"], given, tuple(params["sizes"]), params["repeats"])
    return {"copies": copy_figures(base, entry)}


def _locked(task: Task, params: dict[str, Any], seed: int, plain: nn.Module) -> dict[str, Any]:
    """A lock: service by key, and what attacks gain, judged on the first of the test rows."""
    trials = [Trial(**entry) for entry in params["attacks"]]
    return lock_measures(
        _base(task, seed, plain), LockEntry(params["scheme"], params.get("parameters", {})), trials
    )


def _marked(
    task: Task, params: dict[str, Any], seed: int, scheme: Watermark, plain: nn.Module, found: dict[str, Any]
) -> dict[str, Any]:
    """A watermark: beside the same training without it."""
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
        **_after(task, params, scheme, marked.model, marked.secret, seed),
    }


def _enrolled(
    task: Task, params: dict[str, Any], seed: int, scheme: Fingerprint, plain: nn.Module, found: dict[str, Any]
) -> dict[str, Any]:
    """A fingerprint: the model stays as it is, and its law comes from models that were trained apart."""
    others = [_reference(task, params, 100 * (seed + 1) + i) for i in range(params["references"]["count"] + 2)]
    began = time.perf_counter()
    secret = scheme.enroll(plain, task, references=others[2:], rng=np.random.default_rng([1, seed]))
    return found | {
        "evidence": _plain(scheme.verify(WhiteBox(plain), secret)),
        "control_independent_models": [_plain(scheme.verify(WhiteBox(model), secret)) for model in others[:2]],
        "accuracy_references": [task.score(model) for model in others],
        "seconds_enrolled": time.perf_counter() - began,
        **_after(task, params, scheme, plain, secret, seed),
    }


def _served(
    task: Task, params: dict[str, Any], seed: int, scheme: Dawn, plain: nn.Module, found: dict[str, Any]
) -> dict[str, Any]:
    """DAWN: a client steals the plain model through its service, which falsifies some of his answers."""
    secret = scheme.keygen(plain, task, rng=np.random.default_rng([1, seed]))
    for entry in params["attacks"]:
        parameters = dict(entry)
        title = parameters.pop("title")
        attack = cast("Extraction", registry.attack(parameters.pop("attack", title), **parameters))
        service = _Service(AnswerKey(secret), WhiteBox(plain))
        suspect = BlackBox(service.scores, returns="probabilities")
        if attack.returns == "label":
            suspect = BlackBox(lambda rows, ask=service.scores: ask(rows).argmax(1), returns="label")
        model, _ = attack.extract(suspect, Resources.of(task), np.random.default_rng([2, seed]))
        known = scheme.register(secret, service.answers)
        found[f"after_{title}"] = {
            "parameters": parameters,
            "accuracy": task.score(model),
            "queries": suspect.queries,
            **_plain(scheme.verify(WhiteBox(model), known)),
        }
        found["control_independent_model"] = _plain(
            scheme.verify(WhiteBox(_bare(attack, plain, task, seed)), known)
        )
        found["served_wrongly"] = len(service.answers) / suspect.queries
        sys.stderr.write(f"{title}: {found[f'after_{title}']}\n")
    return found


def _bare(attack: Extraction, plain: nn.Module, task: Task, seed: int) -> nn.Module:
    """What the same thief gets of the same service without the middleware."""
    suspect = BlackBox(WhiteBox(plain).probabilities, returns="probabilities")
    return attack.extract(suspect, Resources.of(task), np.random.default_rng([2, seed]))[0]


class _Service:
    """A prediction service for one client, as the middleware makes it."""

    def __init__(self, key: AnswerKey, model: WhiteBox) -> None:
        self._key, self._model, self.answers = key, model, list[Answered]()

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities; those of selected queries are permuted, and registered."""
        answer, asked = self._model.probabilities(rows), self._key.read(rows.numpy())
        for row, bits in enumerate(self._key.bits(asked)):
            if self._key.selects("thief", bits):
                natural = int(answer[row].argmax())
                self.answers.append(Answered("thief", bits, asked[row].tobytes(), natural))
                answer[row] = answer[row][self._key.order("thief", bits, natural)]
        return answer


def _reference(task: Task, params: dict[str, Any], seed: int) -> nn.Module:
    """An independent model on a random share of the owner's rows; kept in ``.models``."""
    epochs, share = params["references"]["epochs"], params["references"]["share"]
    path = FOLDER / ".models" / f"{task.name}-reference-{epochs}-{share}-{seed}.safetensors"
    rng = np.random.default_rng(seed)
    model = task.model(rng)
    if path.is_file():
        load_weights(model, path)
        return model
    rows = task.owner.take(torch.from_numpy(rng.permutation(task.owner.rows)[: round(share * task.owner.rows)]))
    recipe = dataclasses.replace(task.recipe, epochs=epochs)
    model = train_task(task, rng=rng, rows=rows, recipe=recipe, on_epoch=_tell)
    path.parent.mkdir(exist_ok=True)
    save_model(model, path)
    return model


_ATTACKS: tuple[dict[str, Any], ...] = (
    {"title": "prune", "rate": 0.5},
    {"title": "fine_tune", "epochs": 5, "rate": 0.01},
)


def _after(
    task: Task, params: dict[str, Any], scheme: Verifiable, model: nn.Module, secret: Any, seed: int
) -> dict[str, Any]:
    """The mark after each attack, by default pruning and fine-tuning, with the attacker's rows."""
    found = {}
    for entry in params.get("attacks", _ATTACKS):
        parameters = dict(entry)
        title = parameters.pop("title")
        attack = registry.modification(parameters.pop("attack", title), **parameters)
        result = attack.run(model, Resources.of(task), rng=np.random.default_rng([2, seed]))
        found[f"after_{title}"] = {
            "parameters": parameters,
            "accuracy": task.score(result.model),
            "queries": result.cost.queries,
            **_plain(scheme.verify(WhiteBox(result.model), secret)),
        }
        sys.stderr.write(f"{title}: {found[f'after_{title}']}\n")
    return found


def _plain(evidence: Any) -> dict[str, Any]:
    return {"verdict": str(evidence.verdict), "log10_p": evidence.log10_p, **evidence.details}


def _tell(epoch: int, epochs: int, loss: float) -> None:
    sys.stderr.write(f"epoch {epoch} of {epochs}, loss {loss:.3f}\n")


def page() -> str:
    """README.md: what every experiment came to, beside the paper's figure."""
    weights, answers, locks = [], [], []
    copies: list[list[str]] = []
    credentials: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(path.parent for path in FOLDER.glob("*/result.json")):
        params = tomllib.loads((folder / "params.toml").read_text("utf-8"))
        result = json.loads((folder / "result.json").read_text("utf-8"))
        by_answers = "attacks" in params
        for run in result["runs"]:
            if "copies" in run:
                cells = run["copies"]["pooled"]
                copies += [
                    [folder.name, *copy_cells(way, size, joined([cell]))]
                    for way, sizes in cells.items()
                    for size, cell in sizes.items()
                ]
                continue
            if "credentials" in run:
                credentials.setdefault(folder.name, []).append(run["credentials"])
                continue
            if "authorized" in run:
                locks.append([folder.name, *_lock_cells(run), *_lock_paper(params)])
                continue
            names = ["prune", "fine_tune"] + ["knockoff_probabilities", "knockoff_label"] * by_answers
            (answers if by_answers else weights).append([folder.name, *_cells(run, names), *_paper(params)])
    head = ["experiment", "seed", "plain", "marked", "mark", "pruned by half", "fine-tuned"]
    paper = ["paper: plain", "marked", "mark"]
    asked = [*head, "knockoff, probabilities", "knockoff, labels", "independent", *paper]
    return "\n".join(
        [
            _INTRODUCTION,
            "## Marks in weights and activations\n",
            *table([*head, "independent", *paper], weights),
            "## Marks in answers\n",
            *table(asked, answers),
            _NOT_REPRODUCED,
            *([_LOCKS, *table(_LOCK_HEAD, locks)] if locks else []),
            *([_COPIES, *table(["experiment", *COPY_HEAD], copies)] if copies else []),
            *(["## Credentials\n", *credential_tables(credentials)] if credentials else []),
        ]
    )


_NOT_REPRODUCED = """\
Did not reproduce at this length of training: `dawn` (of 49 wrong answers the thief's 40 epochs learn 15, p 2e-4,
short of the level; the paper trains for 250 epochs, and 20 epochs learned 4), `dataset_inference` (a network of
6 epochs knows its own rows no better than others: p 0.66 on the victim itself), `conferrable` (surrogates match
0.67 and 0.89 of the points, an innocent model 0.89; and six references certify 1 in 7 at best), and, as the
tables show, any trigger mark under extraction.
"""

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
200 epochs: their accuracies stand beside ours and are not to be reached. Cells: accuracy; BER or match rate, log10
p.
Fine-tuned: 5 epochs at 0.01 on 5,000 other rows. Knockoff: a fresh network, 12 or 20 epochs on the answers to those
and to 400 blends. Where a mark goes into a trained model, plain is that model trained on as long without it.
Each `params.toml` tells the paper's setting.
"""


_LOCKS = """\
## Locks

Judged on 2,500 test rows. Fine-tuned: what a thief with as many rows as a tenth of the owner's gets of the locked
model, beside what he gets without it, and the gain.
"""
_COPIES = """\
## Marks in users' copies

20 users have copies, and 1,020 names are looked at in every trace; see docs/results/identity.md for the columns.
"""
_LOCK_HEAD = [
    *(
        "experiment",
        "seed",
        "plain",
        "right key",
        "no key",
        "wrong keys, mean",
        "worst of 20",
        "10 % of the key wrong",
    ),
    *("fine-tuned", "scratch", "gain", "paper: right key", "no key", "source"),
]


def _lock_cells(run: dict[str, Any]) -> list[str]:
    [tuned] = [found for title, found in run["attacks"].items() if title.startswith("fine-tuned")] or [None]
    near = (run["near keys"] or {}).get("0.1")
    wrong = run["wrong keys"]
    figures = [run["plain"], run["authorized"], run["no key"], wrong["mean"], wrong["worst"], near]
    attacked = [tuned["accuracy"], tuned["scratch"], tuned["gain"]] if tuned else [None] * 3
    return [str(run["seed"]), *("" if value is None else number(value) for value in [*figures, *attacked])]


def _lock_paper(params: dict[str, Any]) -> list[str]:
    paper = params.get("paper", {})
    return [str(paper.get(name, "")) for name in ("right_key", "no_key", "source")]


def _cells(run: dict[str, Any], names: list[str]) -> list[str]:
    def mark(found: dict[str, Any] | None) -> str:
        if not found:
            return ""
        rate = next((found[name] for name in ("ber", "trigger_accuracy", "match_rate") if name in found), None)
        return f"{found['log10_p']:.1f}" if rate is None else f"{rate:.3f}, {found['log10_p']:.1f}"

    def after(found: dict[str, Any] | None) -> str:
        return f"{found['accuracy']:.4f}; {mark(found)}" if found else ""

    marked = run.get("accuracy_marked")
    strangers = [run.get("control_independent_model"), *run.get("control_independent_models", [])]
    return [
        str(run["seed"]),
        f"{run['accuracy_plain']:.4f}",
        f"{marked:.4f}" if marked else "",
        mark(run.get("evidence")),
        *(after(run.get(f"after_{name}")) for name in names),
        "; ".join(mark(found) for found in strangers if found),
    ]


def _paper(params: dict[str, Any]) -> list[str]:
    paper = params.get("paper", {})
    return [str(paper.get(name, "")) for name in ("accuracy_plain", "accuracy_marked", "mark")]


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
