"""Runs of embedding that learn something beside the model, or finish it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.core.attach import attach
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ForgedSecretError
from sealmark.core.evidence import Score, Verdict
from sealmark.core.ownership import Watermark, embed_all
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.weights import weights_of
from sealmark.stats.nulls import Binomial

RECIPE = Recipe(epochs=2, batch_size=32, rate=0.1)


class Run(Embedding):
    """Counts its steps and sets the last bias to signs of its own at the end."""

    steps = 0

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        return 0 * batch.inputs.sum()

    def finish(self, model: nn.Module) -> Secret:
        with torch.no_grad():
            model.get_parameter("0.bias").abs_().add_(0.01).mul_(self.scheme.derive(self.secret)["signs"])
        return self.secret.with_learned({"steps": torch.tensor([self.steps])})


@dataclass(frozen=True)
class Signs(Watermark):
    """Signs of a bias, written when training is over."""

    access = Access.WEIGHTS

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"shape": torch.tensor([16])}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        return {"signs": torch.from_numpy(secret.stream("signs").signs(16)).float()}

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        return Run(self, secret)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        same = suspect.weights["0.bias"].sign() == self.derive(secret)["signs"]
        return Score(int(same.sum()), Binomial(16, 0.5), {"steps": int(secret.tensors["steps"])})


@pytest.fixture
def model(toy: Task) -> nn.Module:
    return toy.model(np.random.default_rng(0))


@pytest.fixture
def secret(model: nn.Module) -> Secret:
    return Signs().keygen(model, rng=np.random.default_rng(1))


def test_the_secret_comes_back_with_what_was_learned(model: nn.Module, secret: Secret, toy: Task) -> None:
    marked = Signs().embed(model, secret, toy, rng=np.random.default_rng(2), recipe=RECIPE)
    evidence = Signs().verify(WhiteBox(marked.model), marked.secret, alpha=1e-4)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details == {"steps": 4}
    assert marked.secret.tensors["shape"] == 16
    assert marked.secret.commitment != secret.commitment
    assert torch.equal(Signs().derive(marked.secret)["signs"], Signs().derive(secret)["signs"])


def test_what_was_learned_is_committed(model: nn.Module, secret: Secret, toy: Task) -> None:
    kept = Signs().embed(model, secret, toy, rng=np.random.default_rng(2), recipe=RECIPE).secret
    forged = Secret(kept.reveal_seed(), kept.facts, {**kept.tensors, "steps": torch.tensor([9])})
    with pytest.raises(ForgedSecretError, match="differences in \\['steps'\\]"):
        Signs().check_secret(forged)
    with pytest.raises(ForgedSecretError, match="does not open the commitment"):
        Signs().check_secret(kept, secret.commitment)


def test_learning_again_replaces_what_was_learned_before(secret: Secret) -> None:
    once = secret.with_learned({"steps": torch.tensor([1]), "more": torch.tensor([2])})
    twice = once.with_learned({"steps": torch.tensor([3])})
    twice.check()
    assert sorted(twice.tensors) == ["shape", "steps"]


def test_runs_of_several_marks_keep_their_order(model: nn.Module, toy: Task) -> None:
    secrets = [Signs().keygen(model, rng=np.random.default_rng(n)) for n in (1, 2)]
    marks: list[tuple[Watermark, Secret]] = [(Signs(), key) for key in secrets]
    with pytest.raises(Exception, match="did not take"):  # both write the same bias, the first one last
        embed_all(marks, model, toy, rng=np.random.default_rng(2), recipe=RECIPE)


def test_in_the_users_own_loop_detaching_finishes(model: nn.Module, secret: Secret, toy: Task) -> None:
    before = weights_of(model).digest()
    same, criterion = attach(Signs(), model, nn.CrossEntropyLoss(), secret)
    criterion(model(toy.owner.inputs), toy.owner.targets)
    assert weights_of(model).digest() == before
    kept = criterion.detach()
    assert same is model
    assert Signs().verify(WhiteBox(model), kept, alpha=1e-4).details == {"steps": 1}
