"""Sealed files: opened by the right people, refused in every other way, never half written."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import secrets
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import (
    FormatError,
    ModelMismatchError,
    ParameterError,
    SealmarkError,
    ServiceError,
    TamperedError,
    WrongKeyError,
)
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.segments import HEADER, SEGMENT, TAG
from sealmark.crypto.streaming import decrypt_bytes
from sealmark.crypto.wrapping import key_id, wrap
from sealmark.formats.sealed import Body, SealedHeader, open_sealed, rewrap, seal_bytes, seal_file
from sealmark.formats.sealed_header import MAX_HEADER, PREFIX, sniff_body, unpack_prefix

KEY = bytes(range(32))
OWNER, USER, STRANGER = (Identity(bytes(31) + bytes([i])) for i in (1, 2, 3))
WORDS = Passphrase("correct horse", cost=Cost(iterations=1, memory_kib=64, lanes=1))
SIZES = [0, 1, SEGMENT - TAG - HEADER, SEGMENT - TAG - HEADER + 1, 3_000_000]
VECTORS = json.loads((Path(__file__).parent.parent / "vectors/sealed/vectors.json").read_text())


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


def test_a_truncated_file_says_how_long_it_should_be(sealed: Path):
    whole = sealed.stat().st_size
    os.truncate(sealed, whole - 1)
    with pytest.raises(FormatError, match=f"truncated: expected {whole} bytes, found {whole - 1}"):
        open_sealed(sealed)


def test_a_file_with_bytes_added_is_refused(sealed: Path):
    with sealed.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="too long"):
        open_sealed(sealed)


@pytest.mark.parametrize("name", ["a.safetensors", "license.json", "a.npz"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, name):
    (tmp_path / name).write_bytes(b'{"payload": "eyJ9", "payloadType": "application/vnd.sealmark.license"}')
    with pytest.raises(FormatError, match="not a sealed file"):
        open_sealed(tmp_path / name)


def test_a_later_version_is_named():
    with pytest.raises(FormatError, match=r"expected 1, found 2\. Use a later sealmark"):
        unpack_prefix(PREFIX.pack(b"SEALED\0", 2, 5))


def test_a_header_over_64_kib_is_refused_before_it_is_read():
    assert unpack_prefix(PREFIX.pack(b"SEALED\0", 1, MAX_HEADER)) == MAX_HEADER
    with pytest.raises(FormatError, match="too large"):
        unpack_prefix(PREFIX.pack(b"SEALED\0", 1, MAX_HEADER + 1))


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


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ParameterError, match="32 bytes"):
        seal_bytes(b"layer", bytes(16), model="m")


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


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ParameterError, match="no such file"):
            open_sealed(path)
        with pytest.raises(ParameterError, match="no such file"):
            seal_file(path, tmp_path / "s", KEY, model="m")


def test_a_file_that_may_not_be_read_is_a_service_error(sealed: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ServiceError, match="Permission denied"):
        open_sealed(sealed)


def test_a_file_is_never_written_over_its_own_source(plain: Path, sealed: Path):
    with pytest.raises(ParameterError, match="the same file"):
        seal_file(plain, plain.parent / "." / "plain", KEY, model="m")
    with open_sealed(sealed) as file, pytest.raises(ParameterError, match="the same file"):
        file.decrypt_to(KEY, sealed)


def test_only_the_owner_may_read_what_was_decrypted(sealed: Path, tmp_path: Path):
    with open_sealed(sealed) as file:
        file.decrypt_to(KEY, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_damage_leaves_no_plaintext_behind(sealed: Path, tmp_path: Path, segment):
    data = bytearray(sealed.read_bytes())
    with open_sealed(sealed) as file:
        data[file.start + segment * SEGMENT + 500] ^= 1
    sealed.write_bytes(data)
    before = folder(sealed)
    with open_sealed(sealed) as file, pytest.raises(TamperedError):
        file.decrypt_to(KEY, tmp_path / "out", threads=1)
    assert folder(sealed) == before


def full_disk(after: int) -> Callable[..., int]:
    """A pwrite that meets a full disk after that many calls."""
    whole, calls = os.pwrite, itertools.count()

    def write(*args: object) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args)  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_leaves_the_old_files(plain: Path, sealed: Path, monkeypatch, after, threads):
    out = plain.with_name("out")
    out.write_bytes(b"old")
    before, names = sealed.read_bytes(), folder(sealed)
    monkeypatch.setattr("os.pwrite", full_disk(after))
    with pytest.raises(ServiceError, match="No space left"):
        seal_file(plain, sealed, KEY, model="n", threads=threads)
    monkeypatch.setattr("os.pwrite", full_disk(after))
    with open_sealed(sealed) as file, pytest.raises(ServiceError, match="No space left"):
        file.decrypt_to(KEY, out, threads=threads)
    assert (sealed.read_bytes(), out.read_bytes(), folder(sealed)) == (before, b"old", names)


def test_a_disk_that_is_too_small_is_met_before_the_work(plain: Path, sealed: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    seen: list[int] = []
    with pytest.raises(ServiceError, match="No space left"):
        seal_file(plain, sealed, KEY, model="n", progress=lambda done, _: seen.append(done))
    assert seen == []


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_leaves_the_old_files(plain: Path, sealed: Path, threads):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = plain.with_name("out")
    out.write_bytes(b"old")
    before, names = sealed.read_bytes(), folder(sealed)
    with pytest.raises(KeyboardInterrupt):
        seal_file(plain, sealed, KEY, model="n", threads=threads, progress=interrupt)
    with open_sealed(sealed) as file, pytest.raises(KeyboardInterrupt):
        file.decrypt_to(KEY, out, threads=threads, progress=interrupt)
    assert (sealed.read_bytes(), out.read_bytes(), folder(sealed)) == (before, b"old", names)


def test_a_failed_rewrap_leaves_the_old_file(sealed: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before, names = sealed.read_bytes(), folder(sealed)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(ServiceError):
        rewrap(sealed, KEY, add=[USER.recipient])
    assert (sealed.read_bytes(), folder(sealed)) == (before, names)


def test_a_machine_without_enough_memory_says_so(sealed: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuse)
    with open_sealed(sealed) as file, pytest.raises(ServiceError, match="not enough memory"):
        file.read_all(KEY)


def test_it_works_without_torch_and_numpy():
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None, scipy=None)\n"
        "from sealmark.formats.sealed import open_sealed, seal_bytes\n"
        "assert open_sealed(seal_bytes(b'layer', bytes(32), model='m')).read_all(bytes(32)) == b'layer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PEAK = """
import sys
from sealmark.formats.sealed import open_sealed, seal_file
folder, size = sys.argv[1], int(sys.argv[2])
with open(folder + "/plain", "wb") as file:
    file.truncate(size)
seal_file(folder + "/plain", folder + "/sealed", bytes(32), model="m")
with open_sealed(folder + "/sealed") as file:
    file.decrypt_to(bytes(32), folder + "/out")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    def peak(mib: int) -> int:  # KiB
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), str(mib << 20)], check=True, capture_output=True
        )
        return int(run.stdout)

    assert peak(96) - peak(4) < 12 * 1024
