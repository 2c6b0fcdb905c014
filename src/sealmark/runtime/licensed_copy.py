"""A licensee's copy of a model as it lies on his disk: sealed or plain, one file or a folder of shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sealmark.core.errors import FormatError, ParameterError, ServiceError, UnsupportedError, WrongKeyError
from sealmark.core.weights import INDEX, FileWeights, MemoryWeights, Weights
from sealmark.formats.sealed import SUFFIX, Body, SealedFile, open_sealed, roles_of
from sealmark.formats.sealed_header import MAGIC


class JoinedWeights(Weights):
    """Several weights as one.

    Raises:
        FormatError: a tensor is in two of them.
    """

    def __init__(self, parts: Sequence[Weights]) -> None:
        self._home = {name: part for part in parts for name in part}
        self.info = {name: part.info[name] for name, part in self._home.items()}
        if len(self.info) != sum(map(len, parts)):
            raise FormatError("a tensor is in two shards")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._home:
            raise self._missing(name)
        return self._home[name][name]


class PlainCopy:
    """Weights that anybody can read. They are read once, so that what was checked is what is used.

    Attributes:
        model: their digest.
    """

    def __init__(self, path: Path) -> None:
        files = FileWeights(path).shards
        try:
            parts = [MemoryWeights(memoryview(bytearray(shard.read_bytes()))) for shard in files]
        except OSError as error:
            raise ServiceError(f"cannot read {path}", found=error.strerror) from error
        self._weights = JoinedWeights(parts)
        self.model = self._weights.digest()

    def read(self, key: bytes | None) -> Weights:
        """The weights; no key is needed."""
        return self._weights


class SealedCopy:
    """A sealed file, or all sealed shards of a folder, none of them moved, dropped or added.

    Attributes:
        model: the digest in their headers, which opening proves.
    """

    def __init__(self, parts: Sequence[SealedFile]) -> None:
        self._parts = parts
        self.model = parts[0].header.model
        for part in parts[1:]:
            part.expect(model=self.model)
        odd = [part.header.body for part in parts if part.header.body is not Body.SAFETENSORS]
        if odd:
            raise UnsupportedError(
                "not sealed weights", expected=Body.SAFETENSORS, found=odd[0], advice="open it with open_sealed"
            )

    def read(self, key: bytes | None) -> Weights:
        """The weights, decrypted to memory.

        Raises:
            WrongKeyError: there is no key, or another.
            TamperedError: changed bytes.
            FormatError: they are no sound safetensors.
        """
        if key is None:
            raise WrongKeyError("the license holds no key", expected="one that opens the sealed copy")
        return JoinedWeights([MemoryWeights(part.read_all(key)) for part in self._parts])


@contextlib.contextmanager
def open_copy(source: Path | str) -> Iterator[SealedCopy | PlainCopy]:
    """A copy, sealed or plain.

    Raises:
        ParameterError: nothing is there.
        FormatError: neither sealed nor safetensors, or damaged.
        ModelMismatchError: sealed shards of several models, or one in another's place.
        UnsupportedError: something else than weights was sealed.
    """
    path = Path(source)
    if not path.exists():
        raise ParameterError("no such copy", expected="a file or a folder", found=str(source))
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    shards = [file for file in files if file.name != INDEX + SUFFIX]
    if not shards or (path.is_file() and not _is_sealed(path)):
        yield PlainCopy(path)
        return
    roles = roles_of(shards) if path.is_dir() else {path: "weights"}
    with contextlib.ExitStack() as stack:
        yield SealedCopy([stack.enter_context(open_sealed(file, role=role)) for file, role in roles.items()])


def _is_sealed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ServiceError(f"cannot read {path}", found=error.strerror) from error
