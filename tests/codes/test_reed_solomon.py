"""Reed-Solomon over bytes: what is corrected, up to the last byte, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealmark.codes.reed_solomon import decode, encode
from sealmark.core.errors import FormatError, ParameterError

MESSAGE = b"sealmark"


def damaged(word, places):
    changed = bytearray(word)
    for place in places:
        changed[place] ^= 1 + place % 255
    return bytes(changed)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.integers(2, 120), st.data())
def test_whatever_the_check_bytes_allow_for_is_corrected(message, check, data):
    word = encode(message, len(message) + check)
    missing = data.draw(st.integers(0, check - 2))
    places = data.draw(st.permutations(range(len(word))))
    hit = places[: missing + (check - 2 - missing) // 2]
    assert decode(damaged(word, hit), len(message), missing=hit[:missing]) == message


def test_a_word_begins_with_its_message():
    assert encode(MESSAGE, 32)[:8] == MESSAGE


@pytest.mark.parametrize("size", [8, 9, 10, 16, 255, 256, 1000])
def test_a_word_fills_its_size_and_reads_right(size):
    word = encode(MESSAGE, size)
    assert len(word) == size
    assert decode(word, 8) == MESSAGE


def test_one_wrong_byte_more_is_refused():
    word = encode(MESSAGE, 20)
    assert decode(damaged(word, range(5)), 8) == MESSAGE
    with pytest.raises(FormatError, match=r"2 wrong \+ missing <= 10, found 0 missing, and more"):
        decode(damaged(word, range(6)), 8)


def test_one_missing_byte_more_is_refused():
    word = encode(MESSAGE, 20)
    assert decode(damaged(word, range(10)), 8, missing=range(10)) == MESSAGE
    with pytest.raises(FormatError, match="found 11 missing"):
        decode(damaged(word, range(11)), 8, missing=range(11))


@pytest.mark.parametrize("size", [9, 10])
def test_one_or_two_check_bytes_only_detect(size):
    with pytest.raises(FormatError):
        decode(damaged(encode(MESSAGE, size), [3]), 8)


def test_without_check_bytes_a_word_is_its_message():
    assert decode(b"sealmork", 8) == b"sealmork"
    with pytest.raises(FormatError, match="1 missing"):
        decode(b"sealmork", 8, missing=[5])


@pytest.mark.parametrize("size", [12, 64, 255])
def test_noise_is_no_message(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        with pytest.raises(FormatError):
            decode(rng.bytes(size), 8)


def test_a_long_word_survives_a_burst():
    """A burst of 200 bytes hits each of four codewords in 50 places; in one of them it would be too much."""
    message = np.random.default_rng(0).bytes(500)
    word = encode(message, 1020)
    assert decode(damaged(word, range(100, 300)), 500) == message


def test_a_message_shorter_than_the_number_of_codewords_reads_right():
    word = encode(b"ab", 1000)
    assert decode(damaged(word, range(300)), 2) == b"ab"


def test_nothing_is_a_message_too():
    assert encode(b"", 4) == bytes(4)
    assert decode(b"junk", 0) == b""


@pytest.mark.parametrize(
    "call",
    [
        lambda: encode(MESSAGE, 7),
        lambda: decode(MESSAGE, 9),
        lambda: decode(MESSAGE, -1),
        lambda: decode(MESSAGE, 4, missing=[8]),
        lambda: decode(MESSAGE, 4, missing=[-1]),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ParameterError):
        call()
