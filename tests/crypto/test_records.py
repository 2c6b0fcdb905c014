"""Encrypted records: each opens at its own place, under its own key, and nowhere else."""

import pytest

from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.records import RecordCipher

CIPHER = RecordCipher(bytes(32))


def test_a_record_opens_at_its_place() -> None:
    assert CIPHER.open(CIPHER.seal(b"content", place=b"a"), place=b"a") == b"content"


def test_a_record_does_not_open_at_another_place() -> None:
    with pytest.raises(TamperedError):
        CIPHER.open(CIPHER.seal(b"content", place=b"a"), place=b"b")


def test_a_record_does_not_open_under_another_key() -> None:
    with pytest.raises(TamperedError):
        RecordCipher(bytes(31) + b"\1").open(CIPHER.seal(b"content", place=b"a"), place=b"a")


def test_every_flipped_bit_of_a_record_is_refused() -> None:
    sealed = CIPHER.seal(b"content", place=b"a")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TamperedError):
            CIPHER.open(bytes(changed), place=b"a")


@pytest.mark.parametrize("size", [0, 5, 12, 27])
def test_a_record_that_was_cut_is_refused(size: int) -> None:
    with pytest.raises(TamperedError):
        CIPHER.open(CIPHER.seal(b"content", place=b"a")[:size], place=b"a")


def test_the_same_content_is_sealed_differently_each_time() -> None:
    assert CIPHER.seal(b"content", place=b"a") != CIPHER.seal(b"content", place=b"a")


def test_a_tag_tells_how_the_parts_were_divided() -> None:
    assert CIPHER.tag(b"ab", b"c") == CIPHER.tag(b"ab", b"c") != CIPHER.tag(b"a", b"bc")


def test_a_tag_needs_the_key() -> None:
    assert CIPHER.tag(b"a") != RecordCipher(bytes(31) + b"\1").tag(b"a")


def test_a_master_key_of_another_size_is_refused() -> None:
    with pytest.raises(ParameterError, match="32 bytes"):
        RecordCipher(bytes(16))
