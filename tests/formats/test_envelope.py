"""Signed documents: the published DSSE examples, our vectors, and every flipped bit."""

import base64
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ArtifactError, FormatError, ParameterError, PolicyError, SealmarkError
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats import envelope
from sealmark.formats.envelope import (
    KINDS,
    open_document,
    payload_type,
    pre_authentication_encoding,
    sign_document,
    verify_document,
)

FOLDER = Path(__file__).parents[1] / "vectors"
FILE = json.loads((FOLDER / "envelope.json").read_text())
OWNER = VerifyKey(bytes.fromhex(FILE["keys"]["owner"]))
KEY = SigningKey(bytes(32))
ANCHORS = [KEY.verify_key]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda name: name != "$float"), inner),
    max_leaves=8,
)


def test_the_example_of_the_dsse_protocol_is_encoded_as_published() -> None:
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


# secure-systems-lab/dsse, testvectors/vectors.json: payload type, payload, PAE, signature by RFC 8032's TEST 1
PUBLISHED = {
    "single-signature": (
        "application/vnd.in-toto+json",
        b'{"_type":"https://in-toto.io/Statement/v1"}',
        "445353457631203238206170706c69636174696f6e2f766e642e696e2d746f746f2b6a736f6e203433207b225f74797065223a22"
        "68747470733a2f2f696e2d746f746f2e696f2f53746174656d656e742f7631227d",
        "2WAfaHm5jluo0w+0rk8uVkluELJYWjSmU9x7EUzx+AyteDGJ4/nqyJXfmAUVFIAoQafWm7AxBZNw5M9ixNHiCA==",
    ),
    "non-ascii-payload-type": (
        "application/vnd.ex\u00e4mple+json",
        b'{"_type":"https://in-toto.io/Statement/v1"}',
        "445353457631203239206170706c69636174696f6e2f766e642e6578c3a46d706c652b6a736f6e203433207b225f74797065223a22"
        "68747470733a2f2f696e2d746f746f2e696f2f53746174656d656e742f7631227d",
        "xmSk/ug66ysT7ayhkCIjhAq42zgZXSsEWuzUaNL7w2eGAdF/NU6/fRXPtmfN+5DNSAs5/i2lUnHjbbjPsu0tAw==",
    ),
    "empty-payload": (
        "application/vnd.in-toto+json",
        b"",
        "445353457631203238206170706c69636174696f6e2f766e642e696e2d746f746f2b6a736f6e203020",
        "gSggCAaTLTYyRH6FIDBem6meyIynsYy8RTHVzwx9tnTb7Bg/1jMWnuVgI/gffqmbsC2VX5/jHfkkDqsj7CDbDg==",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_dsse_signature_verifies_over_our_encoding(name: str) -> None:
    media_type, body, expected, signature = PUBLISHED[name]
    encoded = pre_authentication_encoding(media_type, body)
    assert encoded == bytes.fromhex(expected)
    OWNER.verify(base64.b64decode(signature), encoded)


def outcome_of(data: bytes) -> str:
    try:
        verify_document(data, "evidence", [OWNER])
    except SealmarkError as error:
        return error.code
    return "OK"


@pytest.mark.parametrize("vector", FILE["vectors"], ids=lambda vector: vector["name"])
def test_the_vector_has_its_outcome(vector: dict[str, str]) -> None:
    assert outcome_of(base64.b64decode(vector["data"])) == vector["outcome"]


def test_we_write_the_bytes_that_the_script_made_by_another_route() -> None:
    body = {"scheme": "example", "log10_p": -math.inf, "names": ["\u00e9", "\u6f22"]}
    key = SigningKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert sign_document("evidence", body, key) == base64.b64decode(FILE["vectors"][0]["data"])


@pytest.mark.parametrize("name", ["envelope.json", "license.json", "secret.json"])
def test_the_committed_vectors_are_the_ones_that_the_script_makes(name: str) -> None:
    made = runpy.run_path(str(FOLDER / "make_vectors.py"))["build"]()
    assert made[name] == (FOLDER / name).read_text()


def test_every_flipped_bit_of_a_document_is_refused() -> None:
    data = sign_document("evidence", {"a": 1}, KEY)
    assert verify_document(data, "evidence", ANCHORS) == {"a": 1}
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ArtifactError, PolicyError)):
            verify_document(bytes(changed), "evidence", ANCHORS)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_typed_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        verify_document(data, "license", ANCHORS)


@given(st.dictionaries(st.text().filter(lambda name: name != "$float"), plain, max_size=4))
def test_any_plain_body_reads_back(body: dict[str, Any]) -> None:
    assert verify_document(sign_document("evidence", body, KEY), "evidence", ANCHORS) == body


def test_nan_reads_back() -> None:
    body = verify_document(sign_document("evidence", {"a": math.nan}, KEY), "evidence", ANCHORS)
    assert math.isnan(body["a"])


def test_the_same_document_is_the_same_bytes() -> None:
    assert sign_document("evidence", {"a": 1, "b": 2}, KEY) == sign_document("evidence", {"b": 2, "a": 1}, KEY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_one_kind_is_refused_as_any_other(kind: str) -> None:
    data = sign_document(kind, {}, KEY)
    for other in set(KINDS) - {kind}:
        with pytest.raises(FormatError, match=payload_type(other).replace("+", "[+]")):
            verify_document(data, other, ANCHORS)


def test_the_signer_is_found_among_several_anchors() -> None:
    other = SigningKey.generate()
    document = open_document(sign_document("evidence", {}, KEY), "evidence", [other.verify_key, KEY.verify_key])
    assert document.signer == KEY.verify_key


def test_no_anchors_are_the_callers_mistake() -> None:
    with pytest.raises(ParameterError, match="anchors"):
        verify_document(sign_document("evidence", {}, KEY), "evidence", [])


def test_an_unknown_kind_is_the_callers_mistake() -> None:
    with pytest.raises(ParameterError, match="invoice"):
        sign_document("invoice", {}, KEY)


@pytest.mark.parametrize(
    "body",
    [{"a": {1}}, {1: "a"}, {"a": {"$float": "inf"}}, {"a": "\ud800"}, {"a": b"bytes"}],
    ids=["a set", "a number for a name", "the tag's name", "a lone surrogate", "bytes"],
)
def test_a_body_that_is_not_plain_json_is_not_signed(body: Any) -> None:
    with pytest.raises(ParameterError, match="plain JSON"):
        sign_document("evidence", body, KEY)


def test_a_body_that_is_nested_too_deep_is_not_signed() -> None:
    body: dict[str, Any] = {}
    for _ in range(2000):
        body = {"a": body}
    with pytest.raises(ParameterError, match="levels"):
        sign_document("evidence", body, KEY)


def test_a_body_at_the_deepest_level_reads_back() -> None:
    body: dict[str, Any] = {}
    for _ in range(32):
        body = {"a": body}
    assert verify_document(sign_document("evidence", body, KEY), "evidence", ANCHORS) == body


def test_a_document_that_would_be_too_large_to_read_is_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_BYTES", 1000)
    with pytest.raises(ParameterError, match="too large"):
        sign_document("evidence", {"a": "x" * 1000}, KEY)


def test_a_document_over_the_cap_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FormatError, match="too large"):
        verify_document(b" " * (envelope.MAX_BYTES + 1), "evidence", ANCHORS)
