"""A vote on every weight: what it computes, and for how many it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.attacks.collusion.majority import Majority
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError


def vote(values, minority):
    """The rule in plain words, one weight at a time."""
    middle = (min(values) + max(values)) / 2
    above, below = [v for v in values if v > middle], [v for v in values if v <= middle]
    if len(above) == len(below) or not above:
        return sum(values) / len(values)
    few, many = sorted((above, below), key=len)
    chosen = few if minority else many
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("minority", [False, True])
@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("levels", [2, 50])
def test_it_is_the_mean_of_the_side_that_was_voted_for(minority, size, levels, made_of):
    rows = np.random.default_rng(size).integers(levels, size=(size, 60)).astype(float)
    expected = [vote(column, minority) for column in rows.T.tolist()]
    torch.testing.assert_close(made_of(Majority(minority), rows), torch.tensor(expected))


@pytest.mark.parametrize(("minority", "expected"), [(False, [1.0, 0.0]), (True, [0.0, 1.0])])
def test_of_two_values_it_takes_one(minority, expected, made_of):
    assert made_of(Majority(minority), [[1, 0], [1, 0], [0, 1]]).tolist() == expected


def test_two_cannot_vote(plain, digits, rng):
    with pytest.raises(ParameterError, match="copies"):
        Majority().run([plain, plain], Resources.of(digits), rng=rng)


@pytest.mark.parametrize("minority", [False, True])
def test_three_colluders_are_named_and_nobody_else(minority, spread, digits, plain):
    pirate = spread.after("majority", minority=minority)
    found = spread.accused(pirate)
    assert found
    assert found <= set(spread.users[:3])
    assert digits.score(pirate) >= digits.score(plain) - 0.01


@pytest.mark.parametrize("minority", [False, True])
def test_known_break_a_vote_of_eight_names_nobody(minority, spread, digits, plain):
    pirate = spread.after("majority", 8, minority=minority)
    assert spread.accused(pirate) == set()
    assert digits.score(pirate) >= digits.score(plain) - 0.01


def test_deepmarks_withstands_the_majority(words_of_a_code):
    assert words_of_a_code.accused(words_of_a_code.after("majority")) == set(words_of_a_code.users[:3])


def test_known_break_the_minority_of_three_deepmarks_copies_names_nobody(words_of_a_code, digits, plain):
    pirate = words_of_a_code.after("majority", minority=True)
    assert words_of_a_code.accused(pirate) == set()
    assert digits.score(pirate) >= digits.score(plain) - 0.01
