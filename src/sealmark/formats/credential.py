"""Credential files: what the user of a served model holds, readable by its owner alone (mode 0600).

A safetensors file whose metadata name the user, the scheme and the digest of the served model. Whoever reads
it can pass for its user, and nothing in it proves who wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.files import atomic_write
from sealmark.formats.strict_json import parse_canonical, parse_json

if TYPE_CHECKING:
    from sealmark.core.credentials import Credential

FORMAT = "sealmark.credential.v1"
MAX_BYTES = 256 << 20
_FIELDS = frozenset(("model", "scheme", "user"))


@dataclass(frozen=True)
class HeldCredential:
    """A credential and what it is for.

    Attributes:
        credential: the user's.
        scheme: public name.
        model: digest of the served model.
    """

    credential: Credential
    scheme: str
    model: str


def write_credential(held: HeldCredential, path: Path | str) -> None:
    """Write a credential file; the same credential gives the same bytes.

    Raises:
        ParameterError: the folder is missing, there is nothing in the credential, or too much.
        ServiceError: the disk is full or refuses.

    Example:
        >>> import tempfile, torch
        >>> from sealmark.core.credentials import Credential
        >>> held = HeldCredential(Credential("ada", {"images": torch.zeros(2, 1, 8, 8)}), "example", "00")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_credential(held, Path(folder) / "ada.credential")
        ...     read_credential(Path(folder) / "ada.credential").credential.user
        'ada'
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in held.credential.tensors.items()}
    told = {"model": held.model, "scheme": held.scheme, "user": held.credential.user}
    # one entry, for the order of several is no certain one
    data = save(tensors, {FORMAT: canonical_json(told).decode()})
    if not tensors or len(data) > MAX_BYTES:
        raise ParameterError(
            "no credential of ours", expected=f"tensors of {MAX_BYTES} bytes at most", found=len(data)
        )
    with atomic_write(path, mode=0o600) as file:
        file.write(data)


def read_credential(path: Path | str) -> HeldCredential:
    """Read a credential file.

    Raises:
        ParameterError: no such file.
        FormatError: not a credential file of this version, truncated or oversized.
    """
    from sealmark.core.credentials import Credential
    from sealmark.core.weights import MemoryWeights

    path = Path(path)
    if not path.is_file():
        raise ParameterError("no such file", expected="a credential", found=path)
    if path.stat().st_size > MAX_BYTES:
        raise FormatError("too large for a credential", expected=f"{MAX_BYTES} bytes", found=path.stat().st_size)
    data = bytearray(path.read_bytes())
    weights = MemoryWeights(memoryview(data))
    told = _told(data)
    return HeldCredential(Credential(told["user"], dict(weights)), told["scheme"], told["model"])


def _told(data: bytearray) -> dict[str, str]:
    """The metadata of a file whose header was checked."""
    header = parse_json(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]), limit=MAX_BYTES, what="the header")
    metadata = header.get("__metadata__", {})
    if metadata.keys() != {FORMAT} or len(header) < 2:
        raise FormatError("not a credential file of this version", expected=FORMAT, found=sorted(metadata))
    told = parse_canonical(
        str(metadata[FORMAT]).encode(errors="surrogatepass"), limit=MAX_BYTES, what="what it is for"
    )
    if not isinstance(told, dict) or told.keys() != _FIELDS or not all(isinstance(v, str) for v in told.values()):
        raise FormatError("bad credential file", expected=f"the text fields {sorted(_FIELDS)}")
    if not told["user"]:
        raise FormatError("bad credential file", expected="the name of a user", found="none")
    return told
