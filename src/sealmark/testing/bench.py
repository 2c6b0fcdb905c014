"""What the checks share: a task, a plain model, null models, and what a scheme makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.credentials import Credential, CredentialMark, Enrolled
from sealmark.core.errors import PolicyError, UnsupportedError
from sealmark.core.identity import UserMark
from sealmark.core.integrity import Seal
from sealmark.core.lock import Lock
from sealmark.core.ownership import Fingerprint, Watermark
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights

_T = TypeVar("_T")
USERS = ("alice", "bob", "carol", "dave", "erin")


class Bench:
    """A workbench: everything on it is made once, from fixed seeds, when first asked for.

    Args:
        task: the digits by default.
    """

    def __init__(self, task: Task | None = None) -> None:
        self.task = task or registry.task("digits")
        self._made: dict[object, object] = {}

    def make(self, name: object, maker: Callable[[], _T]) -> _T:
        """The thing of that name, made at the first call."""
        if name not in self._made:
            self._made[name] = maker()
        return self._made[name]  # type: ignore[return-value]

    @cached_property
    def plain(self) -> nn.Module:
        """The unprotected model that everything is compared with."""
        return self.twin(0)

    @cached_property
    def strangers(self) -> list[nn.Module]:
        """Independent models: other seeds, other rows, short and long training."""
        recipes = [(1, self.task.owner), (3, self.task.owner), (3, self.task.attacker), (8, self.task.attacker)]
        return [
            train_task(
                self.task,
                rng=np.random.default_rng(100 + seed),
                rows=rows,
                recipe=Recipe(epochs, self.task.recipe.batch_size, self.task.recipe.rate),
            )
            for seed, (epochs, rows) in enumerate(recipes)
        ]

    @cached_property
    def references(self) -> list[nn.Module]:
        """Independent models for schemes that learn their law; none of them is a stranger or a twin.

        Four epochs at twice the rate come near to those of a full training in what they answer.
        """
        own = self.task.recipe
        recipe = Recipe(4, own.batch_size, 2 * own.rate, clip=own.clip)
        seeds = range(300, 320)
        return [train_task(self.task, rng=np.random.default_rng(seed), recipe=recipe) for seed in seeds]

    def of(self, scheme: Scheme) -> Bench:
        """The workbench of the task that the scheme's card names; this one where it is the same."""
        name = scheme.card.task
        return self if name == self.task.name else self.make(("task", name), lambda: Bench(registry.task(name)))

    @cached_property
    def judges(self) -> Batch:
        """Rows that neither model nor mark has seen: the test rows and the attacker's."""
        return self.task.test.join(self.task.attacker)

    def accuracy(self, model: nn.Module) -> float:
        """The metric on `judges`; chance for a model that refuses to work or answers NaN."""
        try:
            return self.task.score(model, self.judges)
        except PolicyError:
            return self.task.chance

    def protect(self, scheme: Scheme) -> tuple[nn.Module, Secret]:
        """What the scheme makes of the model, and the scheme's secret (a lock's key, a seal's record).

        A watermark is trained in from scratch; of a user mark it is the copy of ``USERS[0]``.
        """
        return self.make(scheme, lambda: self._protect(scheme))

    def secret(self, scheme: Watermark) -> Secret:
        """A secret that verifies, without the marked model where embedding teaches the secret nothing."""
        if type(scheme).embedding is not Watermark.embedding:
            return self.protect(scheme)[1]
        start = self.plain if scheme.card.needs_trained else self.task.model(np.random.default_rng(0))
        return self.make(("secret", scheme), lambda: scheme.keygen(start, self.task, rng=np.random.default_rng(1)))

    def enrolled(self, scheme: CredentialMark) -> Enrolled:
        """The plain model as it is served to users with credentials, and the owner's secret."""
        return Enrolled(*self.protect(scheme))

    def credential(self, scheme: CredentialMark, user: str) -> Credential:
        """One user's."""
        model, secret = self.protect(scheme)
        return self.make((scheme, user), lambda: scheme.issue(model, secret, user, task=self.task))

    def locked(self, scheme: Lock) -> tuple[nn.Module, Secret]:
        """The plain model as the lock ships it, and the key; also of a scheme that is a watermark as well."""

        def lock() -> tuple[nn.Module, Secret]:
            made = scheme.lock(self.plain, self.task, rng=np.random.default_rng(1))
            return made.model, made.key

        return self.make(("locked", scheme), lock)

    def embed(self, scheme: Watermark, seed: int) -> tuple[nn.Module, Secret]:
        """The scheme's mark, trained in from the start of `twin` in the same order, or into `twin` itself.

        The second where the card says that the scheme marks trained models.
        """
        rng = np.random.default_rng(seed)
        start = self.twin(seed) if scheme.card.needs_trained else self.task.model(rng)
        secret = scheme.keygen(start, self.task, rng=np.random.default_rng([1, seed]))
        marked = scheme.embed(start, secret, self.task, rng=rng)
        return marked.model, marked.secret

    def twin(self, seed: int) -> nn.Module:
        """An unprotected model, trained as its owner does."""
        return self.make(seed, lambda: train_task(self.task, rng=np.random.default_rng(seed)))

    def _protect(self, scheme: Scheme) -> tuple[nn.Module, Secret]:
        rng = np.random.default_rng(1)
        if isinstance(scheme, Watermark):
            return self.embed(scheme, 0)
        if isinstance(scheme, Fingerprint):
            return self.plain, scheme.enroll(self.plain, self.task, references=self.references, rng=rng)
        if isinstance(scheme, UserMark):
            secret = scheme.enroll(self.plain, self.task, users=users_of(scheme), rng=rng)
            return scheme.issue(self.plain, secret, USERS[0], task=self.task).model, secret
        if isinstance(scheme, CredentialMark):
            enrolled = scheme.enroll(self.plain, self.task, rng=rng)
            return enrolled.model, enrolled.secret
        if isinstance(scheme, Seal):
            sealed = scheme.seal(self.plain, self.task, rng=rng)
            return sealed.model, sealed.secret
        if isinstance(scheme, Lock):
            return self.locked(scheme)
        raise UnsupportedError("a scheme of no known kind", found=type(scheme).__name__)

    def fresh(self, scheme: Scheme, seed: int) -> Secret:
        """Another secret for the same model, by the same scheme with the same parameters.

        Its facts are those of `protect`, its seed is another: a wrong secret of the right form.
        """
        _, secret = self.protect(scheme)
        return Secret(np.random.default_rng(1000 + seed).bytes(32), secret.facts, secret.tensors)


def users_of(scheme: UserMark) -> list[str]:
    """Everyone to whom copies are issued, as many as the scheme has places for; `USERS` come first."""
    return [*USERS, *(f"user{i}" for i in range(200))][: scheme.places]


def state_bytes(model: nn.Module) -> bytes:
    """All tensors of a model, one after the other: to compare bits and to search for secrets."""
    weights = ModelWeights(model)
    return b"".join(
        weights[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in weights
    )


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models agree in every bit of every tensor."""
    return ModelWeights(one).digest() == ModelWeights(other).digest()
