"""Sealed files: weights under authenticated encryption, bound to their model, for those who may open them.

`seal_file` writes one, `open_sealed` reads one, `rewrap` changes who may open it. The layout is drawn in
`sealmark.formats.sealed_header`; after the header comes a plain Tink ciphertext
(`sealmark.crypto.streaming`), so that any Tink opens the file once it has the key.

Encryption keeps a model secret from those without the key. It does not stop those who hold the key from
copying what they opened: that is what marks are for. Nor does it say who sealed a file: that is what
signatures are for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from sealmark.core.errors import ParameterError
from sealmark.core.files import atomic_write, reserve
from sealmark.crypto.recipients import Passphrase, Recipient
from sealmark.crypto.segments import ciphertext_size
from sealmark.crypto.streaming import encrypt_stream
from sealmark.crypto.transfer import Progress, file_fetch, file_store, memory_fetch, memory_store
from sealmark.crypto.wrapping import Stanza, key_id, wrap
from sealmark.formats.sealed_file import Opener, SealedFile, check_apart, open_regular, open_sealed
from sealmark.formats.sealed_header import Body, SealedHeader, sniff_body

__all__ = [
    "Body",
    "Opener",
    "SealedFile",
    "SealedHeader",
    "open_sealed",
    "rewrap",
    "roles_of",
    "seal_bytes",
    "seal_file",
]

SUFFIX = ".sealed"  # of the parts of a folder
_INDEX = ".json"  # what says which shard holds which tensor


def roles_of(parts: Iterable[Path]) -> dict[Path, str]:
    """What binds each part of a sharded model to its place, so that none can be moved, dropped or added.

    Args:
        parts: files of one folder, sealed (``.sealed``) or still plain.

    Returns:
        Roles by part: shards in the order of their names, and last the index, which makes them a model.

    Example:
        >>> list(roles_of([Path("b.safetensors"), Path("a.safetensors.sealed")]).values())
        ['weights-1-of-2', 'weights-2-of-2']
    """
    named = sorted((part.name.removesuffix(SUFFIX), part) for part in parts)
    shards = [part for name, part in named if not name.endswith(_INDEX)]
    roles = {part: f"weights-{turn}-of-{len(shards)}" for turn, part in enumerate(shards, 1)}
    return roles | {part: "index" for name, part in named if name.endswith(_INDEX)}


def seal_file(
    source: Path | str,
    target: Path | str,
    key: bytes,
    *,
    model: str,
    role: str = "weights",
    kind: str = "model",
    body: Body | str | None = None,
    wraps: Iterable[Recipient | Passphrase] = (),
    threads: int = 2,
    progress: Progress | None = None,
) -> SealedHeader:
    """Encrypt a file of any size to ``target``, in bounded memory; whole or not at all.

    Args:
        source: the file, which stays.
        target: the sealed file.
        key: the data key, 32 bytes; see `sealmark.crypto.streaming.draw_key`.
        model: digest or id of the model, which a reader can insist on.
        role: which part of the model it is.
        kind: what the file is.
        body: the format of the source; guessed from its first bytes if not given.
        wraps: who may open it without being handed the key.
        threads: that many segments are encrypted at a time.
        progress: told the bytes done and in all.

    Returns:
        The header that was written.

    Raises:
        ParameterError: no such file, source and target are the same, or a bad value.
        FormatError: the source was cut while it was read.
        ServiceError: the disk is full or fails; an old ``target`` then stands.

    Example:
        >>> import tempfile
        >>> from sealmark.crypto.recipients import Identity
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plain, sealed = Path(folder) / "plain", Path(folder) / "model.sealed"
        ...     _ = plain.write_bytes(b"layer")
        ...     owner = Identity.generate()
        ...     header = seal_file(plain, sealed, bytes(32), model="m", wraps=[owner.recipient])
        ...     with open_sealed(sealed, model="m") as file:
        ...         bytes(file.read_all(owner))
        b'layer'
    """
    check_apart(source, target)
    with open_regular(source) as plain:
        size = os.fstat(plain.fileno()).st_size
        guess = sniff_body(plain.read(16), size) if body is None else body
        header = _header(key, size, wraps, model=model, role=role, kind=kind, body=guess)
        start = header.pack()
        with atomic_write(target) as file:
            reserve(file, len(start) + ciphertext_size(size))
            file.write(start)
            file.flush()
            encrypt_stream(
                key, size, file_fetch(plain), file_store(file, len(start)),
                aad=header.context(), threads=threads, progress=progress,
            )  # fmt: skip
    return header


def seal_bytes(
    data: bytes | bytearray | memoryview,
    key: bytes,
    *,
    model: str,
    role: str = "weights",
    kind: str = "model",
    body: Body | str | None = None,
    wraps: Iterable[Recipient | Passphrase] = (),
) -> bytes:
    """What `seal_file` would write for ``data``, in memory.

    Raises:
        ParameterError: a bad value.

    Example:
        >>> sealed = seal_bytes(b"layer", bytes(32), model="m")
        >>> bytes(open_sealed(sealed, model="m").read_all(bytes(32)))
        b'layer'
    """
    view = memoryview(data).cast("B")
    guess = sniff_body(bytes(view[:16]), len(view)) if body is None else body
    header = _header(key, len(view), wraps, model=model, role=role, kind=kind, body=guess)
    start = header.pack()
    result = bytearray(len(start) + ciphertext_size(len(view)))
    result[: len(start)] = start
    sink = memory_store(memoryview(result)[len(start) :])
    encrypt_stream(key, len(view), memory_fetch(view), sink, aad=header.context(), threads=1)
    return bytes(result)


def rewrap(
    source: Path | str,
    opener: Opener,
    *,
    add: Iterable[Recipient | Passphrase] = (),
    remove: Iterable[Stanza] = (),
    target: Path | str | None = None,
) -> SealedHeader:
    """Change who may open a sealed file, without encrypting it again.

    Whoever could open the old file may have kept it, or its key: removing a stanza revokes nothing.

    Args:
        source: the sealed file.
        opener: opens it.
        add: who may open the new file as well.
        remove: stanzas of its header that the new file shall not have.
        target: the new file; ``source`` is replaced if not given.

    Raises:
        ParameterError: a stanza to remove is not there, or there are too many.
        WrongKeyError, TamperedError: ``opener`` does not open it.
        ServiceError: the disk is full or fails; an old ``target`` then stands.
    """
    with open_sealed(source) as sealed:
        key, dropped = sealed.unwrap(opener), list(remove)
        sealed.reader(key)  # proves that the header is the one that was sealed
        missing = [stanza for stanza in dropped if stanza not in sealed.header.wraps]
        if missing:
            raise ParameterError("cannot remove stanzas", expected="stanzas of this file", found=missing)
        kept = [stanza for stanza in sealed.header.wraps if stanza not in dropped]
        fresh = [wrap(key, to, context=sealed.header.context()) for to in add]
        header = dataclasses.replace(sealed.header, wraps=(*kept, *fresh))
        start = header.pack()
        with atomic_write(source if target is None else target) as file:
            file.write(start)
            sealed.copy_ciphertext(file)
    return header


def _header(
    key: bytes,
    size: int,
    wraps: Iterable[Recipient | Passphrase],
    *,
    model: str,
    role: str,
    kind: str,
    body: Body | str,
) -> SealedHeader:
    try:
        known = Body(body)
    except ValueError:
        raise ParameterError("unknown body", expected=f"one of {[*map(str, Body)]}", found=body) from None
    header = SealedHeader(model=model, role=role, kind=kind, body=known, size=size, key_id=key_id(key))
    stanzas = tuple(wrap(key, to, context=header.context()) for to in wraps)
    return dataclasses.replace(header, wraps=stanzas)
