"""Marking in the user's own loop gives what the built-in loop gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.core.attach import attach
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train
from sealmark.stats.nulls import Binomial


@dataclass(frozen=True)
class Plain(Watermark):
    strength: float = 0.5
    access = Access.WEIGHTS

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        return Score(0, Binomial(40, 0.5))


class Term(Plain):
    """A loss on the weights and on how the model answers the batch."""

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        weight = model.get_parameter("0.weight")
        signs = torch.from_numpy(secret.stream("signs").signs(weight.numel())).float()
        return self.strength * (signs * weight.reshape(-1)).mean() + 0 * batch.targets.sum()


class Rows(Plain):
    """Five keyed rows with keyed labels."""

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        inputs = torch.from_numpy(secret.stream("inputs").normal(20)).float().reshape(5, 4)
        return Batch(inputs, torch.from_numpy(secret.stream("labels").integers(5, 2)))


class Both(Term, Rows):
    pass


SCHEMES = [Plain(), Term(), Rows(), Both()]
Criterion = Callable[[Any, Tensor], Tensor]


@pytest.fixture
def model(toy: Task) -> nn.Module:
    return toy.model(np.random.default_rng(0))


def _attached(scheme: Watermark, model: nn.Module, toy: Task) -> tuple[nn.Module, Any]:
    secret = scheme.keygen(model, rng=np.random.default_rng(1))
    return attach(scheme, model, nn.CrossEntropyLoss(), secret, rng=np.random.default_rng(2))


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: type(scheme).__name__)
def test_loss_and_gradient_are_those_of_the_built_in_loop(scheme: Watermark, model: nn.Module, toy: Task) -> None:
    secret, rate = scheme.keygen(model, rng=np.random.default_rng(1)), 0.01
    built_in = copy.deepcopy(model)
    report = train(
        built_in,
        toy.owner,
        loss=nn.CrossEntropyLoss(),
        recipe=Recipe(epochs=1, batch_size=64, rate=rate, momentum=0, weight_decay=0),
        rng=np.random.default_rng(2),
        terms=Embedding(scheme, secret).terms,
        extras=Embedding(scheme, secret).extras,
    )
    _, criterion = attach(scheme, model, nn.CrossEntropyLoss(), secret, rng=np.random.default_rng(2))
    loss = criterion(model(toy.owner.inputs), toy.owner.targets)
    loss.backward()
    assert loss.item() == pytest.approx(report.losses[0], rel=1e-5)
    steps = [a - b for a, b in zip(model.parameters(), built_in.parameters(), strict=True)]
    for step, gradient in zip(steps, _gradients(model), strict=True):
        torch.testing.assert_close(step / rate, gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=lambda scheme: type(scheme).__name__)
def test_the_watermark_changes_loss_and_gradient(scheme: Watermark, model: nn.Module, toy: Task) -> None:
    plain = copy.deepcopy(model)
    expected = nn.CrossEntropyLoss()(plain(toy.owner.inputs), toy.owner.targets)
    expected.backward()
    _, criterion = _attached(scheme, model, toy)
    loss = criterion(model(toy.owner.inputs), toy.owner.targets)
    loss.backward()
    assert abs(loss.item() - expected.item()) > 1e-3
    assert not torch.allclose(_gradients(model)[0], _gradients(plain)[0], atol=1e-4)


def test_the_very_same_model_comes_back(model: nn.Module, toy: Task) -> None:
    assert _attached(Both(), model, toy)[0] is model


def test_the_model_answers_for_the_batch_alone(model: nn.Module, toy: Task) -> None:
    expected = model(toy.owner.inputs)
    _attached(Rows(), model, toy)
    answer = model(toy.owner.inputs)
    assert answer.shape == expected.shape
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("way", ["evaluation mode", "no gradients"])
def test_outside_training_nothing_changes(way: str, model: nn.Module, toy: Task) -> None:
    expected = copy.deepcopy(model)(toy.test.inputs).detach()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    _, criterion = _attached(Both(), model, toy)
    if way == "evaluation mode":
        model.eval()
        answer = model(toy.test.inputs)
    else:
        with torch.no_grad():
            answer = model(toy.test.inputs)
    assert torch.equal(answer, expected)
    assert torch.equal(criterion(answer, toy.test.targets), nn.CrossEntropyLoss()(expected, toy.test.targets))


def test_judging_between_two_batches_does_not_disturb_training(model: nn.Module, toy: Task) -> None:
    _, criterion = _attached(Both(), model, toy)
    first = criterion(model(toy.owner.inputs), toy.owner.targets).item()
    toy.score(model)
    assert criterion(model(toy.owner.inputs), toy.owner.targets).item() == pytest.approx(first)


def test_detaching_gives_the_users_model_and_criterion_back(model: nn.Module, toy: Task) -> None:
    plain = copy.deepcopy(model)
    _, criterion = _attached(Both(), model, toy)
    model(toy.owner.inputs)
    criterion.detach()
    outputs = model(toy.owner.inputs)
    assert torch.equal(outputs, plain(toy.owner.inputs))
    assert torch.equal(criterion(outputs, toy.owner.targets), nn.CrossEntropyLoss()(outputs, toy.owner.targets))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_further_arguments_reach_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(4, 2))

        def forward(self, inputs: Tensor, factor: float) -> Tensor:
            result: Tensor = self.get_submodule("0")(inputs) * factor
            return result

    model = Scaled()
    inputs = torch.ones(3, 4)
    expected = model(inputs, 2.0)
    scheme = Rows()
    attach(scheme, model, nn.CrossEntropyLoss(), scheme.keygen(model))
    torch.testing.assert_close(model(inputs, 2.0), expected)


def test_a_model_that_takes_no_tensor_is_refused(toy: Task) -> None:
    class Worded(nn.Linear):
        def forward(self, text: str) -> Tensor:  # type: ignore[override]
            return self.weight.sum() * len(text)

    model = Worded(4, 2)
    _attached(Plain(), model, toy)
    with pytest.raises(UnsupportedError, match=r"first argument is a tensor: found \['str'\]"):
        model("words")
    with pytest.raises(UnsupportedError, match=r"found \[\]"):
        model(text="words")
    assert model.eval()("words").numel() == 1


def test_a_model_that_answers_with_no_tensor_is_refused(toy: Task) -> None:
    class Named(nn.Linear):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(inputs)}

    model = Named(4, 2)
    _attached(Rows(), model, toy)
    with pytest.raises(UnsupportedError, match="answers with a tensor: found dict"):
        model(torch.ones(3, 4))


def test_a_secret_of_other_parameters_is_refused(model: nn.Module) -> None:
    secret = Plain().keygen(model)
    with pytest.raises(ParameterError, match="other parameters"):
        attach(replace(Plain(), strength=1.0), model, nn.CrossEntropyLoss(), secret)
    assert not model._forward_hooks
