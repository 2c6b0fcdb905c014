"""An owner's message as keyed bits: whatever it says, the bits are fair coins to anyone without the secret."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sealmark.codes.reed_solomon import BLOCK, decode, encode
from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.secret import Secret


def payload_bits(secret: Secret, count: int) -> NDArray[np.uint8]:
    """The bits to embed: the secret's keystream, XOR the payload of `Watermark.keygen`.

    Room that the payload leaves goes to check bytes (`sealmark.codes.reed_solomon`), so that it reads right
    from a mark with wrong bits. Under the keystream neither changes anything for anyone without the secret.

    Args:
        secret: its payload may be empty.
        count: how many bits the scheme carries.

    Returns:
        (count,) of 0 and 1.

    Raises:
        ParameterError: the payload is longer than that.

    Example:
        >>> secret = Secret(bytes(32), {"scheme": "example", "payload": b"hello".hex()})
        >>> bits = payload_bits(secret, 128)
        >>> bits[3:30] ^= 1
        >>> payload_bytes(secret, bits)
        b'hello'
    """
    payload = bytes.fromhex(secret.facts.get("payload", ""))
    if len(payload) > count // 8:
        raise ParameterError("payload too long", expected=f"at most {count // 8} bytes", found=len(payload))
    message = np.unpackbits(np.frombuffer(encode(payload, _room(len(payload), count)), np.uint8))
    return secret.stream("message").bits(count) ^ np.pad(message, (0, count - len(message)))


def payload_bytes(secret: Secret, bits: NDArray[np.uint8]) -> bytes:
    """The payload that bits read from a suspect spell; empty where the secret carries none.

    Where more is wrong than the check bytes can correct, its bytes come as they were read. They prove
    nothing either way: the verdict rests on all bits together.
    """
    count = len(bytes.fromhex(secret.facts.get("payload", "")))
    read = np.packbits(bits ^ secret.stream("message").bits(len(bits)))[: _room(count, len(bits))].tobytes()
    try:
        return decode(read, count)
    except FormatError:
        return read[:count]


def _room(payload: int, bits: int) -> int:
    """Bytes for payload and check bytes: no more codewords than leave half of each for the payload."""
    return min(bits // 8, BLOCK * -(-2 * payload // BLOCK))
