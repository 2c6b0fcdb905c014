"""Forged fingerprints: what the model alone lets in, and that nobody is recognized in it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sealmark.attacks.ambiguity.fingerprint_forgery import FingerprintForgery
from sealmark.core.attack import Resources
from sealmark.core.credentials import Reason
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.suspect import BlackBox
from sealmark.core.task import Batch

NAME = "fingerprint_forgery"


@pytest.fixture
def resources(digits):
    return Resources.of(digits)


def test_noise_fills_the_range_of_the_attackers_rows(club, resources):
    rows = club.shown(NAME, resources, images=50).rows
    data = resources.rows.inputs
    assert rows.shape == (50, *data.shape[1:])
    assert data.min() <= rows.min() < data.min() + 0.02
    assert data.max() - 0.02 < rows.max() <= data.max()


def test_natural_rows_are_his_own_and_repeat_only_where_he_has_too_few(club, digits, resources):
    rows = club.shown(NAME, resources, strategy="natural", images=30).rows
    assert len(torch.unique(rows, dim=0)) == 30
    assert all((resources.rows.inputs == row).flatten(1).all(1).any() for row in rows)
    few = dataclasses.replace(resources, rows=digits.attacker.take(slice(0, 4)))
    assert len(torch.unique(club.shown(NAME, few, strategy="natural", images=10).rows, dim=0)) == 4


@pytest.mark.parametrize("strategy", ["noise", "natural"])
def test_rows_that_nobody_searched_for_are_refused_by_the_model(strategy, club, resources):
    for seed in range(5):
        rows = club.shown(NAME, resources, seed=seed, strategy=strategy).rows
        assert club.examined(rows).reason is Reason.MODEL_REFUSES


@pytest.mark.parametrize("seed", range(5))
def test_known_break_a_search_finds_what_the_model_lets_in_and_no_user_is_recognized_in_it(seed, club, resources):
    found = club.examined(club.shown(NAME, resources, seed=seed, strategy="search").rows)
    assert found.served
    assert (found.reason, found.user) == (Reason.UNKNOWN_USER, None)


def test_a_search_keeps_its_budget_and_a_small_one_does_not_suffice(club, resources):
    large, small = (club.shown(NAME, resources, strategy="search", queries=queries) for queries in (2000, 60))
    assert 1900 < large.cost.queries <= 2000
    assert small.cost.queries <= 60
    assert not club.examined(small.rows).served
    assert club.shown(NAME, resources).cost.queries == 0


def test_without_an_additional_class_a_search_makes_the_model_sure_of_any(club, digits, resources):
    spoils = club.spoils(0)
    spoils.service = _narrow(spoils.service)
    attack = FingerprintForgery("search", confidence=0.6)
    rows = attack.run(spoils, resources, rng=np.random.default_rng(0)).rows
    answers = spoils.service.probabilities(rows)
    near = ((answers - 0.6).abs() < 0.15).sum(0)
    assert near.max() >= 7


def _narrow(service):
    """The same answers without the last class."""

    def predict(inputs):
        kept = service.probabilities(inputs)[:, :10]
        return kept / kept.sum(1, keepdim=True)

    return BlackBox(predict, returns="probabilities")


def test_words_can_be_noise_or_natural_and_have_no_steps_to_search_by(club, digits):
    words = Batch(torch.randint(0, 7, (20, 5), generator=torch.Generator().manual_seed(0)), torch.zeros(20).long())
    poor = dataclasses.replace(Resources.of(digits), rows=words)
    spoils = club.spoils(0)
    rows = FingerprintForgery().pretend(spoils, poor, np.random.default_rng(0))
    assert sorted(rows.unique().tolist()) == list(range(7))
    spoils.service = _constant()
    with pytest.raises(UnsupportedError, match="real numbers"):
        FingerprintForgery("search").pretend(spoils, poor, np.random.default_rng(0))


def _constant():
    return BlackBox(lambda inputs: torch.full((len(inputs), 11), 1 / 11), returns="probabilities")


def test_without_rows_it_is_refused(club, digits):
    with pytest.raises(ParameterError, match="needs data"):
        club.shown(NAME, Resources.of(digits, 0.0))


@pytest.mark.parametrize("bad", [{"strategy": "luck"}, {"images": 0}, {"queries": 10}, {"confidence": 1.5}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters"):
        FingerprintForgery(**bad)
