"""Is this suspect mine? Watermarks change the model, fingerprints leave it as it is."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
from torch import Tensor, nn

from sealmark.core.errors import ForgedSecretError, MarkFailedError, ParameterError
from sealmark.core.evidence import DEFAULT_ALPHA, Evidence, Score, check_alpha, judge
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import Extra, OnEpoch, Term, train
from sealmark.core.weights import weights_of


class Verifiable(Scheme):
    """A scheme that answers "is this suspect mine?". A subclass writes `score`, never a threshold.

    Attributes:
        access: what `score` touches.
    """

    access: ClassVar[Access]

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Every random part of the secret, from its seed and facts alone, by name.

        `verify` refuses a secret that brings such a part along among its tensors: a paper's key is its
        projection matrix, and anyone can solve for one that fits.
        """
        return {}

    @abstractmethod
    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """A statistic of the suspect, and its law on models made without the secret."""

    @final
    def verify(
        self,
        suspect: Suspect,
        secret: Secret,
        *,
        alpha: float = DEFAULT_ALPHA,
        tries: float = 1,
        commitment: str | None = None,
    ) -> Evidence:
        """Is this suspect mine?

        Args:
            suspect: is not changed.
            secret: must re-derive.
            alpha: largest accepted probability of a MATCH on a model made without the secret.
            tries: hypotheses searched; ``2**64`` allows for a claimant who ground that many seeds.
            commitment: the one published before release; a secret that does not open it is refused.

        Returns:
            A verdict with its p-value and what it rests on.

        Raises:
            AccessError: the suspect does not show what the scheme reads.
            ParameterError: the secret belongs to another scheme; alpha or tries mean nothing.
            ForgedSecretError: the secret does not re-derive, or does not open the commitment.
            ModelMismatchError: the suspect's form does not fit what the scheme reads.
        """
        check_alpha(alpha, tries)
        suspect.require(self.access)
        self.check_secret(secret, commitment)
        carried = self.derive(secret).keys() & secret.tensors.keys() if secret.tensors else set()
        if carried:
            raise ForgedSecretError(
                f"the secret brings its own {' and '.join(sorted(carried))}", expected="what follows from its seed"
            )
        before = suspect.queries
        score = self.score(suspect, secret)
        return judge(
            score,
            alpha=alpha,
            tries=tries,
            scheme=self.name,
            commitment=secret.commitment,
            queries=suspect.queries - before,
        )


class Watermark(Verifiable):
    """Ownership by changing the model: a loss term, rows trained on beside the batch, or both.

    Attributes:
        carries_payload: whether `keygen` takes a message.
        choices: names of what an owner may choose himself.
    """

    carries_payload: ClassVar[bool] = False
    choices: ClassVar[frozenset[str]] = frozenset()

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the secret must note of the model (plain JSON), and what it must hold as tensors."""
        return {}, {}

    @final
    def keygen(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        payload: bytes = b"",
        chosen: Mapping[str, Tensor] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """A fresh secret for marking ``model``.

        Args:
            model: the model to be marked; only looked at.
            task: what it is for, where the scheme must know (number of classes, shape of inputs).
            owner: the owner's public key, bound into the secret.
            payload: a message to carry, for multi-bit schemes.
            chosen: what the owner chooses himself instead of having it derived, by name, where the
                scheme has such a mode; it is committed before anything is drawn.
            rng: for tests; the operating system's randomness by default.

        Raises:
            ParameterError: the scheme does not fit the model, the task or the payload.
        """
        if payload and not self.carries_payload:
            raise ParameterError(f"{self.name} carries no payload", expected="none", found=f"{len(payload)} bytes")
        given = dict(chosen or {})
        if given.keys() - self.choices:
            raise ParameterError(
                f"{self.name} derives what you chose", expected=sorted(self.choices), found=sorted(given)
            )
        host, tensors = self.bind(model, task, given)
        secret = self.new_secret(
            weights_of(model), host=host, tensors=tensors, owner=owner, payload=payload, rng=rng
        )
        self.derive(secret)  # a secret that cannot be used is refused here, not after hours of training
        return secret

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """A scalar that is added to the task's loss at each step."""
        return batch.inputs.new_zeros(())

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        """Rows to train on beside ``batch``."""
        return batch.take(slice(0, 0))

    def terms(self, secret: Secret) -> list[Term]:
        """`loss` in the training loop's form; empty where the scheme has none."""
        plain = type(self).loss is Watermark.loss
        return [] if plain else [lambda model, batch: self.loss(model, secret, batch)]

    def extras(self, secret: Secret) -> list[Extra]:
        """`extra` in the training loop's form; empty where the scheme has none."""
        plain = type(self).extra is Watermark.extra
        return [] if plain else [lambda batch, rng: self.extra(secret, batch, rng)]

    def embed(
        self,
        model: nn.Module,
        secret: Secret,
        task: Task,
        *,
        rng: np.random.Generator,
        recipe: Recipe | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> nn.Module:
        """A marked copy: of an untrained model from scratch, of a trained one by fine-tuning.

        Args:
            model: left as it is; the copy is trained on its device.
            secret: of `keygen`.
            task: the owner's rows and loss.
            rng: order of rows and the like.
            recipe: how to train; the task's by default.
            on_epoch: progress.

        Raises:
            MarkFailedError: the mark cannot be read back at the default level.
        """
        return embed_all([(self, secret)], model, task, rng=rng, recipe=recipe, on_epoch=on_epoch)

    @final
    def check_embedded(self, model: nn.Module, secret: Secret) -> None:
        """Refuse a model from which the mark cannot be read back, at the default level or as far as it goes.

        Raises:
            MarkFailedError: it cannot.
        """
        score = self.score(WhiteBox(model), secret)
        # a mark too short for the level can still be whole; verify then says INCONCLUSIVE
        if score.null.log_p(score.statistic) > max(math.log(DEFAULT_ALPHA), score.null.floor + 1e-9):
            raise MarkFailedError(
                f"{self.name}: the mark did not take",
                expected=f"p <= {DEFAULT_ALPHA:g}",
                found=dict(score.details),
                advice="raise the strength, train longer, or choose a larger host",
            )


def embed_all(
    marks: list[tuple[Watermark, Secret]],
    model: nn.Module,
    task: Task,
    *,
    rng: np.random.Generator,
    recipe: Recipe | None = None,
    on_epoch: OnEpoch | None = None,
) -> nn.Module:
    """A copy of ``model`` that carries several watermarks, trained in one run; see `Watermark.embed`."""
    for scheme, secret in marks:
        scheme.check_secret(secret)
    marked = copy.deepcopy(model)
    train(
        marked,
        task.owner,
        loss=task.loss,
        recipe=recipe or task.recipe,
        rng=rng,
        terms=[term for scheme, secret in marks for term in scheme.terms(secret)],
        extras=[extra for scheme, secret in marks for extra in scheme.extras(secret)],
        on_epoch=on_epoch,
    )
    for scheme, secret in marks:
        scheme.check_embedded(marked, secret)
    return marked


class Fingerprint(Verifiable):
    """Ownership without changing the model: the secret records how the model behaves."""

    @abstractmethod
    def enroll(
        self,
        model: nn.Module,
        task: Task,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """A secret that records the model; `Scheme.new_secret` makes it."""
