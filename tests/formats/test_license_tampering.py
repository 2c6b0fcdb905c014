"""A license under attack: every bit, every field, every cut is refused with a typed error."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError, SealmarkError, TamperedError, UntrustedError
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import SigningKey
from sealmark.formats.license import License, Rights, sign_license, verify_license
from sealmark.formats.license_keys import add_keys

KEY, STRANGER = SigningKey(bytes(32)), SigningKey(bytes(range(32)))
ANCHORS = [KEY.verify_key]
END = datetime(2031, 12, 31, tzinfo=UTC)
PERSON = Identity(bytes(range(32)))
LICENSE = add_keys(License("7", "ada", "ab" * 32, rights=Rights(not_after=END)), PERSON.recipient)
DATA = sign_license(LICENSE, KEY)
ENVELOPE = json.loads(DATA)
PAYLOAD = json.loads(base64.b64decode(ENVELOPE["payload"]))


def refusal(data: bytes) -> str:
    """The code with which a document is refused; anything but a typed error is a crash of this test."""
    try:
        verify_license(data, ANCHORS)
    except SealmarkError as error:
        return error.code
    return "OK"


def enveloped(payload: Any, **changes: Any) -> bytes:
    """The old signature over another payload."""
    return canonical_json(ENVELOPE | {"payload": base64.b64encode(canonical_json(payload)).decode()} | changes)


def test_the_license_of_these_tests_is_one_where_nothing_is_changed() -> None:
    assert refusal(DATA) == refusal(enveloped(PAYLOAD)) == "OK"
    assert len(DATA) < 2000


def test_every_flipped_bit_is_found() -> None:
    found = set()
    for place in range(len(DATA)):
        for bit in range(8):
            changed = bytearray(DATA)
            changed[place] ^= 1 << bit
            found.add(refusal(bytes(changed)))
    assert found == {"BAD_FORMAT", "TAMPERED", "UNTRUSTED"}


def test_every_cut_is_found() -> None:
    assert {refusal(DATA[:length]) for length in range(len(DATA))} == {"BAD_FORMAT"}


@pytest.mark.parametrize("name", sorted(PAYLOAD["body"]))
@pytest.mark.parametrize("value", [None, 7, "x", [], {}, True], ids=repr)
def test_no_field_takes_another_value_under_the_old_signature(name: str, value: object) -> None:
    if PAYLOAD["body"][name] != value:
        changed = PAYLOAD | {"body": PAYLOAD["body"] | {name: value}}
        assert refusal(enveloped(changed)) == "TAMPERED"


@pytest.mark.parametrize("name", sorted(PAYLOAD["body"]["rights"]))
def test_no_right_takes_another_value_under_the_old_signature(name: str) -> None:
    rights = PAYLOAD["body"]["rights"] | {name: "2099-01-01T00:00:00Z"}
    assert refusal(enveloped(PAYLOAD | {"body": PAYLOAD["body"] | {"rights": rights}})) == "TAMPERED"


@pytest.mark.parametrize("name", sorted(PAYLOAD["body"]))
def test_no_field_can_be_left_out(name: str) -> None:
    body = {key: value for key, value in PAYLOAD["body"].items() if key != name}
    assert refusal(enveloped(PAYLOAD | {"body": body})) == "TAMPERED"


def test_no_field_can_be_added() -> None:
    assert refusal(enveloped(PAYLOAD | {"body": PAYLOAD["body"] | {"admin": True}})) == "TAMPERED"
    assert refusal(enveloped(PAYLOAD | {"admin": True})) == "TAMPERED"
    assert refusal(enveloped(PAYLOAD, admin=True)) == "BAD_FORMAT"


@pytest.mark.parametrize("algorithm", ["none", "HS256", "ed25519", "", None])
def test_no_other_algorithm_can_be_named(algorithm: str | None) -> None:
    assert refusal(enveloped(PAYLOAD | {"alg": algorithm})) == "TAMPERED"
    assert refusal(enveloped(PAYLOAD, alg=algorithm)) == "BAD_FORMAT"


def test_the_key_that_comes_along_is_not_believed() -> None:
    forged = sign_license(LICENSE, STRANGER)
    with pytest.raises(UntrustedError):
        verify_license(forged, ANCHORS)
    renamed = forged.replace(STRANGER.kid.encode(), KEY.kid.encode())
    with pytest.raises(TamperedError):
        verify_license(renamed, ANCHORS)


def test_the_wrapped_key_of_another_license_does_not_fit() -> None:
    second = add_keys(replace(LICENSE, id="8"), PERSON.recipient)
    other = json.loads(base64.b64decode(json.loads(sign_license(second, KEY))["payload"]))
    for name in ("wrap", "keys", "id"):
        body = PAYLOAD["body"] | {name: other["body"][name]}
        assert refusal(enveloped(PAYLOAD | {"body": body})) == "TAMPERED"


def test_the_signature_of_another_license_does_not_fit() -> None:
    other = json.loads(sign_license(replace(LICENSE, rights=Rights()), KEY))
    assert refusal(canonical_json(ENVELOPE | {"signatures": other["signatures"]})) == "TAMPERED"


def test_another_document_of_the_owner_is_no_license() -> None:
    with pytest.raises(FormatError, match="another kind"):
        verify_license(DATA.replace(b".license.", b".evidence."), ANCHORS)


@given(st.binary(max_size=200))
def test_no_other_bytes_are_a_license(data: bytes) -> None:
    assert refusal(data) == "BAD_FORMAT"


@given(st.integers(0, len(DATA)), st.binary(min_size=1, max_size=20))
def test_nothing_can_be_put_in(place: int, more: bytes) -> None:
    assert refusal(DATA[:place] + more + DATA[place:]) in {"BAD_FORMAT", "TAMPERED", "UNTRUSTED"}
