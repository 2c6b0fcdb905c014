"""The median: what it is, and that coalitions within the code's reach are named all the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.attacks.collusion.median import Median
from sealmark.attacks.removal.permute import Permute
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.weights import weights_of


@pytest.mark.parametrize("size", [3, 4, 5])
def test_it_is_the_lower_of_the_middle_values(size, made_of):
    rows = np.random.default_rng(size).normal(size=(size, 50))
    expected = np.sort(rows, 0)[(size - 1) // 2]
    torch.testing.assert_close(made_of(Median(), rows), torch.from_numpy(expected).float())


def test_two_copies_have_none(plain, digits, rng):
    with pytest.raises(ParameterError, match="copies"):
        Median().run([plain, plain], Resources.of(digits), rng=rng)


def test_three_colluders_are_named_and_nobody_else(spread, digits, plain):
    pirate = spread.after("median")
    assert spread.accused(pirate) == set(spread.users[:3])
    assert digits.score(pirate) >= digits.score(plain) - 0.01


def test_known_break_twice_as_many_as_the_code_is_made_for_go_free(spread, digits, plain):
    pirate = spread.after("median", 6)
    assert spread.accused(pirate) == set()
    assert digits.score(pirate) >= digits.score(plain) - 0.01


def test_known_break_permuted_neurons_hide_the_coalition_until_a_live_original_puts_them_back(spread, digits, rng):
    hidden = Permute().run(spread.after("median"), Resources.of(digits), rng=rng).model
    assert spread.accused(hidden, weights_of(spread.original)) == set()
    assert spread.accused(hidden) == set(spread.users[:3])


def test_three_of_five_that_deepmarks_is_made_for_are_named(words_of_a_code):
    assert words_of_a_code.accused(words_of_a_code.after("median")) == set(words_of_a_code.users[:3])
