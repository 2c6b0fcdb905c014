"""Sealed weights: authenticated encryption. The one lock whose strength is that of its cipher."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sealmark.core.card import Card
from sealmark.core.errors import FormatError, ModelMismatchError, ParameterError, UnsupportedError, WrongKeyError
from sealmark.core.lock import Lock, Locked
from sealmark.core.secret import Secret
from sealmark.core.task import Task
from sealmark.core.weights import DTYPES, INDEX, FileWeights, MemoryWeights, Progress, TensorInfo, weights_of
from sealmark.formats.sealed import SUFFIX, SealedFile, open_sealed, roles_of, seal_bytes, seal_file

_ROLE = "weights"


@dataclass(frozen=True)
class SealedWeights(Lock):
    """Encrypt the weights (AES-256-GCM in segments), bound to the model that they belong to.

    Any other key is refused, and so is any changed bit. A file becomes a `.sealed` file, which
    `sealmark.formats.sealed` can also wrap for recipients and passphrases; of a folder each shard and
    the index do, each bound to its place, so that none can be swapped, dropped or added.

    A live model becomes a `SealedModel`. Its parameters and buffers are encrypted, those that are not
    in the state dict included; its code and hyper-parameters are not. The ciphertext, and the model
    while it is being sealed, are in memory as a whole: use files for large models.

    Encryption ends where a licensee opens the model: what is in his memory he can copy. Mark it first.

    Example:
        >>> lock = SealedWeights()
        >>> model = nn.Linear(2, 3)
        >>> locked = lock.lock(model)
        >>> torch.equal(lock.unlock(locked.model, locked.key).weight, model.weight)
        True
    """

    card = Card(
        title="Weights under authenticated encryption",
        citation="V. T. Hoang, R. Reyhanitabar, P. Rogaway, D. Vizár, Online Authenticated-Encryption and its "
        "Nonce-Reuse Misuse-Resistance, CRYPTO 2015; Tink, AES256_GCM_HKDF_1MB",
        function=("authorization",),
        scenario="artifact",
        mechanism="streaming authenticated encryption of the weight file",
        capacity="one key a model; any number of recipients by wrapping it",
        type="active lock",
        target_models="any",
        needs_training=False,
        needs_data=False,
        reported="confidentiality and integrity as long as AES-256-GCM and HKDF-SHA-256 hold",
        reproduced="every other key and every flipped bit refused, in both directions with Tink; 1.3 x cp to"
        " disk (docs/results/figures.md, docs/results/speed.md)",
        broken_by=("a licensee who keeps what he opened: combine it with a mark of his own",),
        max_drop=0.0,
        refuses_wrong_key=True,
        key_point="load",
        exact_unlock=True,
        grade="recommended",
    )

    def lock(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Locked:
        """See `Lock.lock`.

        Raises:
            UnsupportedError: a tensor is neither parameter nor buffer, or of a type that has no safetensors form.
        """
        tensors = _tensors(model)
        _check_sealable(model, tensors)
        key = self.new_secret(weights_of(model), owner=owner, rng=rng)
        hollow = {id(tensor): _like(tensor, "meta") for tensor in tensors.values()}
        architecture = copy.deepcopy(model, hollow)
        plain = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        sealed = seal_bytes(plain, key.key("data"), model=key.facts["model"], role=_ROLE, body="safetensors")
        return Locked(SealedModel(architecture, sealed), key)

    def unlock(self, model: nn.Module, key: Secret) -> nn.Module:
        """The model as it was, on the device where the ciphertext is.

        Raises:
            ParameterError: ``model`` is not a `SealedModel`, or the key belongs to another scheme.
            WrongKeyError: another key.
            TamperedError, FormatError: the ciphertext was changed.
            ModelMismatchError: the key, or the architecture, is of another model.
        """
        self.check_secret(key)
        if not isinstance(model, SealedModel):
            raise ParameterError("not a sealed model", expected="a SealedModel", found=type(model).__name__)
        with open_sealed(model.ciphertext.cpu().numpy().tobytes(), model=key.facts["model"], role=_ROLE) as sealed:
            weights = MemoryWeights(sealed.read_all(key.key("data")))
        hollow = _tensors(model.architecture)
        if weights.info != {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in hollow.items()}:
            raise ModelMismatchError(
                "the sealed weights do not fit the architecture",
                expected=f"{len(hollow)} tensors of {type(model.architecture).__name__}",
                found=f"{len(weights)} tensors of other names or shapes",
            )
        filled = {id(tensor): _like(tensor, model.ciphertext.device) for tensor in hollow.values()}
        for name, tensor in hollow.items():
            filled[id(tensor)].data.copy_(weights[name])
        return copy.deepcopy(model.architecture, filled)

    def lock_file(
        self,
        source: Path | str,
        target: Path | str,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Secret:
        """See `Lock.lock_file`; the parts of a folder get the suffix ``.sealed``."""
        source, target = Path(source), Path(target)
        if source.suffix == ".json":
            raise ParameterError("cannot lock an index", expected="the folder that it is in", found=str(source))
        weights = FileWeights(source)
        key = self.new_secret(weights, owner=owner, rng=rng)
        parts = {source: _ROLE}
        if source.is_dir():
            index = source / INDEX
            parts = roles_of([*weights.shards, *([index] if index.is_file() else [])])
        with _all_or_none(source, target) as written:
            for part, role in parts.items():
                to = target / (part.name + SUFFIX) if source.is_dir() else target
                seal_file(part, to, key.key("data"), model=key.facts["model"], role=role)
                written.callback(to.unlink)
                if progress:
                    progress(part.name, part.stat().st_size)
        return key

    def unlock_file(
        self,
        source: Path | str,
        target: Path | str,
        key: Secret,
        *,
        progress: Progress | None = None,
    ) -> None:
        """See `Lock.unlock_file`; the files can be read by their owner alone.

        Raises:
            WrongKeyError: another key.
            TamperedError, FormatError: the file was changed, or is not a sealed one.
            ModelMismatchError: the key is of another model, or a shard was moved, dropped or added.
        """
        source, target = Path(source), Path(target)
        with _all_or_none(source, target) as written:
            for part, sealed in self._parts(source, key):
                to = target / part.name.removesuffix(SUFFIX) if source.is_dir() else target
                sealed.decrypt_to(key.key("data"), to)
                written.callback(to.unlink)
                if progress:
                    progress(part.name, sealed.header.size)

    def open_file(self, path: Path | str, key: Secret) -> dict[str, Tensor]:
        """The tensors of a sealed file or folder, decrypted into memory; none of it touches a disk.

        The tensors are views of one buffer a file. A model takes them with
        ``model.load_state_dict(tensors, assign=True)``.

        Raises:
            WrongKeyError, TamperedError, FormatError, ModelMismatchError: see `unlock_file`.
        """
        tensors: dict[str, Tensor] = {}
        for part, sealed in self._parts(Path(path), key):
            if part.name != INDEX + SUFFIX:
                tensors |= MemoryWeights(sealed.read_all(key.key("data")))
        return tensors

    def _parts(self, source: Path, key: Secret) -> Iterator[tuple[Path, SealedFile]]:
        self.check_secret(key)
        places = {source: _ROLE}
        if source.is_dir():
            places = roles_of(source.glob(f"*{SUFFIX}"))
            if not set(places.values()) - {"index"}:
                raise FormatError("no sealed weights there", expected=f"files *{SUFFIX}", found=str(source))
        for path, role in places.items():
            with open_sealed(path, model=key.facts["model"], role=role) as sealed:
                yield path, sealed


class SealedModel(nn.Module):
    """A model as `SealedWeights` ships it: ciphertext, and an architecture without weights.

    Args:
        architecture: the model with its tensors on the meta device.
        sealed: the bytes of a `.sealed` file.

    Attributes:
        ciphertext: (bytes,) uint8, the only tensor.
    """

    architecture: nn.Module
    ciphertext: Tensor

    def __init__(self, architecture: nn.Module, sealed: bytes) -> None:
        super().__init__()
        # past nn.Module's registration: the hollow tensors are no weights of this module
        object.__setattr__(self, "architecture", architecture)
        self.register_buffer("ciphertext", torch.frombuffer(bytearray(sealed), dtype=torch.uint8))

    def forward(self, *inputs: object, **options: object) -> Tensor:
        """Refuse.

        Raises:
            WrongKeyError: always.
        """
        raise WrongKeyError("the model is sealed", found="no key", advice="unlock it with the owner's key")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _like(tensor: Tensor, device: torch.device | str) -> Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _check_sealable(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    odd = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]
    known = {id(tensor) for tensor in tensors.values()}
    for path, module in model.named_modules():
        odd += [
            f"{path}.{name}".lstrip(".")
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and id(value) not in known
        ]
    if odd:
        raise UnsupportedError(
            "the model holds tensors that would be shipped in the clear",
            expected="parameters and buffers of real numbers",
            found=odd,
            advice="register them as buffers, complex ones by torch.view_as_real",
        )


@contextlib.contextmanager
def _all_or_none(source: Path, target: Path) -> Iterator[contextlib.ExitStack]:
    if source.resolve() == target.resolve():
        raise ParameterError("source and target are the same", found=str(target))
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as written:
        yield written
        written.pop_all()
