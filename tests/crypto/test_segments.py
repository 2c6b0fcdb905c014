"""Where the segments of a ciphertext lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.segments import (
    HEADER,
    MAX_SEGMENTS,
    SEGMENT,
    TAG,
    Segments,
    ciphertext_size,
    plaintext_size,
    segment_count,
)
from sealmark.crypto.streaming import (
    encrypt_bytes,
)

KEY = bytes(range(32))
FIRST = SEGMENT - TAG - HEADER  # plaintext bytes of a full first segment
FULL = SEGMENT - TAG
SIZES = [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL, FIRST + FULL + 1, 5_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_are_inverse_and_true(size):
    sealed = ciphertext_size(size)
    assert plaintext_size(sealed) == size
    assert len(encrypt_bytes(KEY, bytes(size))) == sealed


@given(st.integers(0, 40 * SEGMENT))
def test_every_size_belongs_to_one_plaintext_size_or_none(size):
    try:
        plain = plaintext_size(size)
    except TamperedError:
        assert size < HEADER + TAG or 1 <= size % SEGMENT <= TAG  # no room for a last segment
    else:
        assert ciphertext_size(plain) == size


@pytest.mark.parametrize("size", [HEADER, HEADER + TAG - 1, SEGMENT + 1, SEGMENT + TAG, 3 * SEGMENT + TAG])
def test_a_size_that_no_ciphertext_has_is_refused(size):
    with pytest.raises(TamperedError, match="no ciphertext has this size"):
        plaintext_size(size)
    assert ciphertext_size(plaintext_size(size + TAG + 1)) == size + TAG + 1


def test_segments_lie_side_by_side_in_both_streams():
    segments = Segments(KEY, bytes([HEADER]) + bytes(39), 3 * FULL, b"")
    plain = [segments.plain(i) for i in range(segments.count)]
    sealed = [segments.sealed(i) for i in range(segments.count)]
    assert [a[1] for a in plain] == [b[0] for b in plain[1:]] + [3 * FULL]
    assert [a[1] for a in sealed] == [b[0] for b in sealed[1:]] + [ciphertext_size(3 * FULL)]
    assert plain[0][0] == 0
    assert sealed[0][0] == HEADER
    assert all(segments.at(start) == segments.at(end - 1) == i for i, (start, end) in enumerate(plain))


@pytest.mark.parametrize("size", [-1, MAX_SEGMENTS * FULL])
def test_a_size_that_the_format_cannot_hold_is_refused(size):
    with pytest.raises(ParameterError, match="4 PiB"):
        ciphertext_size(size)


def test_the_largest_size_is_accepted():
    assert segment_count(MAX_SEGMENTS * FULL - HEADER) == MAX_SEGMENTS
    assert ciphertext_size(MAX_SEGMENTS * FULL - HEADER) == MAX_SEGMENTS * SEGMENT
