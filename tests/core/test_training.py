"""The one training loop: determinism, terms, extra rows, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train, train_task


def _state(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def _trained(toy: Task, seed: int = 0, **options: object) -> nn.Module:
    model = toy.model(np.random.default_rng(0))
    settings = {"loss": toy.loss, "recipe": toy.recipe, "rng": np.random.default_rng(seed)} | options
    train(model, toy.owner, **settings)  # type: ignore[arg-type]
    return model


def test_training_learns_the_task(toy: Task) -> None:
    assert toy.score(_trained(toy)) > 0.85
    assert toy.score(toy.model(np.random.default_rng(0))) < 0.75


def test_the_same_generator_gives_the_same_model_bit_for_bit(toy: Task) -> None:
    assert torch.equal(_state(_trained(toy, 3)), _state(_trained(toy, 3)))


def test_another_generator_gives_another_model(toy: Task) -> None:
    assert not torch.equal(_state(_trained(toy, 3)), _state(_trained(toy, 4)))


def test_dropout_draws_from_the_generator_and_not_from_torchs_own(toy: Task) -> None:
    states = []
    for _ in range(2):
        torch.rand(1)  # moves torch's own generator
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        train(model, toy.owner, loss=toy.loss, recipe=toy.recipe, rng=np.random.default_rng(0))
        states.append(_state(model))
    assert torch.equal(*states)


def test_training_leaves_torchs_generator_as_it_was(toy: Task) -> None:
    before = torch.get_rng_state()
    _trained(toy)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_term_pulls_the_model(toy: Task) -> None:
    def small(model: nn.Module, batch: Batch) -> Tensor:
        return sum((parameter**2).sum() for parameter in model.parameters())  # type: ignore[return-value]

    assert _state(_trained(toy, terms=[small])).norm() < 0.5 * _state(_trained(toy)).norm()


def test_a_term_sees_every_batch_without_the_extra_rows(toy: Task) -> None:
    seen = []

    def look(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch.rows)
        return torch.zeros(())

    _trained(toy, terms=[look], extras=[lambda batch, rng: batch.take(slice(0, 3))])
    assert seen == [16] * 4 * toy.recipe.epochs


def test_extra_rows_are_learned(toy: Task) -> None:
    strange = Batch(torch.full((8, 4), 5.0), torch.zeros(8, dtype=torch.int64))  # the task says 1 there

    def labels(model: nn.Module) -> list[int]:
        found: list[int] = model(strange.inputs).argmax(-1).tolist()
        return found

    assert labels(_trained(toy, extras=[lambda batch, rng: strange])) == [0] * 8
    assert labels(_trained(toy)) == [1] * 8


def test_extra_rows_are_drawn_from_the_generator(toy: Task) -> None:
    drawn = []
    for seed in (0, 0, 1):
        draws: list[int] = []

        def extra(batch: Batch, rng: np.random.Generator, draws: list[int] = draws) -> Batch:
            draws.append(int(rng.integers(1000)))
            return batch.take(slice(0, 0))

        _trained(toy, seed, extras=[extra])
        drawn.append(draws)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_only_the_named_parameters_are_trained(toy: Task) -> None:
    model = toy.model(np.random.default_rng(0))
    before = copy.deepcopy(model.state_dict())
    (last,) = [module for module in model.children() if getattr(module, "out_features", 0) == 2]
    options = {"loss": toy.loss, "recipe": toy.recipe, "rng": np.random.default_rng(0)}
    train(model, toy.owner, parameters=list(last.parameters()), **options)  # type: ignore[arg-type]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.weight", "2.bias"}


def test_the_report_counts_rows_steps_and_losses(toy: Task) -> None:
    model, ticks = toy.model(np.random.default_rng(0)), []
    report = train(
        model,
        toy.owner.take(slice(0, 50)),
        loss=toy.loss,
        recipe=Recipe(epochs=3, batch_size=16),
        rng=np.random.default_rng(0),
        extras=[lambda batch, rng: batch.take(slice(0, 2))],
        on_epoch=lambda *tick: ticks.append(tick),
    )
    assert (report.steps, report.rows) == (12, 3 * (50 + 4 * 2))
    assert ticks == [(epoch, 3, loss) for epoch, loss in enumerate(report.losses, 1)]
    assert report.losses[0] > report.losses[-1]
    assert report.seconds > 0


def test_the_learning_rate_falls_along_half_a_cosine(toy: Task) -> None:
    model = nn.Linear(4, 2)
    places: list[Tensor] = []

    def constant_pull(outputs: Tensor, targets: Tensor) -> Tensor:
        places.append(_state(model))
        return model.weight.sum()

    recipe = Recipe(epochs=4, batch_size=64, rate=1.0, momentum=0, weight_decay=0)
    train(model, toy.owner, loss=constant_pull, recipe=recipe, rng=np.random.default_rng(0))
    places.append(_state(model))
    steps = [(places[i] - places[i + 1])[0].item() for i in range(4)]
    assert steps == pytest.approx([0.5 + 0.5 * np.cos(np.pi * i / 4) for i in range(4)], abs=1e-5)


@pytest.mark.parametrize(("clip", "least", "most"), [(0.1, 0, 0.1001), (0.0, 1, np.inf)])
def test_clipping_bounds_a_step(toy: Task, clip: float, least: float, most: float) -> None:
    recipe = Recipe(epochs=1, batch_size=64, rate=1.0, momentum=0, weight_decay=0, clip=clip)
    before = _state(toy.model(np.random.default_rng(0)))
    after = _state(_trained(toy, recipe=recipe, loss=lambda o, t: 100 * toy.loss(o, t)))
    assert least <= (after - before).norm() <= most


def test_no_epochs_leave_the_model_as_it_is(toy: Task) -> None:
    untouched = _trained(toy, recipe=Recipe(epochs=0))
    assert torch.equal(_state(untouched), _state(toy.model(np.random.default_rng(0))))


def test_training_on_nothing_is_refused(toy: Task) -> None:
    nothing = replace(toy, owner=toy.owner.take(slice(0, 0)))
    with pytest.raises(ParameterError, match="nothing to train on"):
        _trained(nothing)


@pytest.mark.parametrize("term", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_is_refused(toy: Task, term: float) -> None:
    with pytest.raises(MarkFailedError, match="diverged"):
        _trained(toy, terms=[lambda model, batch: torch.tensor(term)])


def test_a_task_is_trained_on_its_owners_rows_by_its_recipe(toy: Task) -> None:
    ticks: list[object] = []
    model = train_task(toy, rng=np.random.default_rng(0), on_epoch=lambda *tick: ticks.append(tick))
    assert toy.score(model, toy.owner) > 0.9
    assert len(ticks) == toy.recipe.epochs


def test_a_task_can_be_trained_on_other_rows_by_another_recipe(toy: Task) -> None:
    inverted = Batch(toy.attacker.inputs, 1 - toy.attacker.targets)
    model = train_task(toy, rng=np.random.default_rng(0), rows=inverted, recipe=replace(toy.recipe, epochs=20))
    assert toy.score(model) < 0.2
