"""Attacks: what they need, what they cost, and that the target stays as it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError
from sealmark.core.task import Task
from sealmark.core.weights import weights_of

CARD = AttackCard("A toy", "nobody 2020", "removal", "the weights", level=1, needs_data=True)


@dataclass(frozen=True)
class Zero(Modification):
    """Sets everything to a constant, in place, after some work."""

    value: float = 0.0
    seconds: float = 0.0
    card: ClassVar[AttackCard] = CARD

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        with torch.no_grad():
            for parameter in copies[0].parameters():
                parameter.fill_(self.value + float(rng.random()))
        return copies[0], 3 * resources.rows.rows


class Average(Zero):
    card: ClassVar[AttackCard] = replace(CARD, needs_data=False, copies=2)

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        with torch.no_grad():
            for one, two in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
                one.add_(two).div_(2)
        return copies[0], 0


def test_an_attack_is_named_after_the_file_that_it_stands_in_and_shows_its_parameters() -> None:
    assert Zero(value=2).name == "test_attack"
    assert Zero(value=2).parameters == {"value": 2, "seconds": 0.0}


def test_the_target_is_left_as_it_was(toy: Task, rng: np.random.Generator) -> None:
    target = toy.model(rng)
    before = weights_of(target).digest()
    surrogate = Zero().run(target, Resources.of(toy), rng=rng).model
    assert weights_of(target).digest() == before != weights_of(surrogate).digest()


def test_an_attack_follows_from_its_generator(toy: Task) -> None:
    target = toy.model(np.random.default_rng(0))
    digests = [
        weights_of(Zero().run(target, Resources.of(toy), rng=np.random.default_rng(seed)).model).digest()
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_cost_counts_data_training_copies_and_time(toy: Task, rng: np.random.Generator) -> None:
    cost = Zero(seconds=0.02).run(toy.model(rng), Resources.of(toy, 0.5), rng=rng).cost
    assert (cost.rows, cost.rows_seen, cost.copies) == (32, 96, 1)
    assert cost.cpu_seconds >= 0.02
    assert cost.wall_seconds >= 0.02


def test_data_that_an_attack_does_not_need_costs_nothing(toy: Task, rng: np.random.Generator) -> None:
    models = [toy.model(rng) for _ in range(3)]
    result = Average().run(models, Resources.of(toy), rng=rng)
    assert (result.cost.rows, result.cost.rows_seen, result.cost.copies) == (0, 0, 3)


def test_several_copies_are_attacked_together_and_left_as_they_were(toy: Task, rng: np.random.Generator) -> None:
    models = [toy.model(rng) for _ in range(2)]
    before = [weights_of(model).digest() for model in models]
    average = weights_of(Average().run(models, Resources.of(toy), rng=rng).model)["0.weight"]
    expected = (models[0].get_parameter("0.weight") + models[1].get_parameter("0.weight")) / 2
    assert torch.equal(average, expected)
    assert [weights_of(model).digest() for model in models] == before


def test_too_few_copies_are_refused(toy: Task, rng: np.random.Generator) -> None:
    with pytest.raises(ParameterError, match="needs more copies: expected 2, found 1"):
        Average().run(toy.model(rng), Resources.of(toy), rng=rng)


def test_an_attack_that_needs_data_is_refused_without(toy: Task, rng: np.random.Generator) -> None:
    with pytest.raises(ParameterError, match="needs data"):
        Zero().run(toy.model(rng), Resources.of(toy, 0), rng=rng)
    Average().run([toy.model(rng)] * 2, Resources.of(toy, 0), rng=rng)


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.25, 16), (1, 64)])
def test_an_attacker_has_a_share_of_the_attackers_rows(toy: Task, share: float, rows: int) -> None:
    resources = Resources.of(toy, share)
    assert torch.equal(resources.rows.inputs, toy.attacker.inputs[:rows])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_means_nothing_is_refused(toy: Task, share: float) -> None:
    with pytest.raises(ParameterError, match="bad share"):
        Resources.of(toy, share)


def test_the_start_from_scratch_is_an_untrained_model(toy: Task) -> None:
    scratch = Zero().scratch(Resources.of(toy), np.random.default_rng(3))
    assert weights_of(scratch).digest() == weights_of(toy.model(np.random.default_rng(3))).digest()
