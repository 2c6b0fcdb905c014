"""The header of sealed files: the vectors, and every way to spoil a small file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import (
    FormatError,
    ParameterError,
    SealmarkError,
    TamperedError,
    WrongKeyError,
)
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.segments import HEADER, TAG
from sealmark.crypto.wrapping import key_id, wrap
from sealmark.formats.sealed import Body, SealedHeader, open_sealed, seal_bytes, seal_file
from sealmark.formats.sealed_header import MAX_HEADER, PREFIX, sniff_body, unpack_prefix

KEY = bytes(range(32))
OWNER = Identity(bytes(31) + b"\1")
WORDS = Passphrase("correct horse", cost=Cost(iterations=1, memory_kib=64, lanes=1))
VECTORS = json.loads((Path(__file__).parent.parent / "vectors/sealed/vectors.json").read_text())


def small(**changes: object) -> bytes:
    return seal_bytes(b"layer", KEY, **{"model": "m", **changes})


def read(data: bytes, opener: bytes | Identity | Passphrase = KEY) -> bytes:
    return bytes(open_sealed(data).read_all(opener))


def test_the_layout_is_the_one_that_is_drawn():
    data = small()
    magic, version, length = struct.unpack(">7sBI", data[:12])
    assert (magic, version) == (b"SEALED\0", 1)
    header = json.loads(data[12 : 12 + length])
    assert header == {
        "format": "sealmark.sealed.v1", "kind": "model", "model": "m", "role": "weights", "body": "bytes",
        "key_id": key_id(KEY), "size": 5, "wraps": [],
    }  # fmt: skip
    assert len(data) == 12 + length + HEADER + 5 + TAG


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_vector(vector):
    text = VECTORS["openers"][vector["opener"]]
    if "key" in vector["opener"]:
        opener: bytes | Identity | Passphrase = bytes.fromhex(text)
    else:
        opener = Identity.parse(text) if "identity" in vector["opener"] else Passphrase(text)
    if vector["outcome"] == "OK":
        expected = "" if vector["name"] == "empty" else VECTORS["plain"]
        assert read(bytes.fromhex(vector["file"]), opener).hex() == expected
    else:
        with pytest.raises(SealmarkError) as caught:
            read(bytes.fromhex(vector["file"]), opener)
        assert caught.value.code == vector["outcome"]


def test_every_outcome_has_a_vector():
    assert {v["outcome"] for v in VECTORS["vectors"]} == {"OK", "WRONG_KEY", "BAD_FORMAT", "TAMPERED"}


@pytest.mark.parametrize("opener", [KEY, OWNER, WORDS], ids=["key", "identity", "passphrase"])
def test_every_flipped_bit_of_a_small_file_is_refused(opener):
    wraps = {bytes: [], Identity: [OWNER.recipient], Passphrase: [WORDS]}[type(opener)]
    data = small(wraps=wraps)
    assert read(data, opener) == b"layer"
    bits = range(8) if opener is not WORDS else (0, 3, 5)  # each of those costs an Argon2id
    for index, bit in itertools.product(range(len(data)), bits):
        changed = bytearray(data)
        changed[index] ^= 1 << bit
        with pytest.raises((FormatError, TamperedError, WrongKeyError)):
            read(bytes(changed), opener)


def test_every_truncation_of_a_small_file_is_refused():
    data = small(wraps=[OWNER.recipient])
    for length in range(len(data)):
        with pytest.raises(FormatError):
            open_sealed(data[:length])


@given(st.binary(max_size=300))
def test_noise_is_no_sealed_file(noise):
    with pytest.raises(FormatError):
        open_sealed(noise)


@given(st.binary(max_size=200))
def test_noise_is_no_header(noise):
    with pytest.raises(FormatError):
        open_sealed(PREFIX.pack(b"SEALED\0", 1, len(noise)) + noise)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)
)


@given(st.sampled_from(["body", "format", "key_id", "kind", "model", "role", "size", "wraps"]), JSON)
def test_a_header_with_any_other_value_is_refused(name, value):
    from sealmark.core.canonical import canonical_json

    data = small(wraps=[OWNER.recipient])
    header = json.loads(data[12 : open_sealed(data).start])
    if header[name] != value:
        text = canonical_json({**header, name: value})
        with pytest.raises((FormatError, TamperedError, WrongKeyError)):
            read(PREFIX.pack(b"SEALED\0", 1, len(text)) + text + data[open_sealed(data).start :], OWNER)


@pytest.mark.parametrize("text", [b"[]", b"3", b"[" * 60_000, b'"x"', b"{}", b"1" * 5000])
def test_json_that_is_no_header_is_refused(text):
    with pytest.raises(FormatError):
        open_sealed(PREFIX.pack(b"SEALED\0", 1, len(text)) + text)


def test_a_hostile_size_asks_for_no_memory():
    data = small()
    start = open_sealed(data).start
    text = data[12:start].replace(b'"size":5', b'"size":4503599627370496')
    with pytest.raises(FormatError):
        open_sealed(PREFIX.pack(b"SEALED\0", 1, len(text)) + text + data[start:])


def test_a_later_version_is_named():
    with pytest.raises(FormatError, match=r"expected 1, found 2\. Use a later sealmark"):
        unpack_prefix(PREFIX.pack(b"SEALED\0", 2, 5))


def test_a_header_over_64_kib_is_refused_before_it_is_read():
    assert unpack_prefix(PREFIX.pack(b"SEALED\0", 1, MAX_HEADER)) == MAX_HEADER
    with pytest.raises(FormatError, match="too large"):
        unpack_prefix(PREFIX.pack(b"SEALED\0", 1, MAX_HEADER + 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", "a\nb"),
        ("model", "x" * 201),
        ("role", "Weights"),
        ("role", ""),
        ("kind", "a b"),
        ("kind", "x" * 65),
        ("body", "pickle"),
        ("wraps", [WORDS] * 5),
    ],
)
def test_a_bad_parameter_is_refused(name, value):
    with pytest.raises(ParameterError):
        small(**{name: value})


def test_a_key_id_must_be_a_digest():
    with pytest.raises(ParameterError, match="bad key id"):
        SealedHeader(model="m", body=Body.BYTES, size=0, key_id="A" * 64)


def test_too_many_recipients_for_a_header_are_refused():
    header = open_sealed(small()).header
    stanza = wrap(KEY, OWNER.recipient, context=b"")
    assert len(dataclasses.replace(header, wraps=(stanza,) * 200).pack()) < MAX_HEADER
    with pytest.raises(ParameterError, match="too large"):
        dataclasses.replace(header, wraps=(stanza,) * 260).pack()


SAFETENSORS = struct.pack("<Q", 2) + b"{}      "


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (SAFETENSORS, Body.SAFETENSORS),
        (b"GGUF\3\0\0\0", Body.GGUF),
        (b"\x08\x0a\x12\x07pytorch", Body.ONNX),
        (b"\x08\x08\x3a\x80\x01", Body.ONNX),
        (b"", Body.BYTES),
        (b"\x08", Body.BYTES),
        (b"PK\3\4 and so on", Body.BYTES),
        (b"\xff" * 8 + b"{", Body.BYTES),
        (b"\x08\x0a\x00", Body.BYTES),
    ],
)
def test_the_body_is_told_from_its_first_bytes(head, body):
    assert sniff_body(head, max(len(head), 16)) is body
    assert open_sealed(seal_bytes(head, KEY, model="m")).header.body is body


def test_a_real_safetensors_file_is_recognized(tmp_path: Path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, tmp_path / "a")
    header = seal_file(tmp_path / "a", tmp_path / "s", KEY, model="m")
    assert header.body is Body.SAFETENSORS


def test_the_body_that_is_given_is_taken():
    assert open_sealed(small(body="onnx")).header.body is Body.ONNX
