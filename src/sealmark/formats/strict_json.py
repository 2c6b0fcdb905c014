"""JSON that means one thing: no duplicate names, no NaN, bounded in size, canonical where it is signed.

JSON has no infinity, and a p-value has a logarithm that may be one. So a signed document writes a
float that is not finite as ``{"$float": "-inf"}``; `to_plain` and `from_plain` translate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError

MAX_DEPTH = 32
_TAG = "$float"
_SPECIAL = ("inf", "-inf", "nan")


def parse_json(data: bytes, *, limit: int, what: str = "the document") -> Any:
    """Parse untrusted JSON.

    Args:
        data: UTF-8 text.
        limit: the largest accepted size in bytes.
        what: the name of the thing, for messages.

    Raises:
        FormatError: too large, not JSON, a name that stands twice, NaN, too deep.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}', limit=100)
        Traceback (most recent call last):
        ...
        sealmark.core.errors.FormatError: the document is not strict JSON: found a name stands twice
    """
    if len(data) > limit:
        raise FormatError(f"{what} is too large", expected=f"at most {limit} bytes", found=len(data))
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        found = error if isinstance(error, _StrictError) else type(error).__name__
        raise FormatError(f"{what} is not strict JSON", found=found) from None


def parse_canonical(data: bytes, *, limit: int, what: str = "the document") -> Any:
    """Parse untrusted JSON and refuse any spelling but the canonical one.

    Raises:
        FormatError: as `parse_json`, or `canonical_json` of the value is not ``data``.
    """
    value = parse_json(data, limit=limit, what=what)
    try:
        same = canonical_json(value) == data
    except (ValueError, RecursionError):  # a lone surrogate has no UTF-8
        same = False
    if not same:
        raise FormatError(
            f"{what} is not canonical", expected="sorted names, no spaces, one spelling of each value"
        )
    return value


def to_plain(value: Any, *, depth: int = MAX_DEPTH) -> Any:
    """A copy of ``value`` as plain JSON, floats that are not finite in their tagged form.

    Args:
        value: mappings, sequences, strings, numbers, booleans and None.
        depth: how many levels it may have.

    Raises:
        TypeError: a name that is not a string.
        ValueError: it uses the name of the tag itself, or is nested too deep.

    Example:
        >>> to_plain({"log10_p": float("-inf"), "bits": (1, 0)})
        {'log10_p': {'$float': '-inf'}, 'bits': [1, 0]}
    """
    if depth < 0:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("names must be strings")
        if _TAG in value:
            raise ValueError(f"the name {_TAG} is taken")
        return {name: to_plain(item, depth=depth - 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, depth=depth - 1) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_TAG: repr(float(value))}
    return value


def from_plain(value: Any, *, depth: int = MAX_DEPTH) -> Any:
    """The inverse of `to_plain`, for what `parse_json` read.

    Raises:
        FormatError: a tag with an unknown float, or nested too deep.
    """
    if depth < 0:
        raise FormatError("nested too deep", expected=f"at most {MAX_DEPTH} levels")
    if isinstance(value, dict):
        if _TAG not in value:
            return {name: from_plain(item, depth=depth - 1) for name, item in value.items()}
        if len(value) != 1 or value[_TAG] not in _SPECIAL:
            raise FormatError("bad number", expected=f"{_TAG}: one of {_SPECIAL}")
        return float(value[_TAG])
    return [from_plain(item, depth=depth - 1) for item in value] if isinstance(value, list) else value


class _StrictError(ValueError):
    """JSON by the letter, refused by us; its text is safe to show."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _StrictError("a name stands twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise _StrictError(constant)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _StrictError("a number beyond the range of a double")
    return number
