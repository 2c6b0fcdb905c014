"""The keys in a license: for its user alone, and in that license alone."""

from dataclasses import replace

import pytest
import torch

from sealmark.core.errors import FormatError, ParameterError, TamperedError, WrongKeyError
from sealmark.core.secret import Secret, tensor_digest
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.records import RecordCipher
from sealmark.crypto.wrapping import wrap
from sealmark.formats.license import License
from sealmark.formats.license_keys import add_keys, open_keys

PERSON = Identity(bytes(range(32)))
DATA_KEY = bytes(range(32, 64))
LICENSE = License("7", "ada", model="ab" * 32)
ORDER = torch.arange(6)
LOCK_KEY = Secret(bytes(32), {"scheme": "example", "tensors": {"order": tensor_digest(ORDER)}}, {"order": ORDER})


def test_both_keys_come_back() -> None:
    data_key, key = open_keys(add_keys(LICENSE, PERSON.recipient, data_key=DATA_KEY, key=LOCK_KEY), PERSON)
    assert (data_key, key) == (DATA_KEY, LOCK_KEY)
    assert key is not None
    assert torch.equal(key.tensors["order"], ORDER)


def test_a_passphrase_opens_them_too() -> None:
    cheap = Cost(iterations=1, memory_kib=8, lanes=1)
    made = add_keys(LICENSE, Passphrase("open sesame", cost=cheap), data_key=DATA_KEY)
    assert open_keys(made, Passphrase("open sesame")) == (DATA_KEY, None)
    with pytest.raises(WrongKeyError):
        open_keys(made, Passphrase("open says me"))


def test_another_identity_opens_nothing() -> None:
    with pytest.raises(WrongKeyError):
        open_keys(add_keys(LICENSE, PERSON.recipient), Identity.generate())


def test_a_license_without_a_data_key_gets_a_fresh_one() -> None:
    found = [open_keys(add_keys(LICENSE, PERSON.recipient), PERSON)[0] for _ in range(2)]
    assert len(set(found)) == 2


def test_no_key_lies_open_in_the_license() -> None:
    made = add_keys(LICENSE, PERSON.recipient, data_key=DATA_KEY, key=LOCK_KEY)
    for hidden in (DATA_KEY, LOCK_KEY.reveal_seed().hex().encode()):
        assert hidden not in made.keys
        assert hidden.hex() not in str(made.wrap)


def test_who_knows_the_data_key_that_all_share_cannot_read_the_lock_key_of_another() -> None:
    better = add_keys(LICENSE, Identity.generate().recipient, data_key=DATA_KEY, key=LOCK_KEY)
    with pytest.raises(TamperedError):
        RecordCipher(DATA_KEY).open(better.keys, place=better.context())


@pytest.mark.parametrize("field", ["id", "user", "model"])
def test_the_keys_are_those_of_one_license_one_user_and_one_model(field: str) -> None:
    moved = replace(add_keys(LICENSE, PERSON.recipient), **{field: "other"})
    with pytest.raises(TamperedError):
        open_keys(moved, PERSON)


def test_the_keys_of_another_license_of_the_same_user_do_not_open() -> None:
    mine, other = (add_keys(LICENSE, PERSON.recipient) for _ in range(2))
    with pytest.raises(TamperedError):
        open_keys(replace(mine, wrap=other.wrap), PERSON)


def test_every_changed_byte_of_the_keys_is_found() -> None:
    made = add_keys(LICENSE, PERSON.recipient)
    for place in range(len(made.keys)):
        changed = bytearray(made.keys)
        changed[place] ^= 1
        with pytest.raises(TamperedError):
            open_keys(replace(made, keys=bytes(changed)), PERSON)


def test_keys_of_the_wrong_size_are_not_wrapped() -> None:
    with pytest.raises(ParameterError):
        add_keys(LICENSE, PERSON.recipient, data_key=bytes(31))


def test_an_owner_who_signs_nonsense_is_found_out() -> None:
    def made(content: bytes) -> License:
        context = LICENSE.context()
        stanza = wrap(bytes(32), PERSON.recipient, context=context).to_json()
        return replace(LICENSE, wrap=stanza, keys=RecordCipher(bytes(32)).seal(content, place=context))

    assert open_keys(made(DATA_KEY), PERSON) == (DATA_KEY, None)
    with pytest.raises(TamperedError, match="whole key"):
        open_keys(made(DATA_KEY[:-1]), PERSON)
    with pytest.raises(FormatError):
        open_keys(made(DATA_KEY + b"no secret"), PERSON)
    with pytest.raises(FormatError):
        open_keys(replace(made(DATA_KEY), wrap={"type": "rot13"}), PERSON)
