"""Keyed streams: the cipher's own bytes at any offset, and fair numbers made of them."""

from __future__ import annotations

import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from sealmark.core.errors import ParameterError
from sealmark.crypto.random import Stream, Streams, derive_key

KEY = bytes(range(32))
STREAM = Stream(KEY)
STREAMS = Streams(KEY)


def test_bytes_are_the_blocks_of_the_counter() -> None:
    blocks = b"".join(i.to_bytes(16, "big") for i in range(5))
    encryptor = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor()  # noqa: S305  (the independent route)
    assert STREAM.raw(80).tobytes() == encryptor.update(blocks)


@given(st.integers(0, 3 << 20), st.integers(0, 100))
def test_any_offset_reads_the_same_stream(offset: int, count: int) -> None:
    whole = STREAM.raw(4 << 20)
    assert np.array_equal(STREAM.raw(count, offset=offset), whole[offset : offset + count])
    bits = np.unpackbits(whole[: 1 << 14])
    assert np.array_equal(STREAM.bits(count, offset=offset % 100_000), bits[offset % 100_000 :][:count])


def test_keys_are_rfc_5869() -> None:
    """Its first test case."""
    expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    found = derive_key(
        bytes.fromhex("0b" * 22), salt=bytes(range(13)), info=bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"), length=42
    )
    assert found.hex() == expected
    assert found == HKDF(SHA256(), 42, bytes(range(13)), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")).derive(b"\x0b" * 22)


def test_uniform_and_normal_numbers_follow_their_laws() -> None:
    uniform = STREAM.uniform(20_000)
    assert 0 < uniform.min() <= uniform.max() < 1
    assert kstest(uniform, "uniform").pvalue > 1e-3
    assert kstest(STREAM.normal(20_000), "norm").pvalue > 1e-3
    assert kstest(uniform**2, "uniform").pvalue < 1e-9  # the control


@pytest.mark.parametrize("high", [1, 2, 10, 1000, 2**63])
def test_integers_stay_below_their_bound(high: int) -> None:
    drawn = STREAM.integers(5000, high)
    assert drawn.min() >= 0
    assert drawn.max() < high


def test_integers_are_fair() -> None:
    assert chisquare(np.bincount(STREAM.integers(50_000, 10))).pvalue > 1e-3


def test_rejected_words_are_drawn_again() -> None:
    """Of 2**64 words, a bound of 2**63 - 1 leaves two over at the top; a small generator shows more."""

    class Full(Stream):
        def words(self, count: int, *, offset: int = 0) -> np.ndarray:  # type: ignore[type-arg]
            plain = super().words(count, offset=offset)
            return np.where((np.arange(offset, offset + count) % 2) == 0, np.uint64(2**64 - 1), plain)

    drawn = Full(KEY).integers(100, 3 * 2**61)
    assert len(drawn) == 100
    assert (drawn == np.uint64(2**64 - 1) % np.uint64(3 * 2**61)).sum() == 0


def test_permutation_moves_everything_once() -> None:
    order = STREAM.permutation(1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, np.arange(1000))


def test_signs_are_signs() -> None:
    signs = STREAM.signs(10_000)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 4 * 100


def test_another_key_gives_another_stream() -> None:
    assert not np.array_equal(Stream(bytes(32)).raw(32), STREAM.raw(32))


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_key_of_a_wrong_length_is_refused(key: bytes) -> None:
    with pytest.raises(ParameterError, match="32 bytes"):
        Stream(key)


@pytest.mark.parametrize(("count", "offset"), [(-1, 0), (1, -1)])
def test_range_before_the_start_is_refused(count: int, offset: int) -> None:
    with pytest.raises(ParameterError):
        STREAM.raw(count, offset=offset)


@pytest.mark.parametrize("high", [0, -5, 2**63 + 1])
def test_bound_out_of_range_is_refused(high: int) -> None:
    with pytest.raises(ParameterError):
        STREAM.integers(3, high)


def test_equal_words_keep_their_order_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(bytes(32))
    monkeypatch.setattr(Stream, "words", lambda self, count: np.zeros(count, np.uint64))
    assert stream.permutation(100).tolist() == list(range(100))


def test_a_name_has_the_blocks_of_a_counter_from_its_mac() -> None:
    derived = HKDF(SHA256(), 64, b"", b"sealmark/streams/v1").derive(KEY)
    first = int.from_bytes(hmac.digest(derived[:32], b"alice", "sha256")[:16], "big")
    blocks = b"".join(((first + i) % 2**128).to_bytes(16, "big") for i in range(3))
    encryptor = Cipher(algorithms.AES256(derived[32:]), modes.ECB()).encryptor()  # noqa: S305  (the independent route)
    assert STREAMS.raw(["alice"], 40)[0].tobytes() == encryptor.update(blocks)[:40]


def test_a_name_has_the_same_stream_in_any_company() -> None:
    many = [f"user{i}" for i in range(100)]
    assert np.array_equal(STREAMS.raw(many, 24)[17:18], STREAMS.raw(["user17"], 30)[:, :24])
    assert len(np.unique(STREAMS.raw(many, 8), axis=0)) == 100


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "b"), ("", " "), ("\u00e9", "e\u0301"), ("\ud800", "\udfff"), ("\U0001f600", "\ud83d\ude00")],
)
def test_names_that_differ_in_a_code_point_have_other_streams(one: str, other: str) -> None:
    found = STREAMS.raw([one, other], 16)
    assert not np.array_equal(found[0], found[1])


def test_bytes_of_names_are_fair_and_follow_the_key() -> None:
    drawn = STREAMS.raw([f"user{i}" for i in range(1000)], 50)
    assert chisquare(np.bincount(drawn.reshape(-1), minlength=256)).pvalue > 1e-3
    assert not np.array_equal(drawn[:1], Streams(bytes(32)).raw(["user0"], 50))


@pytest.mark.parametrize(("names", "count"), [([], 5), (["a", "b"], 0)])
def test_no_names_or_no_bytes_are_an_empty_table(names: list[str], count: int) -> None:
    assert STREAMS.raw(names, count).shape == (len(names), count)


def test_streams_refuse_a_short_key_and_a_negative_count() -> None:
    with pytest.raises(ParameterError, match="32 bytes"):
        Streams(bytes(16))
    with pytest.raises(ParameterError, match="0 or more"):
        STREAMS.raw(["a"], -1)
