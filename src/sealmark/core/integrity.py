"""Was it changed? Seals: a mark that any change destroys, and that comes off without a trace."""

from __future__ import annotations

import hashlib
import hmac
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.errors import TamperedError
from sealmark.core.evidence import Basis, Evidence, Null, Score, judge
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.task import Task
from sealmark.core.weights import (
    MappedWeights,
    Progress,
    TensorMap,
    Weights,
    rewrite_file,
    rewrite_model,
    weights_of,
)

Source = nn.Module | Weights | Path | str
_TAG = 4  # bytes a channel in the record: a changed channel goes unnamed once in 4 billion times
_LISTED = 1000  # channels of a tensor


@dataclass(frozen=True)
class Sealed:
    """A sealed model and the record that checks it."""

    model: nn.Module
    secret: Secret


@dataclass(frozen=True)
class Finding:
    """What a seal says of a suspect.

    Attributes:
        intact: nothing was changed since sealing.
        changed: tensors that were changed, as far as the scheme can say.
        bits: length of the authentication code; a changed model passes with probability 2**-bits.
        channels: of a changed tensor the changed channels, indexes of its first dimension in order, the
            first 1000 of them; tensors that were changed as a whole are left out.
    """

    intact: bool
    changed: tuple[str, ...] = ()
    bits: int = 256
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CodeNull(Null):
    """A changed model agrees with a keyed authentication code of ``bits`` bits with chance 2**-bits."""

    bits: int
    basis = Basis.EXACT

    def __str__(self) -> str:
        return f"agreement with a keyed code of {self.bits} bits"

    def log_p(self, statistic: float) -> float:
        """``-bits`` doublings when all agrees (statistic 1), else 0."""
        return self.floor if statistic >= 1 else 0.0

    @property
    def floor(self) -> float:
        """See `Null.floor`."""
        return -self.bits * math.log(2)


class Seal(Scheme):
    """Integrity: seal a model, tell later whether it was changed, and give the original back."""

    @abstractmethod
    def seal(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Sealed:
        """A sealed copy of ``model``, and the record that checks and opens it.

        Args:
            model: left as it is.
            task: data that tells which weights matter least, for schemes that use it.
            owner: the owner's public key, bound into the record.
            rng: for tests; the operating system's randomness by default.

        Raises:
            UnsupportedError: the model has no place for such a seal.
        """

    @abstractmethod
    def check(self, source: Source, secret: Secret) -> Evidence:
        """Was it changed since it was sealed? MATCH means that every bit is as it was.

        Raises:
            ParameterError: the record belongs to another scheme.
            ForgedSecretError: the record does not hold together.
        """

    @abstractmethod
    def restore(self, model: nn.Module, secret: Secret) -> nn.Module:
        """The original, bit for bit.

        Raises:
            TamperedError: the model was changed since it was sealed.
        """


class WeightSeal(Seal):
    """A seal on the weights, tensor by tensor: write `bind`, `sealer`, `opener` and `read_code`.

    The code is a keyed hash of the whole original. Sealing hides it in the weights; checking takes it
    out, puts the original back, and compares. A digest of each tensor in the record tells where a
    change is; four bytes of a digest of each of its channels tell it to the channel.
    """

    @abstractmethod
    def bind(
        self, weights: Weights, model: nn.Module | None, task: Task | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Where the code shall go: plain JSON facts, and tensors, for the record.

        Raises:
            UnsupportedError: the weights have too little room for the code.
        """

    @abstractmethod
    def sealer(self, secret: Secret, code: bytes) -> TensorMap:
        """The change that hides ``code`` in the original's tensors."""

    @abstractmethod
    def opener(self, secret: Secret) -> TensorMap:
        """The change back; on a sealed tensor it gives the original's bits."""

    @abstractmethod
    def read_code(self, weights: Weights, secret: Secret) -> bytes:
        """The code that sealed weights hold; anything when they were changed."""

    @final
    def record(
        self,
        source: Source,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """The record for sealing ``source``: the first step of `seal` and `seal_file`."""
        weights = weights_of(source)
        host, tensors = self.bind(weights, source if isinstance(source, nn.Module) else None, task)
        digests: dict[str, str] = {}
        for name in weights:
            digests[name], tags = _recorded(weights[name])
            if tags is not None:
                tensors[f"channels/{name}"] = tags
        host["digests"] = digests
        return self.new_secret(weights, host=host, tensors=tensors, owner=owner, rng=rng)

    @final
    def seal(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Sealed:
        """See `Seal.seal`."""
        secret = self.record(model, task, owner=owner, rng=rng)
        return Sealed(rewrite_model(model, self._sealer(weights_of(model), secret)), secret)

    @final
    def seal_file(
        self,
        source: Path | str,
        target: Path | str,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Secret:
        """Write a sealed copy of a weight file or sharded folder, streaming; see `seal`."""
        secret = self.record(source, owner=owner, rng=rng)
        rewrite_file(source, target, self._sealer(weights_of(source), secret), progress=progress)
        return secret

    @final
    def check(self, source: Source, secret: Secret) -> Evidence:
        """Was it changed since it was sealed? MATCH means that every bit is as it was.

        Raises:
            ParameterError: the record belongs to another scheme.
            ForgedSecretError: the record does not re-derive.
        """
        self.check_secret(secret)
        finding = self._find(weights_of(source), secret)
        channels = {name: list(places) for name, places in finding.channels.items()}
        details = {"changed": list(finding.changed), "channels": channels}
        return judge(
            Score(float(finding.intact), CodeNull(finding.bits), details),
            scheme=self.name,
            commitment=secret.commitment,
        )

    @final
    def restore(self, model: nn.Module, secret: Secret) -> nn.Module:
        """The original, bit for bit.

        Raises:
            TamperedError: the model was changed since it was sealed.
        """
        self._check_intact(weights_of(model), secret)
        return rewrite_model(model, self.opener(secret))

    @final
    def restore_file(
        self, source: Path | str, target: Path | str, secret: Secret, *, progress: Progress | None = None
    ) -> None:
        """Write the original of a sealed weight file or sharded folder; see `restore`."""
        self._check_intact(weights_of(source), secret)
        rewrite_file(source, target, self.opener(secret), progress=progress)

    def _sealer(self, weights: Weights, secret: Secret) -> TensorMap:
        return self.sealer(secret, self._code(weights.digest(), secret))

    def _code(self, digest: str, secret: Secret) -> bytes:
        return hmac.digest(secret.key("code"), digest.encode(), "sha256")

    def _check_intact(self, weights: Weights, secret: Secret) -> None:
        self.check_secret(secret)
        finding = self._find(weights, secret)
        if not finding.intact:
            raise TamperedError(
                "the model was changed since it was sealed",
                found=f"changes in {list(finding.changed)}",
                advice="get an unchanged copy; what was changed cannot be restored",
            )

    def _find(self, weights: Weights, secret: Secret) -> Finding:
        recorded: dict[str, str] = secret.host["digests"]
        opened = MappedWeights(weights, self.opener(secret))
        changed, channels = recorded.keys() ^ set(opened), dict[str, tuple[int, ...]]()
        for name in sorted(recorded.keys() & set(opened)):
            places = _changes(opened[name], recorded[name], secret.tensors.get(f"channels/{name}"))
            if places is not None:
                changed.add(name)
                channels |= {name: places} if places else {}
        if changed:
            return Finding(False, tuple(sorted(changed)), channels=channels)
        intact = hmac.compare_digest(self.read_code(weights, secret), self._code(opened.digest(), secret))
        return Finding(intact, () if intact else ("the code",))


def _recorded(tensor: Tensor) -> tuple[str, Tensor | None]:
    """What the record keeps of a tensor: its digest, and the tags of its channels where it has some."""
    return tensor_digest(tensor), _channel_tags(tensor) if tensor.dim() >= 2 else None


def _channel_tags(tensor: Tensor) -> Tensor:
    """The first bytes of each channel's SHA-256: (channels, 4) uint8."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
    count, width = len(tensor), len(data) // max(1, len(tensor))
    tags = b"".join(hashlib.sha256(data[i * width : (i + 1) * width]).digest()[:_TAG] for i in range(count))
    return torch.tensor(bytearray(tags), dtype=torch.uint8).reshape(count, _TAG)


def _changes(tensor: Tensor, digest: str, tags: Tensor | None) -> tuple[int, ...] | None:
    """Which channels of a tensor differ from the record: None where nothing does, () where all or unknown."""
    if tensor_digest(tensor) == digest:
        return None
    if tags is None or tensor.dim() < 2 or len(tensor) != len(tags):
        return ()
    differ = (_channel_tags(tensor) != tags).any(1)
    return () if bool(differ.all()) else tuple(differ.nonzero().squeeze(1).tolist()[:_LISTED])
