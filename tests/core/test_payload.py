"""Messages as keyed bits."""

from __future__ import annotations

import numpy as np
import pytest

from sealmark.core.errors import ParameterError
from sealmark.core.payload import payload_bits, payload_bytes
from sealmark.core.secret import Secret


def _secret(payload: bytes = b"", seed: int = 0) -> Secret:
    return Secret(bytes([seed]) * 32, {"scheme": "test", "payload": payload.hex()})


@pytest.mark.parametrize("payload", [b"", b"a", b"owner, 2026", bytes(16)])
def test_a_payload_comes_back(payload: bytes) -> None:
    secret = _secret(payload)
    assert payload_bytes(secret, payload_bits(secret, 128)) == payload


def test_bits_are_fair_whatever_the_payload_says() -> None:
    bits = np.stack([payload_bits(_secret(bytes(32), seed), 256) for seed in range(200)])
    assert abs(bits.mean() - 0.5) < 0.01
    assert bits.mean(0).std() < 0.06


def test_another_seed_reads_another_message() -> None:
    assert payload_bytes(_secret(b"owner", 1), payload_bits(_secret(b"owner"), 64)) != b"owner"


def test_a_payload_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ParameterError, match="payload too long: expected at most 4 bytes, found 5"):
        payload_bits(_secret(b"owner"), 39)
