"""Canonical JSON: one byte string for one value, so that hashes mean something."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.canonical import canonical_json, sha256_hex

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(PLAIN)
def test_canonical_json_is_json_for_the_same_value(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(TEXT, st.integers(), max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_values_that_differ_give_other_bytes() -> None:
    values = [1, "1", True, None, [1], {"a": 1}, {"a": "1"}, 1.5]
    assert len({canonical_json(value) for value in values}) == len(values)


def test_text_is_utf8_without_escapes_and_keys_are_sorted_at_every_depth() -> None:
    assert canonical_json({"ü": {"z": 1, "a": 2.5}, "b": []}) == '{"b":[],"ü":{"a":2.5,"z":1}}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}, "\ud800"])
def test_what_is_no_json_value_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), {"a": b""}])
def test_what_is_not_plain_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_the_digest_is_sha256_of_the_parts_in_a_row() -> None:
    assert sha256_hex(b"ab", memoryview(b"c"), b"") == hashlib.sha256(b"abc").hexdigest()
    # FIPS 180-2, appendix B.1
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
