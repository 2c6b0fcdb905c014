"""Wrapped keys: for a recipient (against RFC 9180) and under a passphrase."""

from __future__ import annotations

import copy
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import (
    FormatError,
    ParameterError,
    TamperedError,
    UnsupportedError,
    WrongKeyError,
)
from sealmark.crypto.recipients import Cost, Identity, Passphrase, Recipient
from sealmark.crypto.wrapping import (
    PassphraseStanza,
    RecipientStanza,
    key_id,
    stanza_from_json,
    unwrap,
    wrap,
)

KEY = bytes(range(32))
CHEAP = Cost(iterations=1, memory_kib=64, lanes=1)
OWNER = Identity(bytes(31) + b"\1")
OTHER = Identity(bytes(31) + b"\2")
WORDS = Passphrase("correct horse", cost=CHEAP)

# RFC 9180's published test vectors: mode base, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, first message
VECTOR = {
    "info": "4f6465206f6e2061204772656369616e2055726e",
    "sk_r": "497b4502664cfea5d5af0b39934dac72242a74f8480451e1aee7d6a53320333d",
    "pk_r": "430f4b9859665145a6b1ba274024487bd66f03a2dd577d7753c68d7d7d00c00c",
    "enc": "6c93e09869df3402d7bf231bf540fadd35cd56be14f97178f0954db94b7fc256",
    "key": "f50b0609186798729ed0564b36ef2ef8044f1f9d05636874d1f46c819c7a669f",
    "nonce": "151d9929e2449747889bc923",
    "aad": "436f756e742d30",
    "ct": "e5d84cd531cfb583096e7cfa9641bd3079cf3a91cda813c52deb5f512be9931980a41de125a925cdad859d5b7a",
    "pt": "4265617574792069732074727574682c20747275746820626561757479",
}


class Rfc9180:
    """HPKE base mode read off RFC 9180, sections 4 and 5, on nothing but X25519, HKDF and AES-256-GCM."""

    KEM = b"KEM\x00\x20"
    HPKE = b"HPKE\x00\x20\x00\x01\x00\x02"

    @staticmethod
    def extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
        return HKDF.extract(SHA256(), salt or bytes(32), b"HPKE-v1" + suite + label + material)

    @staticmethod
    def expand(suite: bytes, secret: bytes, label: bytes, info: bytes, length: int) -> bytes:
        labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
        return HKDFExpand(SHA256(), length, labeled).derive(secret)

    @classmethod
    def schedule(cls, shared: bytes, enc: bytes, public: bytes, info: bytes) -> tuple[bytes, bytes]:
        secret = cls.extract(cls.KEM, b"", b"eae_prk", shared)
        secret = cls.expand(cls.KEM, secret, b"shared_secret", enc + public, 32)
        context = b"\0" + cls.extract(cls.HPKE, b"", b"psk_id_hash", b"")
        context += cls.extract(cls.HPKE, b"", b"info_hash", info)
        secret = cls.extract(cls.HPKE, secret, b"secret", b"")
        key = cls.expand(cls.HPKE, secret, b"key", context, 32)
        return key, cls.expand(cls.HPKE, secret, b"base_nonce", context, 12)

    @classmethod
    def receive(cls, private: bytes, enc: bytes, info: bytes) -> tuple[bytes, bytes]:
        key = X25519PrivateKey.from_private_bytes(private)
        shared = key.exchange(X25519PublicKey.from_public_bytes(enc))
        return cls.schedule(shared, enc, key.public_key().public_bytes_raw(), info)

    @classmethod
    def send(cls, public: bytes, info: bytes, plaintext: bytes) -> bytes:
        ephemeral = X25519PrivateKey.generate()
        enc = ephemeral.public_key().public_bytes_raw()
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
        key, nonce = cls.schedule(shared, enc, public, info)
        return enc + AESGCM(key).encrypt(nonce, plaintext, b"")


def test_the_oracle_agrees_with_the_published_vector():
    v = {name: bytes.fromhex(text) for name, text in VECTOR.items()}
    assert Rfc9180.receive(v["sk_r"], v["enc"], v["info"]) == (v["key"], v["nonce"])
    assert AESGCM(v["key"]).encrypt(v["nonce"], v["pt"], v["aad"]) == v["ct"]
    assert Identity(v["sk_r"]).recipient.public == v["pk_r"]


def test_the_oracle_opens_our_stanza():
    stanza = wrap(KEY, Recipient(bytes.fromhex(VECTOR["pk_r"])), context=b"model")
    enc, sealed = stanza.wrapped[:32], stanza.wrapped[32:]
    key, nonce = Rfc9180.receive(bytes.fromhex(VECTOR["sk_r"]), enc, b"sealmark/wrap/v1\0model")
    assert AESGCM(key).decrypt(nonce, sealed, b"") == KEY


def test_we_open_the_oracles_stanza():
    wrapped = Rfc9180.send(OWNER.recipient.public, b"sealmark/wrap/v1\0model", KEY)
    assert unwrap([RecipientStanza(OWNER.recipient, wrapped)], OWNER, context=b"model") == KEY


def test_the_passphrase_stanza_is_argon2id_and_aes_gcm_as_written():
    stanza = wrap(KEY, WORDS, context=b"model")
    derived = Argon2id(salt=stanza.salt, length=32, iterations=1, lanes=1, memory_cost=64)
    cipher = AESGCM(derived.derive(b"correct horse"))
    assert cipher.decrypt(bytes(12), stanza.wrapped, b"sealmark/wrap/v1\0model") == KEY


def test_the_default_cost_is_the_second_recommendation_of_rfc_9106():
    assert Passphrase("x").cost == Cost(iterations=3, memory_kib=64 * 1024, lanes=4)
    default = Passphrase("correct horse")
    assert unwrap([wrap(KEY, default, context=b"")], default, context=b"") == KEY


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=99))
def test_every_key_comes_back_to_both_openers(key, context):
    stanzas = [wrap(key, OWNER.recipient, context=context), wrap(key, WORDS, context=context)]
    assert unwrap(stanzas, OWNER, context=context) == key
    assert unwrap(stanzas, WORDS, context=context) == key


def test_each_opener_finds_its_own_stanza_among_many():
    more = Passphrase("battery staple", cost=CHEAP)
    stanzas = [wrap(KEY, to, context=b"m") for to in (WORDS, OTHER.recipient, more, OWNER.recipient)]
    assert all(unwrap(stanzas, opener, context=b"m") == KEY for opener in (WORDS, OTHER, more, OWNER))


def test_another_identity_is_a_wrong_key():
    with pytest.raises(WrongKeyError, match="not sealed for this identity"):
        unwrap([wrap(KEY, OWNER.recipient, context=b"")], OTHER, context=b"")


def test_another_passphrase_is_a_wrong_key():
    with pytest.raises(WrongKeyError, match="opens nothing"):
        unwrap([wrap(KEY, WORDS, context=b"")], Passphrase("correct horsf"), context=b"")


@pytest.mark.parametrize("opener", [OWNER, WORDS])
def test_without_any_stanza_nothing_opens(opener):
    with pytest.raises(WrongKeyError):
        unwrap([], opener, context=b"")


def test_a_passphrase_does_not_open_a_recipients_stanza_and_the_reverse():
    with pytest.raises(WrongKeyError):
        unwrap([wrap(KEY, OWNER.recipient, context=b"")], WORDS, context=b"")
    with pytest.raises(WrongKeyError):
        unwrap([wrap(KEY, WORDS, context=b"")], OWNER, context=b"")


def test_a_recipients_stanza_of_another_context_is_tampering():
    with pytest.raises(TamperedError, match="does not open"):
        unwrap([wrap(KEY, OWNER.recipient, context=b"a")], OWNER, context=b"b")


def test_a_passphrase_in_another_context_opens_nothing():
    with pytest.raises(WrongKeyError):
        unwrap([wrap(KEY, WORDS, context=b"a")], WORDS, context=b"b")


@pytest.mark.parametrize("index", range(80))
def test_a_changed_byte_of_a_recipients_stanza_is_tampering(index):
    stanza = wrap(KEY, OWNER.recipient, context=b"")
    changed = bytearray(stanza.wrapped)
    changed[index] ^= 1
    with pytest.raises(TamperedError):
        unwrap([RecipientStanza(OWNER.recipient, bytes(changed))], OWNER, context=b"")


def test_a_stanza_with_an_encapsulated_key_of_low_order_is_refused():
    with pytest.raises(TamperedError):
        unwrap([RecipientStanza(OWNER.recipient, bytes(80))], OWNER, context=b"")


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31), bytes(31)])
def test_a_public_key_that_is_none_is_refused(public):
    with pytest.raises(ParameterError, match="cannot seal for this recipient"):
        wrap(KEY, Recipient(public), context=b"")


@pytest.mark.parametrize("to", [OWNER.recipient, WORDS])
def test_a_key_of_another_length_is_refused(to):
    with pytest.raises(ParameterError, match="expected 32 bytes, found 16 bytes"):
        wrap(bytes(16), to, context=b"")
    with pytest.raises(ParameterError):
        key_id(bytes(16))


def test_two_stanzas_of_one_key_have_nothing_in_common():
    for to in (OWNER.recipient, WORDS):
        first, second = wrap(KEY, to, context=b""), wrap(KEY, to, context=b"")
        assert first.wrapped[:32] != second.wrapped[:32]
        assert first.wrapped[-48:] != second.wrapped[-48:]


def test_key_ids_tell_keys_apart_and_do_not_show_them():
    assert key_id(KEY) != key_id(bytes(32))
    assert KEY.hex() not in key_id(KEY)


def test_texts_of_recipients_and_identities_read_back():
    assert Recipient.parse(f" {OWNER.recipient}\n") == OWNER.recipient
    assert Identity.parse(OWNER.reveal()).recipient == OWNER.recipient
    assert str(OWNER.recipient).startswith("sealmark-recipient-v1:")
    assert OWNER.reveal().startswith("sealmark-identity-v1:")
    assert Recipient.parse(str(OWNER.recipient)) != OTHER.recipient


def test_a_mistyped_recipient_is_refused():
    text = str(OWNER.recipient)
    for index in range(22, len(text)):
        wrong = text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]
        with pytest.raises(FormatError, match="wrong checksum"):
            Recipient.parse(wrong)


@pytest.mark.parametrize("text", ["", "sealmark-recipient-v1:", "age1xyz", "x" * 70])
def test_another_text_is_no_recipient(text):
    with pytest.raises(FormatError, match="expected sealmark-recipient-v1"):
        Recipient.parse(text)


def test_an_identity_where_a_recipient_belongs_is_refused_and_not_repeated():
    with pytest.raises(FormatError) as caught:
        Recipient.parse(OWNER.reveal())
    assert OWNER.reveal()[25:40] not in str(caught.value)


@pytest.mark.parametrize("handle", [OWNER, WORDS])
def test_handles_neither_print_nor_pickle_nor_multiply(handle):
    secret = OWNER.reveal()[21:] if handle is OWNER else "correct horse"
    assert secret not in repr(handle) + str(handle)
    assert copy.copy(handle) is copy.deepcopy(handle) is handle
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(handle)


def test_stanzas_do_not_print_what_they_hold():
    stanza = wrap(KEY, WORDS, context=b"")
    assert repr(stanza) == "PassphraseStanza(cost=Cost(iterations=1, memory_kib=64, lanes=1))"


def test_identities_are_drawn_fresh_and_whole():
    assert Identity.generate().recipient != Identity.generate().recipient
    with pytest.raises(ParameterError, match="expected 32 bytes"):
        Identity(bytes(31))


def test_an_empty_passphrase_is_refused():
    with pytest.raises(ParameterError, match="empty"):
        Passphrase("")


@pytest.mark.parametrize("text", [str(OWNER.recipient), " " + OWNER.reveal()])
def test_a_key_given_as_a_passphrase_is_refused(text):
    with pytest.raises(ParameterError, match="not a passphrase") as caught:
        Passphrase(text)
    assert text[25:40] not in str(caught.value)


def test_one_passphrase_typed_on_two_keyboards_is_one():
    composed, decomposed = Passphrase("caf\u00e9", cost=CHEAP), Passphrase("cafe\u0301", cost=CHEAP)
    assert unwrap([wrap(KEY, composed, context=b"")], decomposed, context=b"") == KEY


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"iterations": 11},
        {"lanes": 0},
        {"lanes": 17},
        {"memory_kib": 31},
        {"memory_kib": 1 << 30},
        {"memory_kib": 127, "lanes": 16},
    ],
)
def test_a_cost_out_of_range_is_refused(wrong):
    with pytest.raises(ParameterError, match=f"bad {next(iter(wrong))}"):
        Cost(**wrong)


@pytest.mark.parametrize("to", [OWNER.recipient, WORDS])
def test_stanzas_read_back_from_json(to):
    stanza = wrap(KEY, to, context=b"")
    assert stanza_from_json(stanza.to_json()) == stanza


def passphrase_json(**changes: object) -> dict[str, object]:
    return {**PassphraseStanza(bytes(16), CHEAP, bytes(48)).to_json(), **changes}


def recipient_json(**changes: object) -> dict[str, object]:
    return {**RecipientStanza(OWNER.recipient, bytes(80)).to_json(), **changes}


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "x",
        [],
        {},
        {"type": "rot13"},
        {"type": ["argon2id"]},
        passphrase_json(memory_kib=1 << 30),
        passphrase_json(iterations=10**9),
        passphrase_json(lanes=True),
        passphrase_json(iterations=1.0),
        passphrase_json(iterations="1"),
        passphrase_json(more=1),
        passphrase_json(salt=""),
        passphrase_json(salt="AA" * 16),
        passphrase_json(wrapped="00" * 47),
        passphrase_json(salt=None),
        recipient_json(wrapped="00" * 79),
        recipient_json(to="nobody"),
        recipient_json(to=None),
        recipient_json(salt="00"),
        {name: value for name, value in recipient_json().items() if name != "to"},
        {name: value for name, value in passphrase_json().items() if name != "lanes"},
    ],
)
def test_anything_else_is_no_stanza(value):
    with pytest.raises(FormatError):
        stanza_from_json(value)
