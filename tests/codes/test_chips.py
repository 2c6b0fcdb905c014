"""Chips: what a block can carry. That marks are read back is tested with the scheme that uses them."""

from __future__ import annotations

import numpy as np
import pytest

from sealmark.codes.chips import Chips
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret

SECRET = Secret(bytes(32), {})


@pytest.mark.parametrize("bits", [0, 31, 33, 2**18 + 32])
def test_numbers_of_bits_that_fill_no_words_are_refused(bits):
    with pytest.raises(ParameterError, match="a multiple of 32"):
        Chips(SECRET, bits, {})


def test_every_position_comes_by_before_one_comes_again():
    order = Chips(SECRET, 1024, {}).order.reshape(-1, 32)
    assert (np.sort(order, axis=1) == np.arange(32)).all()
    assert not (order[0] == order[1]).all()
