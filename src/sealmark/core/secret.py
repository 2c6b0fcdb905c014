"""The secret of a scheme: a seed, the public facts that it is bound to, and what follows from both.

Anyone can solve for a key that fits a given model after the fact. So nothing in a secret is chosen:
every random part is drawn from a stream that the seed and the facts determine, and the commitment,
which can be published before release, binds both.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from sealmark.core.canonical import canonical_json, sha256_hex
from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.crypto.random import Stream, derive_key

if TYPE_CHECKING:
    from torch import Tensor

SEED_BYTES = 32
_COMMITMENT = b"sealmark/commitment/v1\0"
_STREAM = b"sealmark/stream/v1\0"
_T = TypeVar("_T")


class Secret:
    """A scheme's secret, or a lock's key. Immutable; it cannot be printed or pickled.

    Args:
        seed: 32 bytes; all randomness of the secret comes from it.
        facts: plain JSON: ``scheme``, ``parameters``, ``owner`` (public key, hexadecimal, may be
            empty), ``model`` (digest of the model that it was made for), ``host`` (what the scheme
            needs to know of that model), ``tensors`` (digests of the tensors), ``learned`` (digests of
            those that embedding added, see `with_learned`; they change the commitment and no stream).
        tensors: what cannot be derived (an owner's images, a record of positions).
        created: ISO 8601 time, for people; it proves nothing and is not committed.

    Raises:
        ParameterError: the seed has not 32 bytes, or the facts are not plain JSON.

    Example:
        >>> secret = Secret(bytes(32), {"scheme": "example"})
        >>> secret
        Secret(example, commitment=773534a37ee5...)
        >>> secret.stream("labels").integers(3, 10).tolist()
        [1, 4, 9]
    """

    __slots__ = ("_facts", "_memo", "_salt", "_seed", "created", "tensors")

    def __init__(
        self,
        seed: bytes,
        facts: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        created: str = "",
    ) -> None:
        if len(seed) != SEED_BYTES:
            raise ParameterError("bad seed", expected="32 bytes", found=f"{len(seed)} bytes")
        try:
            self._facts = canonical_json(dict(facts))
        except (TypeError, ValueError) as error:
            raise ParameterError("facts are not plain JSON", found=error) from None
        if not all(isinstance(facts.get(name, {}), Mapping) for name in ("host", "parameters")):
            raise ParameterError("bad facts", expected="objects under 'host' and 'parameters'")
        self._seed = bytes(seed)
        drawn = {name: fact for name, fact in facts.items() if name != "learned"}
        self._salt = bytes.fromhex(sha256_hex(canonical_json(drawn)))
        self._memo: dict[object, Any] = {}
        self.tensors: Mapping[str, Tensor] = MappingProxyType(dict(tensors or {}))
        self.created = created

    @property
    def facts(self) -> dict[str, Any]:
        """A copy of the public facts."""
        facts: dict[str, Any] = json.loads(self._facts)
        return facts

    @property
    def scheme(self) -> str:
        """The public name of the scheme that it belongs to."""
        return str(self.facts.get("scheme", ""))

    @property
    def host(self) -> dict[str, Any]:
        """What the scheme noted of the model when the secret was made.

        A fact that is asked for and missing raises ForgedSecretError: the scheme did not make this secret.
        """
        return _Host(self.facts.get("host", {}))

    @property
    def commitment(self) -> str:
        """SHA-256 over the seed and the facts: binding, hiding, safe to publish."""
        return sha256_hex(_COMMITMENT, self._seed, self._facts)

    def stream(self, label: str) -> Stream:
        """The keyed stream of one purpose; another label, seed or fact gives another stream."""
        return Stream(self.key(label))

    def key(self, label: str) -> bytes:
        """32 bytes for one purpose, by HKDF over seed, facts and label."""
        return derive_key(self._seed, salt=self._salt, info=_STREAM + label.encode())

    def memo(self, name: object, make: Callable[[], _T]) -> _T:
        """Compute once what follows from the secret, and keep it as long as the secret lives."""
        if name not in self._memo:
            self._memo[name] = make()
        value: _T = self._memo[name]
        return value

    def with_learned(self, learned: Mapping[str, Tensor]) -> Secret:
        """The same secret with what embedding learned beside the model, such as an extractor.

        Streams stay as they are; the commitment is another, to be published before release. What is
        learned can be learned after the fact for any model, so it proves nothing without that.
        """
        tensors = {name: tensor.detach().to("cpu").clone() for name, tensor in learned.items()}
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in self.facts.get("learned", {})}
        return Secret(self._seed, self.facts | {"learned": digests}, {**kept, **tensors}, created=self.created)

    def check(self, commitment: str | None = None) -> None:
        """Refuse a secret whose tensors or commitment are not the ones that it claims.

        Args:
            commitment: the one that the owner published before release, if the caller has it.

        Raises:
            ForgedSecretError: a tensor is not the committed one, or the commitment is another.
        """
        claimed: dict[str, str] = {}
        for part in (self.facts.get("tensors", {}), self.facts.get("learned", {})):
            if not isinstance(part, dict) or not all(isinstance(value, str) for value in part.values()):
                raise ForgedSecretError("the secret's facts are malformed", expected="digests of tensors")
            if claimed.keys() & part.keys():  # else what streams depend on could be exchanged afterwards
                raise ForgedSecretError("a committed tensor was learned again", found=sorted(claimed.keys() & part))
            claimed |= part
        found = {name: tensor_digest(tensor) for name, tensor in self.tensors.items()}
        if claimed != found:
            different = sorted(k for k in {**claimed, **found} if claimed.get(k) != found.get(k))
            raise ForgedSecretError(
                "the secret's tensors are not the committed ones", found=f"differences in {different}"
            )
        if commitment is not None and not _equal(commitment, self.commitment):
            raise ForgedSecretError(
                "the secret does not open the commitment",
                expected=commitment,
                found=self.commitment,
                advice="use the secret whose commitment was published before release",
            )

    def reveal_seed(self) -> bytes:
        """The seed itself: for writing the secret to disk and for nothing else."""
        return self._seed

    def __repr__(self) -> str:
        return f"Secret({self.scheme}, commitment={self.commitment[:12]}...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and _equal(self.commitment, other.commitment)

    def __hash__(self) -> int:
        return hash(self.commitment)

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __copy__(self) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError(
            "a secret cannot be pickled", advice="write it with sealmark.formats.secret.write_secret"
        )


def _equal(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


class _Host(dict[str, Any]):
    def __missing__(self, name: str) -> NoReturn:
        raise ForgedSecretError("the secret's facts are incomplete", expected=f"a fact {name!r}", found=list(self))


def draw_seed(rng: np.random.Generator | None = None) -> bytes:
    """32 bytes for a new secret: from the operating system, or from ``rng`` where a test needs it."""
    return secrets.token_bytes(SEED_BYTES) if rng is None else rng.bytes(SEED_BYTES)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and little-endian bytes of a tensor, on any device."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    header = canonical_json([str(flat.dtype).removeprefix("torch."), list(tensor.shape)])
    return sha256_hex(header, b"\0", flat.view(torch.uint8).numpy().data)
