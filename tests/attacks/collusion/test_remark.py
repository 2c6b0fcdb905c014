"""Remarking: both marks are read, each by its own secret, and who was first is seen in the other's original."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from sealmark.attacks.collusion.remark import Remark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnknownNameError, UnsupportedError
from sealmark.core.suspect import WhiteBox


@pytest.fixture(scope="module")
def remarked(spread, digits):
    """The surrogate of three users, the thief's original and his secret."""
    copies = [copy.deepcopy(model) for model in spread.copies[:3]]
    return Remark().embed(copies, Resources.of(digits), np.random.default_rng(1))[:3]


def named(model, secret, original):
    found = registry.scheme_of(secret).trace(
        WhiteBox(model), secret, ["customer", "user0", "user1", "user2"], original=original
    )
    return {entry.user for entry in found.accused}


def test_both_marks_are_read(remarked, spread):
    model, original, secret = remarked
    assert named(model, secret, original) == {"customer"}
    assert spread.accused(model) == {"user0", "user1", "user2"}


def test_the_owners_mark_is_in_the_thiefs_original_and_not_the_other_way_round(remarked, spread, plain):
    _, original, secret = remarked
    assert spread.accused(original) == {"user0", "user1", "user2"}
    assert spread.accused(plain) == set()
    for model in (plain, *spread.copies[:3]):
        assert named(model, secret, original) == set()


def test_the_model_stays_usable(remarked, digits, plain):
    assert digits.score(remarked[0]) >= digits.score(plain) - 0.01


def test_ten_times_the_strength_costs_accuracy_and_hides_nobody(spread, digits, plain):
    pirate = spread.after("remark", settings={"strength": 0.3})
    found = spread.accused(pirate)
    assert found
    assert found <= {"user0", "user1", "user2"}
    assert digits.score(pirate) < digits.score(plain)


def test_known_break_a_mark_as_high_as_the_weights_hides_three_at_the_price_of_the_model(spread, digits, plain):
    pirate = spread.after("remark", settings={"strength": 1.0})
    assert spread.accused(pirate) == set()
    assert digits.score(pirate) < digits.score(plain) - 0.3


def test_deepmarks_withstands_another_kind_of_mark(words_of_a_code):
    assert words_of_a_code.accused(words_of_a_code.after("remark")) == {"user0", "user1", "user2"}


def test_known_break_deepmarks_over_an_average_of_three_names_nobody(words_of_a_code, digits, plain):
    made = Remark("deepmarks").run(words_of_a_code.copies, Resources.of(digits), rng=np.random.default_rng(0))
    assert words_of_a_code.accused(made.model) == set()
    assert digits.score(made.model) >= digits.score(plain) - 0.01
    assert made.cost.rows_seen == registry.scheme("deepmarks").epochs * digits.attacker.rows


@pytest.mark.parametrize(
    ("attack", "error", "share"),
    [
        (Remark("uchida"), UnsupportedError, 1.0),
        (Remark("nonsense"), UnknownNameError, 1.0),
        (Remark(settings={"depth": 3}), ParameterError, 1.0),
        (Remark("deepmarks"), ParameterError, 0.0),
    ],
    ids=["no user mark", "no scheme", "no setting", "no rows"],
)
def test_a_mark_that_cannot_be_made_is_refused(attack, error, share, plain, digits, rng):
    with pytest.raises(error):
        attack.run(plain, Resources.of(digits, share), rng=rng)


@pytest.mark.parametrize("parameters", [{"settings": ("strength", 2)}, {"user": ""}])
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of remark"):
        Remark(**parameters)


def test_equal_attacks_have_one_hash():
    one, other = ({"bits": 64, "strength": 0.1}, {"strength": 0.1, "bits": 64})
    assert len({Remark(settings=one), Remark(settings=other), Remark(), Remark(user="a")}) == 3
