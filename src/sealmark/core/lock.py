"""May this person use it? Locks: the model as shipped is useless without its key."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from sealmark.core.errors import WrongKeyError
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
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


@dataclass(frozen=True)
class Locked:
    """A model as it is shipped, and the key that opens it.

    Attributes:
        model: holds no byte of the key.
        key: for licensed users only.
    """

    model: nn.Module
    key: Secret


class Lock(Scheme):
    """Authorization control. A wrong key never crashes: it gives a useless model, or a refusal."""

    @abstractmethod
    def lock(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Locked:
        """A locked copy of ``model`` and its key.

        Args:
            model: left as it is.
            task: data, for locks that train.
            owner: the owner's public key, bound into the key.
            rng: for tests; the operating system's randomness by default.
        """

    @abstractmethod
    def unlock(self, model: nn.Module, key: Secret) -> nn.Module:
        """A usable copy of a locked model.

        Raises:
            ParameterError: the key belongs to another scheme.
            WrongKeyError: from locks whose card says ``refuses_wrong_key``.
        """

    @abstractmethod
    def lock_file(
        self,
        source: Path | str,
        target: Path | str,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Secret:
        """Write a locked copy of a weight file or sharded folder; the key is returned.

        Raises:
            ParameterError: the source is missing, or is the target.
            FormatError: the source is not sound safetensors.
            ServiceError: the disk is full; nothing is left behind.
        """

    @abstractmethod
    def unlock_file(
        self,
        source: Path | str,
        target: Path | str,
        key: Secret,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Write an unlocked copy of a locked file.

        Raises:
            WrongKeyError: the result would not be the model that was locked; nothing is written.
        """


class WeightLock(Lock):
    """A lock that changes weights tensor by tensor, with no data: write `locker` and `unlocker`."""

    def bind(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the key must note of the model (plain JSON), and what it must hold as tensors.

        Raises:
            UnsupportedError: this lock would do nothing to such a model.
        """
        return {}, {}

    @abstractmethod
    def locker(self, key: Secret) -> TensorMap:
        """The change from a plain tensor to the locked one."""

    @abstractmethod
    def unlocker(self, key: Secret) -> TensorMap:
        """Its inverse."""

    def keygen(self, weights: Weights, *, owner: str = "", rng: np.random.Generator | None = None) -> Secret:
        """A fresh key for a model with these weights."""
        host, tensors = self.bind(weights)
        return self.new_secret(weights, host=host, tensors=tensors, owner=owner, rng=rng)

    def lock(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Locked:
        """See `Lock.lock`."""
        key = self.keygen(weights_of(model), owner=owner, rng=rng)
        return Locked(rewrite_model(model, self.locker(key)), key)

    def unlock(self, model: nn.Module, key: Secret) -> nn.Module:
        """See `Lock.unlock`."""
        self.check_secret(key)
        return rewrite_model(model, self.unlocker(key))

    def lock_file(
        self,
        source: Path | str,
        target: Path | str,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Secret:
        """See `Lock.lock_file`."""
        key = self.keygen(weights_of(source), owner=owner, rng=rng)
        rewrite_file(source, target, self.locker(key), progress=progress)
        return key

    def unlock_file(
        self,
        source: Path | str,
        target: Path | str,
        key: Secret,
        *,
        progress: Progress | None = None,
    ) -> None:
        """See `Lock.unlock_file`."""
        self.check_secret(key)
        unlocker = self.unlocker(key)
        if MappedWeights(weights_of(source), unlocker).digest() != key.facts["model"]:
            raise WrongKeyError(
                "this key does not open this file",
                expected=f"a file locked with the key {key.commitment[:12]}",
                advice="check that file and key belong together and that the file is unchanged",
            )
        rewrite_file(source, target, unlocker, progress=progress)
