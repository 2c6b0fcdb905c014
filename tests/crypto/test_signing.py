"""Ed25519 keys: the published vectors, what they refuse, and what they never show."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import FormatError, ParameterError, TamperedError, UnsupportedError
from sealmark.crypto.signing import SigningKey, VerifyKey

# RFC 8032, section 7.1: secret key, public key, message, signature
RFC_8032 = {
    "TEST 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    "TEST 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
}
KEY = SigningKey(bytes(range(32)))


@pytest.mark.parametrize("name", RFC_8032)
def test_signs_as_rfc_8032_publishes(name: str) -> None:
    secret, public, message, signature = (bytes.fromhex(part) for part in RFC_8032[name])
    key = SigningKey(secret)
    assert key.verify_key.raw == public
    assert key.sign(message) == signature


def test_a_signature_verifies_under_its_own_key() -> None:
    KEY.verify_key.verify(KEY.sign(b"mine"), b"mine")


def test_a_signature_does_not_verify_under_another_key() -> None:
    with pytest.raises(TamperedError):
        SigningKey.generate().verify_key.verify(KEY.sign(b"mine"), b"mine")


@given(st.integers(0, 8 * 64 - 1))
def test_a_flipped_bit_of_a_signature_is_refused(bit: int) -> None:
    signature = bytearray(KEY.sign(b"mine"))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TamperedError):
        KEY.verify_key.verify(bytes(signature), b"mine")


def test_a_changed_message_is_refused() -> None:
    with pytest.raises(TamperedError):
        KEY.verify_key.verify(KEY.sign(b"mine"), b"Mine")


def test_a_signature_of_another_length_is_refused() -> None:
    with pytest.raises(TamperedError):
        KEY.verify_key.verify(KEY.sign(b"mine")[:-1], b"mine")


def test_two_generated_keys_differ() -> None:
    assert SigningKey.generate() != SigningKey.generate()


def test_the_text_of_a_verify_key_reads_back() -> None:
    assert VerifyKey.parse(f" {KEY.verify_key}\n") == KEY.verify_key


def test_the_text_of_a_signing_key_reads_back() -> None:
    assert SigningKey.parse(KEY.reveal()).sign(b"mine") == KEY.sign(b"mine")


@pytest.mark.parametrize("place", range(19, 67))
def test_a_mistyped_verify_key_is_refused(place: int) -> None:
    text = str(KEY.verify_key)
    with pytest.raises(FormatError, match="checksum"):
        VerifyKey.parse(text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :])


def test_a_signing_key_is_not_taken_for_a_verify_key() -> None:
    with pytest.raises(FormatError):
        VerifyKey.parse(KEY.reveal())


def test_a_bad_text_of_a_signing_key_is_not_repeated() -> None:
    text = KEY.reveal()[:-1]
    with pytest.raises(FormatError) as caught:
        SigningKey.parse(text)
    assert text[20:] not in str(caught.value)


@pytest.mark.parametrize("kind", [SigningKey, VerifyKey])
def test_a_key_of_another_size_is_refused(kind: type[SigningKey | VerifyKey]) -> None:
    with pytest.raises(ParameterError, match="32 bytes"):
        kind(bytes(31))


def test_the_key_id_is_a_hash_of_the_public_key() -> None:
    assert SigningKey(bytes.fromhex(RFC_8032["TEST 1"][0])).kid == "21fe31dfa154a261626bf854046fd227"


def test_a_signing_key_shows_its_key_id_alone() -> None:
    assert repr(KEY) == str(KEY) == f"SigningKey(kid={KEY.kid})"


def test_a_signing_key_cannot_be_pickled() -> None:
    with pytest.raises(UnsupportedError):
        pickle.dumps(KEY)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_signing_key_is_handed_on_by_reference(duplicate: object) -> None:
    assert callable(duplicate)
    assert duplicate(KEY) is KEY


def test_keys_are_equal_and_hash_alike_when_their_public_halves_are() -> None:
    assert {KEY, SigningKey(bytes(range(32)))} == {KEY}
    assert {KEY.verify_key, VerifyKey(KEY.verify_key.raw)} == {KEY.verify_key}
    assert KEY.verify_key != KEY
