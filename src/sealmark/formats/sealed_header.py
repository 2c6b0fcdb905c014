"""The header of a `.sealed` file: what it holds, for which model, and who may open it.

    file   = "SEALED" || 0 || 1 (version) || length of header (u32, big endian) || header || ciphertext
    header = canonical JSON {body, format, key_id, kind, model, role, size, wraps}

All fields but ``size`` and ``wraps`` are the associated data of the ciphertext, and the context of every
stanza in ``wraps``. The size is bound by the ciphertext itself. The stanzas are not, so that a copy can
be sealed for another user without encrypting it again; each is bound to its file by its context.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError, ParameterError
from sealmark.crypto.segments import ciphertext_size
from sealmark.crypto.wrapping import PassphraseStanza, Stanza, stanza_from_json
from sealmark.formats.strict_json import parse_canonical

FORMAT = "sealmark.sealed.v1"
MAGIC = b"SEALED\0"
VERSION = 1
PREFIX = struct.Struct(">7sBI")  # magic, version, bytes of JSON
MAX_HEADER = 64 << 10
MAX_PASSPHRASES = 4  # a wrong passphrase costs the reader one Argon2id for each
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Body(StrEnum):
    """What the sealed bytes are."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    GGUF = "gguf"
    BYTES = "bytes"


@dataclass(frozen=True)
class SealedHeader:
    """The header of a sealed file.

    Nothing in it is proven until the file was opened: whoever holds the key proves it, since a
    ciphertext opens under its own header alone.

    Attributes:
        model: digest or id of the model.
        kind: what the file is, such as ``model``: a lower-case word.
        role: which part of the model it is, such as ``weights``: a lower-case word.
        body: the format of the plaintext.
        size: bytes of plaintext.
        key_id: SHA-256 commitment to the data key, 64 hexadecimal digits.
        wraps: the data key, wrapped once for each recipient or passphrase.

    Raises:
        ParameterError: a field is not as described.

    Example:
        >>> header = SealedHeader(model="m", body=Body.BYTES, size=5, key_id="0" * 64)
        >>> header.context()[:60]
        b'{"body":"bytes","format":"sealmark.sealed.v1","key_id":"0000'
    """

    model: str
    body: Body
    size: int
    key_id: str
    kind: str = "model"
    role: str = "weights"
    wraps: tuple[Stanza, ...] = field(default=())

    def __post_init__(self) -> None:
        ciphertext_size(self.size)
        if not (0 < len(self.model) <= 200 and self.model.isprintable()):
            raise ParameterError("bad model", expected="1 to 200 printable characters", found=repr(self.model))
        for name in ("kind", "role"):
            if not _WORD.fullmatch(getattr(self, name)):
                raise ParameterError(f"bad {name}", expected="a lower-case word", found=repr(getattr(self, name)))
        if not re.fullmatch("[0-9a-f]{64}", self.key_id):
            raise ParameterError("bad key id", expected="64 hexadecimal digits", found=repr(self.key_id))
        passphrases = sum(isinstance(stanza, PassphraseStanza) for stanza in self.wraps)
        if passphrases > MAX_PASSPHRASES:
            raise ParameterError("too many passphrases", expected=f"at most {MAX_PASSPHRASES}", found=passphrases)

    def context(self) -> bytes:
        """What the ciphertext and every stanza are bound to, as canonical JSON."""
        return canonical_json(self._facts())

    def pack(self) -> bytes:
        """The bytes from the start of the file to the ciphertext.

        Raises:
            ParameterError: over 64 KiB, because of too many stanzas (some 200).
        """
        wraps = [stanza.to_json() for stanza in self.wraps]
        text = canonical_json({**self._facts(), "size": self.size, "wraps": wraps})
        if len(text) > MAX_HEADER:
            raise ParameterError(
                "the header is too large",
                expected=f"at most {MAX_HEADER} bytes",
                found=f"{len(text)} bytes, {len(wraps)} stanzas",
                advice="seal a copy each for fewer recipients",
            )
        return PREFIX.pack(MAGIC, VERSION, len(text)) + text

    @classmethod
    def unpack(cls, text: bytes) -> Self:
        """Read the JSON of a header, whose maker is not trusted.

        Raises:
            FormatError: anything but what `pack` writes.
        """
        fields = parse_canonical(text, limit=MAX_HEADER, what="the header")
        names = {"format", *(item.name for item in dataclasses.fields(cls))}
        if not isinstance(fields, dict) or fields.keys() != names:
            raise FormatError("the header has other fields", expected=sorted(names))
        if fields.pop("format") != FORMAT:
            raise FormatError("another format", expected=FORMAT)
        for name, value in fields.items():
            kind = {"size": int, "wraps": list}.get(name, str)
            if type(value) is not kind:
                raise FormatError(f"bad {name} in the header", expected=kind.__name__)
        try:
            wraps = tuple(stanza_from_json(value) for value in fields.pop("wraps"))
            return cls(**{**fields, "body": Body(fields["body"])}, wraps=wraps)
        except ValueError as error:  # ParameterError is one
            raise FormatError("the header is malformed", found=error) from None

    def _facts(self) -> dict[str, Any]:
        return {
            "body": str(self.body), "format": FORMAT, "key_id": self.key_id, "kind": self.kind,
            "model": self.model, "role": self.role,
        }  # fmt: skip


def unpack_prefix(prefix: bytes) -> int:
    """The length of the JSON that follows the first 12 bytes of a file.

    Raises:
        FormatError: not a sealed file, of a later version, or with a header over 64 KiB.
    """
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise FormatError("not a sealed file", expected=f"it to start with {MAGIC!r}", found=prefix[:7])
    _, version, length = PREFIX.unpack(prefix)
    if version != VERSION:
        raise FormatError(
            "another version of the format", expected=VERSION, found=version, advice="use a later sealmark"
        )
    if length > MAX_HEADER:
        raise FormatError("the header is too large", expected=f"at most {MAX_HEADER} bytes", found=length)
    return int(length)


def sniff_body(head: bytes, size: int) -> Body:
    """Guess what a file of ``size`` bytes is, from its first 16 bytes.

    Example:
        >>> sniff_body(b"GGUF" + bytes(12), 100)
        <Body.GGUF: 'gguf'>
        >>> sniff_body(bytes(16), 100)
        <Body.BYTES: 'bytes'>
    """
    if head[:4] == b"GGUF":
        return Body.GGUF
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return Body.SAFETENSORS
    # an ONNX model is a protobuf: field 1 (ir_version) with a small number, then another field below 16
    if re.match(rb"\x08[\x01-\x7f][\x12\x1a\x22\x28\x32\x3a\x42\x72]", head):
        return Body.ONNX
    return Body.BYTES
