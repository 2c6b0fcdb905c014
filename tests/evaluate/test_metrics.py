import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ParameterError
from sealmark.evaluate.metrics import (
    attacker_gain,
    authorization_gap,
    lock_strength,
)

SHARES = st.floats(0, 1, allow_subnormal=False)


@given(scratch=SHARES, plain=SHARES)
def test_the_gain_is_1_for_a_full_break_and_0_for_none(scratch, plain):
    full, none = attacker_gain(plain, scratch, plain), attacker_gain(scratch, scratch, plain)
    assert (full, none) == ((1.0, 0.0) if plain > scratch else (None, None))


def test_an_attacker_who_did_worse_than_from_scratch_has_a_negative_gain():
    assert attacker_gain(0.7, 0.8, 0.9) == pytest.approx(-1.0)


@given(authorized=SHARES, unauthorized=SHARES, chance=SHARES)
def test_the_lock_strength_is_a_share_or_has_no_meaning(authorized, unauthorized, chance):
    strength = lock_strength(authorized, unauthorized, chance)
    assert strength is None if authorized <= chance else 0 <= strength <= 1


@pytest.mark.parametrize(("unauthorized", "strength"), [(0.05, 1.0), (0.1, 1.0), (0.5, 0.5), (0.95, 0.0)])
def test_the_lock_strength_falls_with_the_unauthorized_accuracy(unauthorized, strength):
    assert lock_strength(0.9, unauthorized, 0.1) == pytest.approx(strength)


def test_the_gap_is_to_the_better_of_no_key_and_wrong_keys():
    assert authorization_gap(0.9, 0.3, [0.1, 0.2]) == pytest.approx(0.6)
    assert authorization_gap(0.9, 0.1, [0.1, 0.5]) == pytest.approx(0.6)


def test_a_gap_without_wrong_keys_is_refused():
    with pytest.raises(ParameterError, match=r"no wrong keys.*Try 20"):
        authorization_gap(0.9, 0.1, [])
