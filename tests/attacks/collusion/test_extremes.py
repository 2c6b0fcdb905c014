"""The extremes: cheap against trained marks, no better than the average against spread ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.attacks.collusion.extremes import Extremes
from sealmark.core.errors import ParameterError


@pytest.mark.parametrize(
    ("side", "expected"), [("low", np.min), ("high", np.max), ("middle", lambda r, a: (r.min(a) + r.max(a)) / 2)]
)
def test_it_is_the_named_side_of_all_copies(side, expected, made_of):
    rows = np.random.default_rng(0).normal(size=(4, 50))
    torch.testing.assert_close(made_of(Extremes(side), rows), torch.from_numpy(expected(rows, 0)).float())


def test_either_draws_one_of_the_two_for_each_weight(made_of):
    rows = np.random.default_rng(0).normal(size=(4, 2000))
    made = made_of(Extremes("either"), rows).numpy()
    low, high = rows.min(0).astype(np.float32), rows.max(0).astype(np.float32)
    assert ((made == low) | (made == high)).all()
    assert 0.45 < (made == low).mean() < 0.55
    assert not np.array_equal(made, made_of(Extremes("either"), rows, seed=1).numpy())


@pytest.mark.parametrize("side", ["low", "high", "either", "middle"])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_spread_marks_name_colluders_and_nobody_else(side, size, spread, digits, plain):
    pirate = spread.after("extremes", size, side=side)
    found = spread.accused(pirate)
    assert found
    assert found <= set(spread.users[:size])
    assert digits.score(pirate) >= digits.score(plain) - 0.01


@pytest.mark.parametrize("side", ["either", "middle"])
def test_deepmarks_withstands_what_stays_between_the_copies(side, words_of_a_code):
    pirate = words_of_a_code.after("extremes", side=side)
    assert words_of_a_code.accused(pirate) == set(words_of_a_code.users[:3])


def test_known_break_the_minimum_of_three_deepmarks_copies_lets_some_or_all_go(words_of_a_code, digits, plain):
    guilty = set(words_of_a_code.users[:3])
    pirate = words_of_a_code.after("extremes", side="low")
    assert words_of_a_code.accused(pirate) < guilty
    assert digits.score(pirate) >= digits.score(plain) - 0.01


def test_another_side_is_refused():
    with pytest.raises(ParameterError, match="bad side"):
        Extremes("left")  # type: ignore[arg-type]
