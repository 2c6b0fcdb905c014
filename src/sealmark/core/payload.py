"""An owner's message as keyed bits: whatever it says, the bits are fair coins to anyone without the secret."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret


def payload_bits(secret: Secret, count: int) -> NDArray[np.uint8]:
    """The bits to embed: the secret's keystream, XOR the payload of `Watermark.keygen`.

    Args:
        secret: its payload may be empty.
        count: how many bits the scheme carries.

    Returns:
        (count,) of 0 and 1.

    Raises:
        ParameterError: the payload is longer than that.

    Example:
        >>> secret = Secret(bytes(32), {"scheme": "example", "payload": b"hello".hex()})
        >>> payload_bytes(secret, payload_bits(secret, 64))
        b'hello'
    """
    payload = np.frombuffer(bytes.fromhex(secret.facts.get("payload", "")), np.uint8)
    message = np.unpackbits(payload)
    if len(message) > count:
        raise ParameterError("payload too long", expected=f"at most {count // 8} bytes", found=len(payload))
    return secret.stream("message").bits(count) ^ np.pad(message, (0, count - len(message)))


def payload_bytes(secret: Secret, bits: NDArray[np.uint8]) -> bytes:
    """The payload that bits read from a suspect spell; empty where the secret carries none."""
    count = len(bytes.fromhex(secret.facts.get("payload", "")))
    return np.packbits(bits ^ secret.stream("message").bits(len(bits)))[:count].tobytes()
