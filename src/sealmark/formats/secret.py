"""Secret files: a safetensors file of tensors and text, readable by its owner alone (mode 0600).

The file holds the seed, so whoever reads it can claim the mark: keep it in a vault. Besides seed and
facts it repeats scheme, parameters, model and commitment, for people and for other tools; a reader
refuses a file whose parts do not agree. The checksum tells damage from forgery and proves nothing.
torch is imported only where a secret has tensors.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.errors import ForgedSecretError, FormatError, ParameterError
from sealmark.core.files import atomic_write
from sealmark.core.secret import Secret
from sealmark.formats.strict_json import parse_canonical, parse_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sealmark.secret.v1"
MAX_HEADER = 16 << 20
MAX_TENSORS = 4096
_LENGTH = struct.Struct("<Q")
_HEX = re.compile("[0-9a-f]{64}")
_FIELDS = frozenset(
    ("checksum", "commitment", "created", "facts", "format", "model", "parameters", "scheme", "seed")
)


def write_secret(secret: Secret, path: Path | str) -> None:
    """Write a secret to a file that only its owner can read; whole or not at all.

    Raises:
        ParameterError: the folder is missing, or a tensor has a type that safetensors does not know.
        ForgedSecretError: the tensors are not the ones that the facts commit to.
        ServiceError: the disk is full or refuses.
    """
    data = secret_to_bytes(secret)
    with atomic_write(path, mode=0o600) as file:
        file.write(data)


def read_secret(path: Path | str) -> Secret:
    """Read a secret file and check that its parts belong together.

    Whether it is the secret that was published is for ``Secret.check(commitment)``.

    Raises:
        ParameterError: no such file.
        FormatError: not a secret file of this version, truncated, oversized or damaged.
        ForgedSecretError: seed, facts, tensors and commitment do not belong together.
    """
    path = Path(path)
    if not path.is_file():
        raise ParameterError("no such file", expected="a secret file", found=path)
    return secret_from_bytes(path.read_bytes())


def secret_to_bytes(secret: Secret) -> bytes:
    """The bytes of a secret file; the same secret gives the same bytes.

    Raises:
        ParameterError: a tensor has a type that safetensors does not know.
        ForgedSecretError: the tensors are not the ones that the facts commit to.

    Example:
        >>> secret = Secret(bytes(32), {"scheme": "example"})
        >>> secret_from_bytes(secret_to_bytes(secret)) == secret
        True
    """
    secret.check()
    header: dict[str, Any] = {"__metadata__": _metadata(secret)}
    bodies: list[bytes] = []
    end = 0
    # widest types first, so that every tensor lies aligned
    for name, tensor in sorted(secret.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        code, body = _tensor_bytes(name, tensor)
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [end, end + len(body)]}
        bodies.append(body)
        end += len(body)
    try:
        text = canonical_json(header)
    except UnicodeEncodeError:  # facts are text already: only the time can be none
        raise ParameterError("the time of creation is not text", expected="ISO 8601") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or len(bodies) > MAX_TENSORS:
        raise ParameterError(
            "the secret is too large",
            expected=f"a header of {MAX_HEADER} bytes and {MAX_TENSORS} tensors at most",
            found=f"{len(text)} bytes and {len(bodies)} tensors",
        )
    return b"".join((_LENGTH.pack(len(text)), text, *bodies))


def secret_from_bytes(data: bytes) -> Secret:
    """Read what `secret_to_bytes` wrote.

    Raises:
        FormatError: not a secret file of this version, truncated, oversized or damaged.
        ForgedSecretError: seed, facts, tensors and commitment do not belong together.
    """
    header, start = _header(data)
    metadata = _check_metadata(header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise FormatError("too many tensors", expected=f"at most {MAX_TENSORS}", found=len(header))
    tensors = _tensors(data) if header else {}
    if not header and len(data) != start:
        raise FormatError("the secret file is oversized", expected=f"{start} bytes", found=len(data))
    facts = _facts(metadata["facts"])
    secret = Secret(bytes.fromhex(metadata["seed"]), facts, tensors, created=metadata["created"])
    secret.check(metadata["commitment"])
    if metadata != _metadata(secret):
        raise ForgedSecretError(
            "the secret's description does not follow from its facts",
            expected="scheme, parameters and model as the facts have them",
        )
    return secret


def _metadata(secret: Secret) -> dict[str, str]:
    facts = secret.facts
    fields = {
        "commitment": secret.commitment,
        "created": secret.created,
        "facts": canonical_json(facts).decode(),
        "format": FORMAT,
        "model": str(facts.get("model", "")),
        "parameters": canonical_json(facts.get("parameters", {})).decode(),
        "scheme": secret.scheme,
        "seed": secret.reveal_seed().hex(),
    }
    return fields | {"checksum": _checksum(fields)}


def _checksum(fields: dict[str, str]) -> str:
    return sha256_hex(json.dumps(fields, sort_keys=True).encode())


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The parsed header of a safetensors file, and where its data starts."""
    length = _LENGTH.unpack(data[:8])[0] if len(data) >= 8 else MAX_HEADER + 1
    if length > min(MAX_HEADER, len(data) - 8):
        raise FormatError("not a secret file", expected="safetensors", found="no sound header length")
    header = parse_json(data[8 : 8 + length], limit=MAX_HEADER, what="the header")
    if not isinstance(header, dict):
        raise FormatError("not a secret file", expected="safetensors", found="another header")
    return header, 8 + length


def _check_metadata(metadata: Any) -> dict[str, str]:
    """The metadata, if it has the form and the checksum of ours."""
    kind = metadata.get("format") if isinstance(metadata, dict) else None
    if kind != FORMAT:
        raise FormatError("not a secret file of this version", expected=FORMAT, found=repr(kind)[:60])
    if metadata.keys() != _FIELDS or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("bad secret file", expected=f"the text fields {sorted(_FIELDS)}")
    fields = {name: value for name, value in metadata.items() if name != "checksum"}
    if _checksum(fields) != metadata["checksum"]:
        raise FormatError("the secret file is damaged", advice="restore it from a backup")
    if not all(_HEX.fullmatch(metadata[name]) for name in ("seed", "commitment")):
        raise FormatError("bad secret file", expected="seed and commitment of 64 hexadecimal digits")
    return fields | {"checksum": metadata["checksum"]}


def _facts(text: str) -> dict[str, Any]:
    # a lone surrogate passes here and is refused there, as text that is not UTF-8
    facts = parse_canonical(text.encode(errors="surrogatepass"), limit=MAX_HEADER, what="the text of the facts")
    digests = facts.get("tensors", {}) if isinstance(facts, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise FormatError("bad facts", expected="an object, with a digest for each tensor")
    if not all(isinstance(facts.get(name, {}), dict) for name in ("host", "parameters")):
        raise FormatError("bad facts", expected="objects under 'host' and 'parameters'")
    return dict(facts)


def _tensor_bytes(name: str, tensor: Tensor) -> tuple[str, bytes]:
    import torch

    from sealmark.core.weights import DTYPES

    codes = {dtype: code for code, dtype in DTYPES.items()}
    if name == "__metadata__" or tensor.dtype not in codes:
        raise ParameterError(f"cannot write tensor {name!r}", expected=f"one of {list(DTYPES)}", found=tensor.dtype)
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return codes[tensor.dtype], flat.view(torch.uint8).numpy().tobytes()


def _tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file whose header was parsed; safetensors refuses holes, overlaps and cuts."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FormatError("not a secret file", found=f"bad tensors ({type(error).__name__})") from None
    return tensors
