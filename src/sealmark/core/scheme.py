"""The contracts: `Scheme` and its kinds, one for each question that an owner asks.

    Scheme
    ├── Verifiable         is this suspect mine?       verify() is final, a scheme writes score()
    │   ├── Watermark      the model is changed        keygen, loss / extra, embed
    │   └── Fingerprint    the model is untouched      enroll
    ├── Lock               may this person use it?     lock, unlock
    │   └── NeuralLock     opens with any key          derive, open
    │       ├── TrainedLock    the network learns its key      locking
    │       │   └── InputLock  the key changes the inputs      transform
    │       └── LoadLock       opens files too                 unlocker
    │           ├── WeightLock tensor by tensor, no data       locker
    │           └── PatchLock  chosen weights are damaged      choose
    ├── UserMark           whose copy is this?         enroll, issue, trace, authenticate
    │   └── WeightMark     the same on files           marker, suspicion
    ├── CredentialMark     which user asks?            enroll, issue, authenticate, trace
    └── Seal               was it changed?             seal, check, restore
        └── WeightSeal     the same on files           sealer, opener

A scheme is a frozen dataclass: its fields are its hyper-parameters and computing starts with a call.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret, draw_seed, tensor_digest
from sealmark.core.weights import Weights


@dataclass(frozen=True)
class Scheme(ABC):
    """Base of all schemes. The public name is the stem of the file that it stands in."""

    card: ClassVar[Card]

    @property
    def name(self) -> str:
        """The public name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters, as plain JSON."""
        return asdict(self)

    def check_secret(self, secret: Secret, commitment: str | None = None) -> None:
        """Refuse a secret of another scheme, with other parameters, or one that does not re-derive.

        Raises:
            ParameterError: of another scheme, or made with other parameters.
            ForgedSecretError: see `Secret.check`.
        """
        facts = secret.facts
        if facts.get("scheme") != self.name:
            raise ParameterError("secret of another scheme", expected=self.name, found=facts.get("scheme"))
        mine = _plain(self.parameters)
        added = {field.name: field.default for field in fields(self)}  # since the secret was made
        claimed = _plain({k: v for k, v in added.items() if v is not MISSING}) | facts.get("parameters", {})
        if claimed != mine:
            different = {k for k in claimed.keys() | mine.keys() if claimed.get(k) != mine.get(k)}
            raise ParameterError(
                "the secret was made with other parameters",
                expected={k: claimed.get(k) for k in sorted(different)},
                found={k: mine.get(k) for k in sorted(different)},
                advice="create the scheme with the secret's parameters: registry.scheme_of(secret)",
            )
        secret.check(commitment)

    def new_secret(
        self,
        weights: Weights,
        *,
        host: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        owner: str = "",
        payload: bytes = b"",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """A fresh secret that is bound to this scheme, its parameters, an owner and a model.

        Args:
            weights: of the model that it is for.
            host: what the scheme must know of the model; plain JSON, committed.
            tensors: what cannot be derived; committed by digest.
            owner: the owner's public key.
            payload: a message of the owner, for schemes that carry one.
            rng: for tests; the operating system's randomness by default.
        """
        tensors = {k: v.detach().cpu().clone() for k, v in (tensors or {}).items()}
        facts = {
            "scheme": self.name,
            "parameters": _plain(self.parameters),
            "owner": owner,
            "model": weights.digest(),
            "host": dict(host or {}),
            "payload": payload.hex(),
            "tensors": {name: tensor_digest(tensor) for name, tensor in tensors.items()},
        }
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return Secret(draw_seed(rng), facts, tensors, created=now)


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(parameters))  # tuples are lists in JSON, at any depth
    return plain
