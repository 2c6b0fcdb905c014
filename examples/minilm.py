"""The sentence transformer all-MiniLM-L6-v2 (22.7 M parameters): locked, issued to users, leaked, traced.

    pip install sealmark[transformers]
    python examples/minilm.py --out docs/results

Everything runs on the model's own weight file, on one thread, offline. The secrets follow from a seed, so
that the figures can be repeated; real ones never do.
"""

from __future__ import annotations

import copy
import filecmp
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from minilm_report import markdown, sheets
from paraphrases import SentenceEncoder, found, load_encoder, paraphrases, retrieval, weight_file
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from sealmark.attacks.unlocking.fine_tune_unlock import FineTuneUnlock
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import PolicyError, WrongKeyError
from sealmark.core.files import atomic_write
from sealmark.core.identity import WeightMark
from sealmark.core.lock import Lock, NeuralLock
from sealmark.core.modes import evaluating
from sealmark.core.secret import Secret
from sealmark.core.suspect import Suspect, WeightFile, WhiteBox
from sealmark.core.task import Task
from sealmark.core.weights import save_model, weights_of
from sealmark.evaluate.artifacts import environment, write_json
from sealmark.evaluate.locks import changed_share
from sealmark.evaluate.steps import generator, refuses, same_bits
from sealmark.stats.nulls import Binomial

STRENGTH = 0.005  # the default, 0.03, moves the embeddings more than a seller of embeddings would like
NEURAL = ("chaotic_weights", "selective_encryption", "advparams", "permutation_lock", "deep_lock")
STRENGTHS = (0.05, 0.03, 0.02, 0.01, STRENGTH, 0.002)
LEAKS: dict[str, tuple[int, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "as issued": (1, ()),
    "bfloat16": (1, (("quantize", {"scheme": "bf16"}),)),
    "8-bit integers, a scale for each channel": (1, (("quantize", {"scheme": "channel"}),)),
    "8-bit integers, a scale for each tensor": (1, (("quantize", {"scheme": "tensor"}),)),
    "30 % pruned": (1, (("prune", {"rate": 0.3}),)),
    "fine-tuned on other pairs": (1, (("fine_tune", {"rate": 0.2, "epochs": 5}),)),
    "three copies averaged": (3, (("average", {}),)),
    "median of three": (3, (("median", {}),)),
    "minimum of three": (3, (("extremes", {"side": "low"}),)),
    "each weight from one of three": (3, (("interleave", {"by": "weight"}),)),
    "three averaged, with noise": (3, (("noise", {"level": 0.02}),)),
    "three averaged, 30 % pruned, 8-bit integers": (
        3,
        (("average", {}), ("prune", {"rate": 0.3}), ("quantize", {"scheme": "channel"})),
    ),
}


@dataclass(frozen=True)
class Bench:
    """The model, what it is judged on, and a folder for scratch files."""

    source: Path
    model: SentenceEncoder
    task: Task
    plain: Tensor  # (N, 2, 384): the embeddings of the untouched model
    folder: Path
    users: tuple[str, ...]

    def embed(self, model: nn.Module) -> Tensor:
        """(N, 2, 384) embeddings of the test pairs."""
        with evaluating(model):
            return cast("Tensor", model(self.task.test.inputs))

    def score(self, model: nn.Module) -> float:
        """Top-1 retrieval on the test pairs."""
        return retrieval(self.embed(model), self.task.test.targets)

    def likeness(self, model: nn.Module) -> dict[str, float]:
        """How near a model is to the untouched one, in embeddings and in answers."""
        embeddings = self.embed(model)
        return {
            "cosine": (embeddings * self.plain).sum(-1).mean().item(),
            "retrieval": retrieval(embeddings, self.task.test.targets),
            "same_answers": (found(embeddings) == found(self.plain)).double().mean().item(),
        }

    def load(self, path: Path) -> SentenceEncoder:
        """The model with the weights of a file, which may hold more than the live model does."""
        model, weights = copy.deepcopy(self.model), weights_of(path)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model


def make_bench(folder: Path, users: int, pairs: int) -> Bench:
    model, task = load_encoder(), paraphrases(pairs)
    with evaluating(model):
        plain = model(task.test.inputs)
    names = tuple(f"user {number:02}" for number in range(1, users + 1))
    return Bench(weight_file(), model, task, plain, folder, names)


def run_locks(bench: Bench, wrong_keys: int) -> list[dict[str, Any]]:
    locks = [cast("Lock", registry.scheme(name)) for name in ("sealed", "chaotic_weights")]
    return [{"lock": lock.name} | lock_file(bench, lock) | lock_live(bench, lock, wrong_keys) for lock in locks]


def lock_file(bench: Bench, lock: Lock) -> dict[str, Any]:
    """Lock the weight file as published; open it with the right key and with another."""
    locked, opened = bench.folder / "locked", bench.folder / "opened"
    began = time.process_time()
    key = lock.lock_file(bench.source, locked, rng=generator(0, lock.name))
    middle = time.process_time()
    lock.unlock_file(locked, opened, key)
    ended = time.process_time()
    same_bytes = filecmp.cmp(opened, bench.source, shallow=False)
    opened.unlink()
    other = lock.wrong_key(key, generator(0, f"wrong {lock.name}"))
    refused = refuses(lambda: lock.unlock_file(locked, opened, other), WrongKeyError)
    return {
        "file_same_bytes": same_bytes,
        "file_wrong_key_refused": refused and not opened.exists(),
        "lock_cpu_seconds": round(middle - began, 2),
        "unlock_cpu_seconds": round(ended - middle, 2),
        "extra_bytes": locked.stat().st_size - bench.source.stat().st_size,
    }


def lock_live(bench: Bench, lock: Lock, wrong_keys: int) -> dict[str, Any]:
    """Lock the live model; use it with the right key, with none and with others."""
    shipped = lock.lock(bench.model, rng=generator(0, f"live {lock.name}"))
    locked, key = shipped.model, shipped.key
    opened = lock.unlock(locked, key)
    others = [lock.wrong_key(key, generator(index, f"wrong {lock.name}")) for index in range(wrong_keys)]
    return {
        "live_same_bits": same_bits(opened, bench.model),
        "same_embeddings": torch.equal(bench.embed(opened), bench.plain),
        "no_key": score_or_refusal(bench, locked),
        "wrong_keys": [score_or_refusal(bench, locked, lock, other) for other in others],
    }


def run_neural_locks(bench: Bench, wrong_keys: int) -> list[dict[str, Any]]:
    """Locks that open with any key: retrieval by key, and what a thief with the attacker's pairs makes of it."""
    return [neural_lock(bench, name, wrong_keys) for name in NEURAL]


def neural_lock(bench: Bench, name: str, wrong_keys: int) -> dict[str, Any]:
    """One of them; those that need data get the attacker's pairs, which are no test pairs."""
    lock = cast("NeuralLock", registry.scheme(name))
    own = replace(bench.task, owner=bench.task.attacker)
    began = time.process_time()
    locked = lock.lock(bench.model, own, rng=generator(0, f"neural {name}"))
    middle = time.process_time()
    opened = lock.unlock(locked.model, locked.key)
    ended = time.process_time()
    keys = [lock.wrong_key(locked.key, generator(index, f"wrong {name}")) for index in range(wrong_keys)]
    near = lock.vary(lock.derive(locked.key), 0.1, generator(0, f"near {name}"))
    attack = FineTuneUnlock(epochs=20, rate=0.2, batch_size=12)
    resources = Resources.of(bench.task)
    forced = attack.run(locked, lock, resources, rng=generator(0, f"forced {name}")).model
    return {
        "lock": name,
        "unlocked": bench.likeness(opened),
        "same_bits": same_bits(opened, bench.model),
        "no_key": bench.score(locked.model),
        "wrong_keys": [bench.score(lock.unlock(locked.model, key)) for key in keys],
        "near_key": bench.score(lock.open(copy.deepcopy(locked.model), near)),
        "fine_tuned": bench.score(forced),
        "touched": changed_share(locked.model, opened),
        "lock_cpu_seconds": round(middle - began, 2),
        "unlock_cpu_seconds": round(ended - middle, 2),
    }


def score_or_refusal(
    bench: Bench, model: nn.Module, lock: Lock | None = None, key: Secret | None = None
) -> float | None:
    """Retrieval with a locked model as it is or under a key; None where the lock refuses."""
    try:
        return bench.score(lock.unlock(model, key) if lock and key else model)
    except PolicyError:
        return None


def run_scratch(bench: Bench) -> float:
    """What the same thief makes of his pairs alone: the untrained network, trained by the same attack."""
    attack = FineTuneUnlock(epochs=20, rate=0.2, batch_size=12)
    return bench.score(attack.scratch(Resources.of(bench.task), generator(0, "scratch")))


def run_untrained(bench: Bench, models: int = 3) -> list[float]:
    """What the same architecture finds with random weights: the floor that a lock can reach."""
    return [bench.score(bench.task.model(generator(index, "untrained"))) for index in range(models)]


def enroll(bench: Bench, strength: float, seed: int = 0) -> tuple[WeightMark, Secret]:
    mark = cast("WeightMark", registry.scheme("spread_spectrum", strength=strength))
    return mark, mark.enroll(bench.source, rng=generator(seed, "users"))


def issue(bench: Bench, mark: WeightMark, secret: Secret, users: Sequence[str]) -> Iterator[SentenceEncoder]:
    """The users' copies, one by one: written to a file, and read from it by the library's own model."""
    for user in users:
        mark.issue_file(bench.source, bench.folder / "copy.safetensors", secret, user)
        yield bench.load(bench.folder / "copy.safetensors")


def run_strengths(bench: Bench, strengths: Sequence[float]) -> list[dict[str, float]]:
    """Three copies of each strength: how far they drift, and how clearly their average names all three."""
    rows = []
    for strength in strengths:
        mark, secret = enroll(bench, strength)
        copies = list(issue(bench, mark, secret, bench.users[:3]))
        merged = attacked(bench, copies, LEAKS["three copies averaged"][1])
        traced = mark.trace(WhiteBox(merged), secret, bench.users, original=bench.source)
        likeness = [bench.likeness(model) for model in copies]
        worst = {name: min(figures[name] for figures in likeness) for name in ("cosine", "same_answers")}
        accused = {"accused": len(traced.accused), "log10_p": max(entry.log10_p for entry in traced.ranking[:3])}
        rows.append({"strength": strength} | worst | accused)
    return rows


def attacked(bench: Bench, copies: Sequence[nn.Module], attacks: Sequence[tuple[str, dict[str, Any]]]) -> nn.Module:
    models = list(copies)
    for name, parameters in attacks:
        attack = registry.modification(name, **parameters)
        models = [attack.run(models, Resources.of(bench.task), rng=generator(0, name)).model]
    return models[0]


def run_users(bench: Bench, wanted: Sequence[str]) -> dict[str, Any]:
    """A copy for every user; leaks of one or three of them, traced; and what must accuse nobody."""
    mark, secret = enroll(bench, STRENGTH)
    copies: list[SentenceEncoder] = []
    figures = []
    for user, model in zip(bench.users, issue(bench, mark, secret, bench.users), strict=True):
        figures.append({"user": user} | bench.likeness(model))
        copies = [*copies, model][:3]
    leaks = []
    for title in wanted:
        count, attacks = LEAKS[title]
        leak = attacked(bench, copies[:count], attacks)
        verdict = trace(bench, mark, secret, leak) | {"culprits": list(bench.users[:count])}
        leaks.append({"leak": title} | bench.likeness(leak) | verdict)
    other = enroll(bench, STRENGTH, seed=1)[1]
    (stranger,) = issue(bench, mark, secret, ["a user who is not on the list"])
    controls = {
        "the original": trace(bench, mark, secret, bench.model),
        "a leak under another secret": trace(bench, mark, other, copies[0]),
        "the copy of somebody not asked about": trace(bench, mark, secret, stranger),
        "an untrained model": trace(bench, mark, secret, bench.task.model(np.random.default_rng(0))),
    }
    return {
        "mark": {"scheme": mark.name, **mark.parameters},
        "copies": figures,
        "leaks": leaks,
        "escape": run_escape(bench, mark, secret, copies[0]),
        "controls": [{"suspect": title} | verdict for title, verdict in controls.items()],
    }


def run_escape(bench: Bench, mark: WeightMark, secret: Secret, leak: SentenceEncoder) -> list[dict[str, Any]]:
    """The known way out: the same function with its hidden units reordered, free; and how to undo it."""
    order = torch.from_numpy(generator(0, "order").permutation(leak.config.hidden_size))
    hidden = reordered(leak, order)
    columns = [
        functional.normalize(units.embeddings.word_embeddings.weight.data, dim=0) for units in (bench.model, hidden)
    ]
    found_again = reordered(hidden, (columns[0].T @ columns[1]).argmax(1))
    suspects = {"hidden units reordered": hidden, "put back by matching the word embeddings": found_again}
    return [
        {"suspect": title, "retrieval": bench.score(model)} | trace(bench, mark, secret, model)
        for title, model in suspects.items()
    ]


def reordered(model: SentenceEncoder, order: Tensor) -> SentenceEncoder:
    """The same function, but for the order of its outputs; ``order``: (384,) a permutation."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if "output.dense" in name or "LayerNorm" in name:  # what writes the hidden units
            weight.data = weight.data[order]
        elif weight.dim() == 2:  # what reads them, and the embeddings
            weight.data = weight.data[:, order].contiguous()
    return model


def trace(bench: Bench, mark: WeightMark, secret: Secret, model: nn.Module) -> dict[str, Any]:
    """Trace a live model, and the file that it is written to."""
    path = bench.folder / "leak.safetensors"
    save_model(model, path)
    suspects: tuple[Suspect, ...] = (WhiteBox(model), WeightFile(path))
    live, stored = (mark.trace(suspect, secret, bench.users, original=bench.source) for suspect in suspects)
    others = [entry.log10_p for entry in live.ranking if entry not in live.accused]
    return {
        "accused": [asdict(entry) for entry in live.accused],
        "best_other_log10_p": max(others, default=None),
        "file_agrees": live == stored,
    }


def run_all(
    *,
    users: int = 20,
    pairs: int = 48,
    strengths: Sequence[float] = STRENGTHS,
    leaks: Sequence[str] = tuple(LEAKS),
    wrong_keys: int = 3,
) -> dict[str, Any]:
    """All figures, as plain JSON values; see `claims` for what they shall show."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(Path(folder), users, pairs)
        weights = weights_of(bench.source)
        summary = {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "parameters": sum(tensor.numel() for tensor in bench.model.parameters()),
            "digest": weights.digest(),
            "pairs": bench.task.test.rows,
            "chance": bench.task.chance,
            "plain": retrieval(bench.plain, bench.task.test.targets),
            "untrained": run_untrained(bench),
            "locks": run_locks(bench, wrong_keys),
            "neural_locks": run_neural_locks(bench, wrong_keys),
            "scratch": run_scratch(bench),
            "strengths": run_strengths(bench, strengths),
            **run_users(bench, leaks),
            "environment": environment(),
        }
    summary["cpu_seconds"] = round(time.process_time() - began, 1)
    summary["claims"] = claims(summary)
    return summary


def claims(summary: dict[str, Any]) -> dict[str, bool]:
    """What the figures shall show, and whether they do."""
    luck = Binomial(summary["pairs"], summary["chance"]).needed(1e-3) / summary["pairs"]
    sealed, chaotic = summary["locks"]
    neural = summary["neural_locks"]
    return {
        "the model finds paraphrases": summary["plain"] > 0.9,
        "every lock opens bit for bit, as a file and live": all(
            lock["file_same_bytes"] and lock["live_same_bits"] and lock["same_embeddings"]
            for lock in summary["locks"]
        ),
        "a wrong key to a file is refused and leaves no file": all(
            lock["file_wrong_key_refused"] for lock in summary["locks"]
        ),
        "sealed refuses to run without its key": {sealed["no_key"], *sealed["wrong_keys"]} == {None},
        "chaotic_weights without its key finds no more than luck does once in 1000": max(
            chaotic["no_key"], *chaotic["wrong_keys"]
        )
        < luck,
        "every neural lock serves its users as the plain model does, but for two pairs": all(
            lock["unlocked"]["retrieval"] >= summary["plain"] - 2 / summary["pairs"] for lock in neural
        ),
        "a dense neural lock gives a thief with pairs no more than he has, but for two pairs": all(
            lock["fine_tuned"] <= max(summary["scratch"], luck) + 2 / summary["pairs"]
            for lock in neural
            if lock["lock"] in ("chaotic_weights", "deep_lock", "permutation_lock")
        ),
        "every copy keeps a cosine of 0.999 and all answers": all(
            copy["cosine"] >= 0.999 and copy["same_answers"] == 1 for copy in summary["copies"]
        ),
        "every leak names those who leaked and nobody else": all(
            {entry["user"] for entry in leak["accused"]} == {*leak["culprits"]} for leak in summary["leaks"]
        ),
        "reordered hidden units hide the user until they are put back": [
            [entry["user"] for entry in way["accused"]] for way in summary["escape"]
        ]
        == [[], summary["leaks"][0]["culprits"]],
        "no control accuses anybody": not any(control["accused"] for control in summary["controls"]),
        "files and live models give the same verdicts": all(
            verdict["file_agrees"] for verdict in [*summary["leaks"], *summary["escape"], *summary["controls"]]
        ),
    }


def main(
    out: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder for minilm.json and minilm.md.")
    ] = None,
    users: Annotated[int, typer.Option(min=4, help="How many get a copy.")] = 20,
    pairs: Annotated[int, typer.Option(min=2, max=48, help="Paraphrases to search among.")] = 48,
) -> None:
    """Lock, issue, attack and trace a real sentence transformer; exit code 1 if a claim does not hold."""
    torch.set_num_threads(1)
    summary = run_all(users=users, pairs=pairs)
    console = Console()
    for sheet in sheets(summary):
        console.print(sheet.rich())
    if out:
        write_json(summary, out / "minilm.json")
        with atomic_write(out / "minilm.md") as file:
            file.write(markdown(summary).encode())
    raise typer.Exit(0 if all(summary["claims"].values()) else 1)


if __name__ == "__main__":
    typer.run(main)
