"""Attacks on credentials: what an impostor has, what he is refused, and what it costs him."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.core.attack import Resources
from sealmark.core.card import AttackCard
from sealmark.core.credentials import Credential, Enrolled
from sealmark.core.errors import AccessError, ParameterError
from sealmark.core.impersonation import Impersonation, Spoils
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access
from sealmark.core.task import Task

CARD = AttackCard("A toy", "nobody 2020", "be let in", "credentials", level=3, needs_data=True, copies=2)
FACTS = {"scheme": "stub", "parameters": {"marks": 5}, "host": {"shape": [4], "classes": 2}}


@dataclass(frozen=True)
class Mixing(Impersonation):
    """Shows the middle of two credentials, with a little noise, after asking for the answer to each."""

    card: ClassVar[AttackCard] = CARD

    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        rows = torch.cat([credential.tensors["images"] for credential in spoils.credentials])
        spoils.service.probabilities(rows)
        return rows.mean(0, keepdim=True) + torch.from_numpy(rng.normal(size=(1, *spoils.shape)))


class Guessing(Mixing):
    card: ClassVar[AttackCard] = replace(CARD, needs_data=False, copies=0)

    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        return torch.zeros(3, *spoils.shape)


@pytest.fixture
def enrolled(toy: Task, rng: np.random.Generator) -> Enrolled:
    return Enrolled(toy.model(rng), Secret(bytes(32), FACTS))


@pytest.fixture
def spoils(enrolled: Enrolled) -> Spoils:
    held = [Credential(name, {"images": torch.full((2, 4), value)}) for name, value in (("a", 1.0), ("b", 3.0))]
    return Spoils(None, enrolled, held)  # type: ignore[arg-type]  # the stub asks for no scheme


def test_an_impostor_knows_what_is_public_and_nothing_else(spoils: Spoils) -> None:
    assert spoils.facts == {"shape": [4], "classes": 2, "parameters": {"marks": 5}}
    assert spoils.shape == [4]
    held = [value for value in vars(spoils).values() if not isinstance(value, (list, dict))]
    assert not any(isinstance(value, (Secret, nn.Module, Scheme)) for value in held)


def test_the_service_gives_probabilities_and_no_weights(enrolled: Enrolled, spoils: Spoils) -> None:
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(spoils.service.probabilities(inputs), enrolled.model(inputs).softmax(-1))
    assert spoils.service.queries == 3
    with pytest.raises(AccessError):
        spoils.service.require(Access.WEIGHTS)


def test_the_result_is_what_was_made_and_what_it_cost(toy: Task, spoils: Spoils, rng: np.random.Generator) -> None:
    spoils.service.probabilities(torch.zeros(7, 4))  # an earlier attack's
    result = Mixing().run(spoils, Resources.of(toy), rng=rng)
    assert result.rows.shape == (1, 4)
    assert abs(result.rows.mean() - 2) < 2
    assert (result.cost.queries, result.cost.copies, result.cost.rows) == (4, 2, 64)
    assert result.cost.rows_seen == result.cost.tries == 0


def test_an_attack_follows_from_its_generator(toy: Task, spoils: Spoils) -> None:
    one, same, other = (
        Mixing().run(spoils, Resources.of(toy), rng=np.random.default_rng(seed)).rows for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_too_few_credentials_are_refused(
    toy: Task, enrolled: Enrolled, spoils: Spoils, rng: np.random.Generator
) -> None:
    poor = Spoils(spoils.mark, enrolled, spoils.credentials[:1])
    with pytest.raises(ParameterError, match="test_impersonation needs more credentials: expected 2, found 1"):
        Mixing().run(poor, Resources.of(toy), rng=rng)


def test_no_data_is_refused_where_some_is_needed(toy: Task, spoils: Spoils, rng: np.random.Generator) -> None:
    with pytest.raises(ParameterError, match="needs data"):
        Mixing().run(spoils, Resources.of(toy, 0.0), rng=rng)


def test_an_outsider_needs_neither_and_it_costs_nothing(
    toy: Task, enrolled: Enrolled, rng: np.random.Generator
) -> None:
    result = Guessing().run(Spoils(None, enrolled), Resources.of(toy, 0.0), rng=rng)  # type: ignore[arg-type]
    assert result.rows.shape == (3, 4)
    assert (result.cost.queries, result.cost.copies, result.cost.rows) == (0, 0, 0)
