"""One byte string for one JSON value, so that hashes and signatures mean something."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from typing_extensions import Buffer


def canonical_json(value: Any) -> bytes:
    """The JSON text of ``value`` with sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        TypeError: the value is not plain JSON.
        ValueError: it holds NaN or an infinity.

    Example:
        >>> canonical_json({"b": 1, "a": [True, None]})
        b'{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(*parts: Buffer) -> str:
    """SHA-256 of the parts, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
