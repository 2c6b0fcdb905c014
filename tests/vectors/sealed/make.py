"""Writes vectors.json: sealed files in hexadecimal, each with ONE thing wrong, or with none.

    python tests/vectors/sealed/make.py

Salts are drawn afresh, so run it only when the format changes, and then keep the old vectors that a new
reader must still open. `outcome` is the code of the error, or `OK`. `opener` is one of the keys below.
"""

from __future__ import annotations

import json
from pathlib import Path

from sealmark.core.canonical import canonical_json
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.wrapping import RecipientStanza, wrap
from sealmark.formats.sealed import open_sealed, seal_bytes
from sealmark.formats.sealed_header import MAGIC, PREFIX, VERSION

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
IDENTITY, OTHER_IDENTITY = Identity(bytes(31) + b"\1"), Identity(bytes(31) + b"\2")
PLAIN = b"first layer, second layer"
MODEL = "sha256:0123456789abcdef"
CHEAP = Cost(iterations=1, memory_kib=64, lanes=1)
WORDS = Passphrase("correct horse", cost=CHEAP)


def seal(data: bytes = PLAIN, *, model: str = MODEL) -> bytes:
    return seal_bytes(data, KEY, model=model, wraps=(IDENTITY.recipient, WORDS))


def head(file: bytes) -> bytes:
    return file[PREFIX.size : open_sealed(file).start]


def framed(header: bytes, file: bytes) -> bytes:
    """The file under another header, whose length is right."""
    return PREFIX.pack(MAGIC, VERSION, len(header)) + header + file[open_sealed(file).start :]


def edited(file: bytes, **changes: object) -> bytes:
    """The file with fields of its header changed."""
    return framed(canonical_json({**json.loads(head(file)), **changes}), file)


def with_stanza(file: bytes, index: int, **changes: object) -> bytes:
    """The file with fields of a stanza changed."""
    wraps = json.loads(head(file))["wraps"]
    wraps[index] |= changes
    return edited(file, wraps=wraps)


def flipped(file: bytes, index: int) -> bytes:
    return file[:index] + bytes([file[index] ^ 1]) + file[index + 1 :]


def vectors() -> list[tuple[str, str, str, bytes]]:
    good = seal()
    header, start = head(good), open_sealed(good).start
    elsewhere = json.loads(head(seal(model="another")))["wraps"]
    other_key = wrap(OTHER_KEY, IDENTITY.recipient, context=open_sealed(good).header.context())
    low_order = RecipientStanza(IDENTITY.recipient, bytes(80))
    return [
        ("opens with its key", "OK", "key", good),
        ("opens for its recipient", "OK", "identity", good),
        ("opens with its passphrase", "OK", "passphrase", good),
        ("empty", "OK", "key", seal(b"")),
        ("another key", "WRONG_KEY", "other key", good),
        ("another identity", "WRONG_KEY", "other identity", good),
        ("another passphrase", "WRONG_KEY", "other passphrase", good),
        ("not the magic", "BAD_FORMAT", "key", b"SEALER" + good[6:]),
        ("a later version", "BAD_FORMAT", "key", good[:7] + b"\2" + good[8:]),
        ("a header of 64 KiB and a byte", "BAD_FORMAT", "key", good[:8] + b"\0\1\0\1" + good[12:]),
        ("a header longer than the file", "BAD_FORMAT", "key", good[:8] + b"\0\0\xff\xff" + good[12:]),
        ("cut in the prefix", "BAD_FORMAT", "key", good[:11]),
        ("cut in the header", "BAD_FORMAT", "key", good[:100]),
        ("cut in the ciphertext", "BAD_FORMAT", "key", good[:-1]),
        ("a byte added", "BAD_FORMAT", "key", good + b"\0"),
        ("cut, and the size mended", "TAMPERED", "key", edited(good, size=len(PLAIN) - 1)[:-1]),
        ("a space in the header", "BAD_FORMAT", "key", framed(header.replace(b":", b": ", 1), good)),
        ("a field twice", "BAD_FORMAT", "key", framed(b'{"body":"bytes",' + header[1:], good)),
        ("a field more", "BAD_FORMAT", "key", edited(good, more=1)),
        ("another format", "BAD_FORMAT", "key", edited(good, format="sealmark.sealed.v2")),
        ("an unknown body", "BAD_FORMAT", "key", edited(good, body="pickle")),
        ("a size that is text", "BAD_FORMAT", "key", edited(good, size=str(len(PLAIN)))),
        ("a negative size", "BAD_FORMAT", "key", edited(good, size=-1)),
        ("another model in the header", "TAMPERED", "key", edited(good, model="another")),
        ("another role in the header", "TAMPERED", "key", edited(good, role="tokenizer")),
        ("another kind in the header", "TAMPERED", "key", edited(good, kind="secret")),
        ("another body in the header", "TAMPERED", "key", edited(good, body="onnx")),
        ("the stanzas of another file", "TAMPERED", "identity", edited(good, wraps=elsewhere)),
        ("a stanza with another key", "TAMPERED", "identity", edited(good, wraps=[other_key.to_json()])),
        ("a point of low order", "TAMPERED", "identity", edited(good, wraps=[low_order.to_json()])),
        ("a stanza that asks for 1 TiB", "BAD_FORMAT", "key", with_stanza(good, 1, memory_kib=1 << 30)),
        ("a stanza of an unknown type", "BAD_FORMAT", "key", with_stanza(good, 0, type="rot13")),
        ("a foreign header of the ciphertext", "TAMPERED", "key", flipped(good, start)),
        ("a changed salt", "TAMPERED", "key", flipped(good, start + 1)),
        ("a changed byte of ciphertext", "TAMPERED", "key", flipped(good, len(good) - 20)),
        ("a changed tag", "TAMPERED", "key", flipped(good, len(good) - 1)),
    ]


def main() -> None:
    openers = {
        "key": KEY.hex(), "other key": OTHER_KEY.hex(),
        "identity": IDENTITY.reveal(), "other identity": OTHER_IDENTITY.reveal(),
        "passphrase": "correct horse", "other passphrase": "correct horsf",
    }  # fmt: skip
    rows = [
        {"name": name, "outcome": outcome, "opener": opener, "file": file.hex()}
        for name, outcome, opener, file in vectors()
    ]
    document = {"plain": PLAIN.hex(), "openers": openers, "vectors": rows}
    Path(__file__).with_name("vectors.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
