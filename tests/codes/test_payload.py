"""Messages as keyed bits."""

from __future__ import annotations

import numpy as np
import pytest

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret


def _secret(payload: bytes = b"", seed: int = 0) -> Secret:
    return Secret(bytes([seed]) * 32, {"scheme": "test", "payload": payload.hex()})


def _read_with_errors(payload: bytes, bits: int, rate: float) -> float:
    """How often a payload reads right from bits of which ``rate`` are wrong."""
    rng, right = np.random.default_rng(0), 0
    for seed in range(40):
        secret = _secret(payload, seed)
        right += payload_bytes(secret, payload_bits(secret, bits) ^ (rng.uniform(size=bits) < rate)) == payload
    return right / 40


@pytest.mark.parametrize("bits", [128, 131, 2047, 5000])
@pytest.mark.parametrize("payload", [b"", b"a", b"owner, 2026", bytes(16)])
def test_a_payload_comes_back(payload: bytes, bits: int) -> None:
    secret = _secret(payload)
    assert payload_bytes(secret, payload_bits(secret, bits)) == payload


def test_a_payload_that_fills_its_mark_comes_back() -> None:
    secret = _secret(b"owner")
    assert payload_bytes(secret, payload_bits(secret, 40)) == b"owner"


def test_a_long_payload_comes_back_from_many_codewords() -> None:
    payload = np.random.default_rng(0).bytes(1000)
    bits = payload_bits(_secret(payload), 40_000)
    bits[::200] ^= 1
    assert payload_bytes(_secret(payload), bits) == payload


def test_two_percent_of_wrong_bits_do_no_harm_where_there_is_room() -> None:
    assert _read_with_errors(b"sealmark", 256, 0.02) == 1
    assert _read_with_errors(b"sealmark", 64, 0.02) < 0.5  # the control: no room, no check bytes


def test_where_too_much_is_wrong_the_bytes_come_as_they_were_read() -> None:
    secret = _secret(b"owner")
    bits = payload_bits(secret, 128)
    bits[-8 * 8 :] ^= 1  # eight wrong check bytes; eleven correct four
    bits[7] ^= 1
    assert payload_bytes(secret, bits) == b"nwner"


def test_bits_are_fair_whatever_the_payload_says() -> None:
    bits = np.stack([payload_bits(_secret(bytes(32), seed), 256) for seed in range(200)])
    assert abs(bits.mean() - 0.5) < 0.01
    assert bits.mean(0).std() < 0.06


def test_check_bits_are_fair_too() -> None:
    bits = np.stack([payload_bits(_secret(b"owner", seed), 256) for seed in range(200)])
    assert abs(bits.mean() - 0.5) < 0.01
    assert bits.mean(0).std() < 0.06


def test_another_seed_reads_another_message() -> None:
    assert payload_bytes(_secret(b"owner", 1), payload_bits(_secret(b"owner"), 64)) != b"owner"


def test_a_payload_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ParameterError, match="payload too long: expected at most 4 bytes, found 5"):
        payload_bits(_secret(b"owner"), 39)
