"""Sealed files: opened by the right people, refused in every other way, never half written."""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path

import pytest

from sealmark.core.errors import (
    FormatError,
    ModelMismatchError,
    ParameterError,
    TamperedError,
    WrongKeyError,
)
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.segments import HEADER, SEGMENT, TAG
from sealmark.crypto.streaming import decrypt_bytes
from sealmark.crypto.wrapping import key_id, wrap
from sealmark.formats.sealed import open_sealed, rewrap, seal_bytes, seal_file

KEY = bytes(range(32))
OWNER, USER, STRANGER = (Identity(bytes(31) + bytes([i])) for i in (1, 2, 3))
WORDS = Passphrase("correct horse", cost=Cost(iterations=1, memory_kib=64, lanes=1))
SIZES = [0, 1, SEGMENT - TAG - HEADER, SEGMENT - TAG - HEADER + 1, 3_000_000]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(secrets.token_bytes(3_000_000))
    return path


@pytest.fixture
def sealed(plain: Path) -> Path:
    path = plain.with_name("model.sealed")
    seal_file(plain, path, KEY, model="m", wraps=[OWNER.recipient, WORDS])
    return path


def small(**changes: object) -> bytes:
    return seal_bytes(b"layer", KEY, **{"model": "m", **changes})


def read(data: bytes, opener: bytes | Identity | Passphrase = KEY) -> bytes:
    return bytes(open_sealed(data).read_all(opener))


def folder(path: Path) -> list[str]:
    return sorted(item.name for item in path.parent.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_every_opener_gets_the_plaintext_back(tmp_path: Path, size):
    data = secrets.token_bytes(size)
    (tmp_path / "plain").write_bytes(data)
    seal_file(tmp_path / "plain", tmp_path / "s", KEY, model="m", wraps=[OWNER.recipient, WORDS])
    with open_sealed(tmp_path / "s") as file:
        assert all(file.read_all(opener) == data for opener in (KEY, OWNER, WORDS))
        assert file.reader(OWNER).read() == data
        file.decrypt_to(OWNER, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
def test_sealed_bytes_are_a_sealed_file(tmp_path: Path, size):
    data = secrets.token_bytes(size)
    (tmp_path / "s").write_bytes(seal_bytes(data, KEY, model="m", wraps=[OWNER.recipient]))
    with open_sealed(tmp_path / "s", model="m") as file:
        assert file.read_all(OWNER) == data
    assert read((tmp_path / "s").read_bytes(), OWNER) == data


def test_the_tail_is_a_plain_tink_ciphertext(plain: Path, sealed: Path):
    # tests/crypto/test_streaming.py shows that such a ciphertext is Tink's; here: that it is all there is
    with open_sealed(sealed) as file:
        tail, aad = sealed.read_bytes()[file.start :], file.header.context()
    assert decrypt_bytes(KEY, tail, aad=aad) == plain.read_bytes()
    assert json.loads(aad) == {
        "format": "sealmark.sealed.v1", "kind": "model", "model": "m", "role": "weights", "body": "bytes",
        "key_id": key_id(KEY),
    }  # fmt: skip


def test_the_plaintext_is_nowhere_in_the_file(plain: Path, sealed: Path):
    assert plain.read_bytes()[1000:1016] not in sealed.read_bytes()
    assert KEY not in sealed.read_bytes()
    assert KEY.hex().encode() not in sealed.read_bytes()


def test_what_is_read_is_writable_memory(sealed: Path):
    import numpy as np

    with open_sealed(sealed) as file:
        array = np.frombuffer(file.read_all(KEY), np.uint8)
    array[0] ^= 1
    assert array.size == 3_000_000


def test_a_reader_decrypts_a_piece(plain: Path, sealed: Path):
    with open_sealed(sealed) as file:
        assert file.reader(WORDS).read_at(1_500_000, 99) == plain.read_bytes()[1_500_000:1_500_099]


def test_a_reader_of_a_closed_file_says_so(sealed: Path):
    with open_sealed(sealed) as file:
        reader = file.reader(KEY)
    with pytest.raises(ParameterError, match="closed"):
        reader.read_at(0, 1)


def test_progress_is_told(plain: Path, sealed: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    note = lambda done, total: seen.append((done, total))  # noqa: E731
    seal_file(plain, tmp_path / "s", KEY, model="m", progress=note)
    with open_sealed(tmp_path / "s") as file:
        file.read_all(KEY, progress=note)
        file.decrypt_to(KEY, tmp_path / "out", progress=note)
    assert seen.count((3_000_000, 3_000_000)) == 3
    assert len(seen) == 9


def test_a_file_renamed_over_another_models_is_refused(sealed: Path):
    with pytest.raises(ModelMismatchError, match="another model: expected n, found m"):
        open_sealed(sealed, model="n")
    with open_sealed(sealed, model="m", role="weights", kind="model") as file:
        assert file.header.model == "m"


def test_another_role_is_a_mismatch_and_another_kind_is_a_wrong_format(sealed: Path):
    with pytest.raises(ModelMismatchError, match="another role"):
        open_sealed(sealed, role="tokenizer")
    with pytest.raises(FormatError, match="another kind"):
        open_sealed(sealed, kind="secret")


def test_a_wrong_key_is_told_from_damage():
    with pytest.raises(WrongKeyError, match="the id"):
        read(small(), bytes(32))
    with pytest.raises(ParameterError, match="32 bytes"):
        read(small(), b"short")
    damaged = bytearray(small())
    damaged[-1] ^= 1
    with pytest.raises(TamperedError):
        read(bytes(damaged))


def test_strangers_are_refused(sealed: Path):
    with open_sealed(sealed) as file:
        for opener in (STRANGER, Passphrase("correct horsf")):
            with pytest.raises(WrongKeyError):
                file.read_all(opener)


def test_errors_hold_no_secret():
    for opener in (bytes(range(1, 33)), STRANGER, Passphrase("tell nobody")):
        with pytest.raises(WrongKeyError) as caught:
            read(small(), opener)
        shown = str(caught.value)
        assert STRANGER.reveal()[21:] not in shown
        assert "tell nobody" not in shown
        assert bytes(range(1, 33)).hex() not in shown


def test_a_stanza_from_another_file_does_not_open():
    key_elsewhere = open_sealed(small(model="other", wraps=[OWNER.recipient])).header.wraps
    data = small()
    header = dataclasses.replace(open_sealed(data).header, wraps=key_elsewhere)
    with pytest.raises(TamperedError):
        read(header.pack() + data[open_sealed(data).start :], OWNER)


def test_a_stanza_that_holds_another_key_is_refused_before_anything_is_decrypted():
    header = open_sealed(small()).header
    forged = wrap(bytes(32), OWNER.recipient, context=header.context())
    data = dataclasses.replace(header, wraps=(forged,)).pack() + small()[open_sealed(small()).start :]
    with pytest.raises(TamperedError, match="holds another key"):
        open_sealed(data).unwrap(OWNER)


def test_two_files_of_one_key_do_not_exchange_their_ciphertexts():
    first, second = small(), small(role="tokenizer")
    head = first[: open_sealed(first).start]
    with pytest.raises(TamperedError):
        read(head + second[open_sealed(second).start :])


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ParameterError, match="32 bytes"):
        seal_bytes(b"layer", bytes(16), model="m")


def test_rewrapping_changes_who_may_open_and_nothing_else(plain: Path, sealed: Path):
    with open_sealed(sealed) as old:
        tail = sealed.read_bytes()[old.start :]
        dropped = [stanza for stanza in old.header.wraps if stanza.to_json().get("to") == str(OWNER.recipient)]
    header = rewrap(sealed, OWNER, add=[USER.recipient], remove=dropped)
    with open_sealed(sealed) as new:
        assert new.header == header
        assert sealed.read_bytes()[new.start :] == tail
        assert new.read_all(USER) == new.read_all(WORDS) == plain.read_bytes()
        with pytest.raises(WrongKeyError):
            new.unwrap(OWNER)


def test_rewrapping_to_another_file_keeps_the_first(sealed: Path, tmp_path: Path):
    before = sealed.read_bytes()
    rewrap(sealed, KEY, add=[USER.recipient], target=tmp_path / "copy")
    assert sealed.read_bytes() == before
    with open_sealed(tmp_path / "copy") as copy, open_sealed(sealed) as first:
        assert copy.unwrap(USER) == KEY
        assert copy.header.context() == first.header.context()


def test_a_stranger_cannot_rewrap(sealed: Path):
    before = sealed.read_bytes()
    with pytest.raises(WrongKeyError):
        rewrap(sealed, STRANGER, add=[STRANGER.recipient])
    assert sealed.read_bytes() == before


def test_a_forged_header_cannot_be_rewrapped_even_with_the_key(sealed: Path, tmp_path: Path):
    data = sealed.read_bytes()
    (tmp_path / "forged").write_bytes(data.replace(b'"model":"m"', b'"model":"n"', 1))
    with pytest.raises(TamperedError):
        rewrap(tmp_path / "forged", KEY, add=[USER.recipient])


def test_a_stanza_that_is_not_there_cannot_be_removed(sealed: Path):
    with pytest.raises(ParameterError, match="cannot remove"):
        rewrap(sealed, KEY, remove=[wrap(KEY, USER.recipient, context=b"")])
