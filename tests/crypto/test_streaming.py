"""The streaming AEAD against Tink, and against everybody who changes a byte."""

from __future__ import annotations

import io
import itertools
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from sealmark.core.errors import ParameterError, TamperedError
from sealmark.crypto.segments import (
    HEADER,
    SEGMENT,
    TAG,
    ciphertext_size,
)
from sealmark.crypto.streaming import (
    SeekableReader,
    decrypt_bytes,
    draw_key,
    encrypt_bytes,
    encrypt_stream,
)
from sealmark.crypto.transfer import (
    file_fetch,
    file_store,
    memory_fetch,
    memory_store,
)

KEY = bytes(range(32))
FIRST = SEGMENT - TAG - HEADER  # plaintext bytes of a full first segment
FULL = SEGMENT - TAG
SIZES = [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL, FIRST + FULL + 1, 5_000_000]


class Kept(io.BytesIO):
    """Tink closes what it wrote to; this one can still be read."""

    def close(self) -> None:
        pass


def tink_primitive(key: bytes):
    import tink
    from tink import secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

    streaming_aead.register()
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    form = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKeyFormat.FromString(template.value)
    assert form.params.hkdf_hash_type == common_pb2.SHA256
    value = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=key, params=form.params)
    data = tink_pb2.KeyData(
        type_url=template.type_url,
        value=value.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    entry = tink_pb2.Keyset.Key(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry]).SerializeToString()
    handle = tink.proto_keyset_format.parse(keyset, secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def tink_encrypt(key: bytes, data: bytes, aad: bytes) -> bytes:
    out = Kept()
    with tink_primitive(key).new_encrypting_stream(out, aad) as stream:
        stream.write(data)
    return out.getvalue()


def tink_decrypt(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    with tink_primitive(key).new_decrypting_stream(io.BytesIO(sealed), aad) as stream:
        return stream.read()


def reader(sealed: bytes, *, aad: bytes = b"", threads: int = 1) -> SeekableReader:
    return SeekableReader(KEY, len(sealed), memory_fetch(sealed), aad=aad, threads=threads)


@pytest.fixture(scope="module")
def plain() -> bytes:
    return secrets.token_bytes(2_500_000)


@pytest.fixture(scope="module")
def sealed(plain: bytes) -> bytes:
    return encrypt_bytes(KEY, plain, aad=b"model")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aad", [b"", b"model 1"])
def test_tink_opens_what_we_seal(size, aad):
    data = secrets.token_bytes(size)
    assert tink_decrypt(KEY, encrypt_bytes(KEY, data, aad=aad), aad) == data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aad", [b"", b"model 1"])
def test_we_open_what_tink_seals(size, aad):
    data = secrets.token_bytes(size)
    assert decrypt_bytes(KEY, tink_encrypt(KEY, data, aad), aad=aad) == data


def test_tink_refuses_other_associated_data_of_ours():
    import tink

    with pytest.raises(tink.TinkError):
        tink_decrypt(KEY, encrypt_bytes(KEY, b"layer", aad=b"a"), b"b")


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_a_key_of_another_length_is_refused(key):
    with pytest.raises(ParameterError, match="expected 32 bytes"):
        encrypt_bytes(key, b"layer")


def test_drawn_keys_differ():
    assert len({draw_key() for _ in range(8)}) == 8
    assert len(draw_key()) == 32


def test_the_same_plaintext_never_gives_the_same_ciphertext():
    first, second = (encrypt_bytes(KEY, b"layer" * 10) for _ in range(2))
    assert first[1:40] != second[1:40]
    assert first[40:] != second[40:]


def test_every_flipped_bit_is_found():
    sealed = encrypt_bytes(KEY, b"layer", aad=b"model")
    for index, bit in itertools.product(range(len(sealed)), range(8)):
        changed = bytearray(sealed)
        changed[index] ^= 1 << bit
        with pytest.raises(TamperedError):
            decrypt_bytes(KEY, changed, aad=b"model")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_long_stream_is_found(data, sealed):
    changed = bytearray(sealed)
    changed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TamperedError):
        decrypt_bytes(KEY, changed, aad=b"model")


@pytest.mark.parametrize(
    "length",
    [
        0,
        1,
        HEADER - 1,
        HEADER,
        HEADER + TAG - 1,
        HEADER + TAG,
        1000,
        SEGMENT - 1,
        SEGMENT,
        SEGMENT + 1,
        SEGMENT + TAG,
        SEGMENT + TAG + 1,
        2 * SEGMENT,
        2_000_000,
    ],
)
def test_a_cut_stream_is_refused(sealed, length):
    with pytest.raises(TamperedError):
        reader(sealed[:length], aad=b"model")


@pytest.mark.parametrize("extra", [b"\0", bytes(TAG), bytes(TAG + 1), bytes(SEGMENT)])
def test_appended_bytes_are_refused(sealed, extra):
    with pytest.raises(TamperedError):
        reader(sealed + extra, aad=b"model")


def test_two_segments_that_changed_places_are_refused():
    data = secrets.token_bytes(FIRST + 2 * FULL + 5)
    sealed = encrypt_bytes(KEY, data)
    moved = sealed[:SEGMENT] + sealed[2 * SEGMENT : 3 * SEGMENT] + sealed[SEGMENT : 2 * SEGMENT]
    moved += sealed[3 * SEGMENT :]
    with pytest.raises(TamperedError, match="segment 1 of 4"):
        decrypt_bytes(KEY, moved)
    assert decrypt_bytes(KEY, sealed) == data


def test_a_segment_of_another_stream_is_refused(plain, sealed):
    other = encrypt_bytes(KEY, plain, aad=b"model")
    with pytest.raises(TamperedError):
        decrypt_bytes(KEY, other[:SEGMENT] + sealed[SEGMENT : 2 * SEGMENT] + other[2 * SEGMENT :], aad=b"model")


@pytest.mark.parametrize("first", [0, 24, 39, 41, 255])
def test_a_foreign_header_is_refused(first):
    sealed = bytes([first]) + encrypt_bytes(KEY, b"layer")[1:]
    with pytest.raises(TamperedError, match="foreign header"):
        decrypt_bytes(KEY, sealed)


def test_a_wrong_key_reads_as_tampering_and_the_message_says_so():
    with pytest.raises(TamperedError, match="or the right key: authentication cannot tell"):
        decrypt_bytes(bytes(32), encrypt_bytes(KEY, b"layer"))


def test_other_associated_data_is_refused(sealed):
    with pytest.raises(TamperedError):
        decrypt_bytes(KEY, sealed, aad=b"another model")


def test_nothing_that_did_not_authenticate_is_left_in_the_buffer():
    data = secrets.token_bytes(FIRST + FULL + FULL)
    sealed = bytearray(encrypt_bytes(KEY, data))
    sealed[SEGMENT + 7] ^= 1
    target = bytearray(b"\xaa" * len(data))
    with pytest.raises(TamperedError):
        reader(sealed).read_into(0, memoryview(target))
    assert target[:FIRST] == data[:FIRST]
    assert target[FIRST : FIRST + FULL] == bytes(FULL)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), threads=st.integers(1, 3))
def test_any_range_reads_as_a_slice_of_the_plaintext(data, threads, plain, sealed):
    offset = data.draw(st.integers(0, len(plain)))
    count = data.draw(st.integers(0, len(plain) - offset))
    file = reader(sealed, aad=b"model", threads=threads)
    assert file.read_at(offset, count) == plain[offset : offset + count]
    assert file.read_at(0, 10) == plain[:10]


def test_a_read_touches_only_the_segments_that_it_needs(sealed):
    spans: list[int] = []

    def fetch(offset: int, buffer: memoryview) -> None:
        spans.append(offset // SEGMENT)
        memory_fetch(sealed)(offset, buffer)

    file = SeekableReader(KEY, len(sealed), fetch, aad=b"model")
    assert spans == [0, 2]  # the header; the last segment, which proves the size
    file.read_at(FIRST + 5, 10)
    file.read_at(FIRST + 500, 10)
    assert spans == [0, 2, 1]  # and a second read of the same segment costs nothing


def test_damage_elsewhere_does_not_disturb_a_range(plain, sealed):
    changed = bytearray(sealed)
    changed[100] ^= 1
    file = reader(changed, aad=b"model")
    assert file.read_at(FIRST, 1000) == plain[FIRST : FIRST + 1000]
    with pytest.raises(TamperedError, match="segment 0 of 3"):
        file.read_at(FIRST - 1, 1)


@pytest.mark.parametrize(("offset", "count"), [(-1, 1), (0, -1), (0, 6), (6, 0), (5, 1)])
def test_a_range_outside_the_plaintext_is_refused(offset, count):
    with pytest.raises(ParameterError, match=r"inside 0 \.\. 5"):
        reader(encrypt_bytes(KEY, b"layer")).read_at(offset, count)


def test_a_read_only_buffer_is_refused():
    with pytest.raises(ParameterError, match="writable"):
        reader(encrypt_bytes(KEY, b"layer")).read_into(0, memoryview(bytes(5)))


def test_it_is_a_file_for_whoever_reads_files(plain, sealed):
    file = reader(sealed, aad=b"model")
    assert file.readable()
    assert file.seekable()
    assert not file.writable()
    assert file.size == len(plain)
    assert file.read(7) == plain[:7]
    assert file.seek(-5, io.SEEK_END) == len(plain) - 5
    assert file.read(100) == plain[-5:]
    assert file.read(1) == b""
    assert file.seek(3) == 3
    assert file.seek(2, io.SEEK_CUR) == file.tell() == 5
    assert file.read() == plain[5:]
    assert file.seek(len(plain) + 9) == len(plain) + 9
    assert file.read() == file.read(3) == b""


def test_a_buffered_reader_over_it_reads_lines():
    sealed = encrypt_bytes(KEY, b"one\ntwo\n")
    assert list(io.BufferedReader(reader(sealed))) == [b"one\n", b"two\n"]


@pytest.mark.parametrize(("offset", "whence"), [(-1, io.SEEK_SET), (-6, io.SEEK_END), (0, 9)])
def test_seeking_before_the_start_is_refused(offset, whence):
    with pytest.raises(ParameterError, match="cannot seek"):
        reader(encrypt_bytes(KEY, b"layer")).seek(offset, whence)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_files_go_through_whole_at_any_place(tmp_path: Path, size, threads):
    data = secrets.token_bytes(size)
    (tmp_path / "plain").write_bytes(b"skip" + data)
    with (tmp_path / "plain").open("rb") as source, (tmp_path / "sealed").open("w+b") as target:
        encrypt_stream(KEY, size, file_fetch(source, 4), file_store(target, 9), aad=b"m", threads=threads)
        sealed = SeekableReader(KEY, ciphertext_size(size), file_fetch(target, 9), aad=b"m", threads=threads)
        out = bytearray(size)
        sealed.copy_to(memory_store(out))
        assert out == data
        assert sealed.readall() == data


def test_progress_ends_with_all_of_it(plain, sealed):
    seen: list[tuple[int, int]] = []
    size = len(plain)
    encrypt_stream(
        KEY, size, memory_fetch(plain), memory_store(bytearray(ciphertext_size(size))),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


def test_the_wire_format_is_the_published_one():
    # an independent reading of the specification, one segment, from the primitives alone
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    sealed = encrypt_bytes(KEY, b"layer", aad=b"model")
    key = HKDF(SHA256(), 32, salt=sealed[1:33], info=b"model").derive(KEY)
    assert sealed[0] == 40
    assert AESGCM(key).decrypt(sealed[33:40] + bytes(4) + b"\1", sealed[40:], None) == b"layer"
