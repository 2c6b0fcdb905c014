"""Is this suspect mine? Watermarks change the model, fingerprints leave it as it is."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.embedding import Embedding, Marked
from sealmark.core.errors import ForgedSecretError, MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, AlignedNull, Evidence, Null, Score, check_alpha, judge
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox, aligned
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import OnEpoch, train
from sealmark.core.weights import TensorMap, Weights, weights_of


class Verifiable(Scheme):
    """A scheme that answers "is this suspect mine?". A subclass writes `score`, never a threshold.

    Attributes:
        access: what `score` touches.
        has_key: whether another secret for the same model reads something else. Fingerprints of lineage keep
            nothing secret: whoever has the original can verify.
    """

    access: ClassVar[Access]
    has_key: ClassVar[bool] = True

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Every random part of the secret, from its seed and facts alone, by name.

        A secret that brings such a part along among its tensors is refused: a paper's key is its projection
        matrix, and anyone can solve for one that fits.
        """
        return {}

    @final
    def derive_on(self, secret: Secret, device: torch.device) -> dict[str, Tensor]:
        """What `derive` gives, moved to a device once and kept there, for losses."""
        return secret.memo(
            (self.name, device), lambda: {name: part.to(device) for name, part in self.derive(secret).items()}
        )

    def parts(self, secret: Secret) -> dict[str, Tensor]:
        """What `score` reads by: the derived parts, or what the secret brings along instead of them.

        So a forged secret fits as it would in the paper, and nothing but `check_secret` refuses it.
        """
        derived = self.derive(secret)
        return derived | {name: secret.tensors[name] for name in derived.keys() & secret.tensors.keys()}

    def check_secret(self, secret: Secret, commitment: str | None = None) -> None:
        """Refuse also a secret that brings a derived part along; see `Scheme.check_secret`."""
        super().check_secret(secret, commitment)
        carried = self.derive(secret).keys() & secret.tensors.keys() if secret.tensors else set()
        if carried:
            raise ForgedSecretError(
                f"the secret brings its own {' and '.join(sorted(carried))}", expected="what follows from its seed"
            )

    def blind(self, secret: Secret) -> TensorMap | None:
        """For aligning a suspect to a marked original: each tensor without what `score` reads of it.

        Alignment then decides by what is left, so that it cannot bend an innocent model towards the mark.
        It gets tensors in the original's form and must not change them in place. None, the default, says
        that nothing can be told apart: such a mark is verified against the model as it was before marking.
        """
        return None

    @abstractmethod
    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """A statistic of the suspect, and its law on models made without the secret."""

    def score_in_turn(self, suspect: Suspect, secret: Secret, enough: float) -> Score:
        """The same with as few queries as it takes, by a law that allows for stopping at will.

        Args:
            suspect: is asked one trigger after the other, in an order that the secret fixes.
            secret: as for `score`.
            enough: natural logarithm of the p-value at which the verdict is sure.

        Raises:
            UnsupportedError: the scheme asks for everything at once.
        """
        raise UnsupportedError(f"{self.name} cannot ask in turn", expected="a scheme with a trigger set")

    @final
    def verify(
        self,
        suspect: Suspect,
        secret: Secret,
        *,
        alpha: float = DEFAULT_ALPHA,
        tries: float = 1,
        commitment: str | None = None,
        original: nn.Module | None = None,
        population: Null | None = None,
        sequential: bool = False,
    ) -> Evidence:
        """Is this suspect mine?

        Args:
            suspect: is not changed.
            secret: must re-derive.
            alpha: largest accepted probability of a MATCH on a model made without the secret.
            tries: hypotheses searched; ``2**64`` allows for a claimant who ground that many seeds.
            commitment: the one published before release; a secret that does not open it is refused.
            original: the owner's own model. The suspect's hidden units are put back into its order, scale
                and sign first, since a thief can change those at no cost. Against the model for which the
                secret was made the law stays exact; against a marked one see `Basis.ALIGNED`.
            population: a judge's own law instead of the scheme's, see `sealmark.stats.populations`.
            sequential: put one trigger after the other and stop as soon as the verdict is sure. The p-value
                holds at any stopping time. For schemes with a trigger set.

        Returns:
            A verdict with its p-value and what it rests on.

        Raises:
            AccessError: the suspect does not show what the scheme reads.
            ParameterError: the secret belongs to another scheme; alpha or tries mean nothing; an original
                that this scheme cannot use.
            ForgedSecretError: the secret does not re-derive, or does not open the commitment.
            ModelMismatchError: the suspect's form does not fit what the scheme reads.
            UnsupportedError: the original's structure cannot be read; the scheme cannot ask in turn.
            BudgetError: the suspect may not be asked as often as it takes.
        """
        check_alpha(alpha, tries)
        if sequential and (original is not None or population is not None):
            raise ParameterError("asking in turn has a law of its own", expected="no original and no population")
        if original is None:  # one that is aligned lends its architecture to the suspect's weights
            suspect.require(self.access)
        self.check_secret(secret, commitment)
        before = suspect.queries
        if sequential:
            score = self.score_in_turn(suspect, secret, math.log(alpha) - math.log(tries))
        elif original is None:
            score = self.score(suspect, secret)
        else:
            score = self._score_aligned(suspect, secret, original)
        return judge(
            score if population is None else Score(score.statistic, population, score.details),
            alpha=alpha,
            tries=tries,
            scheme=self.name,
            commitment=secret.commitment,
            queries=suspect.queries - before,
        )

    def _score_aligned(self, suspect: Suspect, secret: Secret, original: nn.Module) -> Score:
        if not self.access & (Access.WEIGHTS | Access.MODULE):
            raise ParameterError(
                f"{self.name} reads answers and needs no alignment", expected="no original", found="one"
            )
        unmarked = weights_of(original).digest() == secret.facts.get("model")
        blind = self.blind(secret)  # also against the unmarked original, where what the mark moved is noise
        if not unmarked and blind is None:
            raise ParameterError(
                f"{self.name} cannot be aligned to this original",
                expected=f"the model that the secret was made for, digest {str(secret.facts.get('model'))[:16]}",
                found=weights_of(original).digest()[:16],
                advice="pass the model as it was before it was marked",
            )
        found, suspect = aligned(suspect, original, blind)
        score = self.score(suspect, secret)
        null = score.null if unmarked else AlignedNull(score.null)
        return Score(score.statistic, null, {**score.details, "alignment": found})


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
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the secret must note of the model (plain JSON), and what it must hold as tensors.

        What ``rng`` decides here, such as the rows that become triggers, is fixed before the seed is drawn:
        streams depend on it, and so labels are random given it.
        """
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
        host, tensors = self.bind(model, task, given, np.random.default_rng() if rng is None else rng)
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

    def lesson(self, model: nn.Module, secret: Secret, task: Task) -> Task:
        """The task to embed by: as it is, without some rows, or with targets that ``model`` made before marking."""
        return task

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """One run: `loss` and `extra` by default; see `Embedding` for schemes that do more.

        Args:
            model: about to be trained; may be rebuilt in place.
            secret: of `keygen`.
            task: the owner's; None in the user's own loop.
            rng: for what is drawn once.
        """
        return Embedding(self, secret)

    def embed(
        self,
        model: nn.Module,
        secret: Secret,
        task: Task,
        *,
        rng: np.random.Generator,
        recipe: Recipe | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Marked:
        """A marked copy: of an untrained model from scratch, of a trained one by fine-tuning.

        Args:
            model: left as it is; the copy is trained on its device.
            secret: of `keygen`.
            task: the owner's rows and loss.
            rng: order of rows and the like.
            recipe: how to train; the task's by default.
            on_epoch: progress.

        Returns:
            The copy, and the secret to keep: it holds what was learned beside the model, if anything was.

        Raises:
            MarkFailedError: the mark cannot be read back at the default level.
        """
        marked, secrets = embed_all([(self, secret)], model, task, rng=rng, recipe=recipe, on_epoch=on_epoch)
        return Marked(marked, secrets[0])

    @final
    def check_embedded(self, model: nn.Module, secret: Secret) -> None:
        """Refuse a model from which the mark cannot be read back, at the default level or as far as it goes.

        Raises:
            MarkFailedError: it cannot.
            ForgedSecretError: the secret does not re-derive.
        """
        self.check_secret(secret)
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
) -> tuple[nn.Module, list[Secret]]:
    """A copy of ``model`` with several watermarks, trained in one run, and their secrets; see `Watermark.embed`."""
    for scheme, secret in marks:
        scheme.check_secret(secret)
        task = scheme.lesson(model, secret, task)
    marked = copy.deepcopy(model)
    runs = [scheme.embedding(marked, secret, task, rng) for scheme, secret in marks]
    train(
        marked,
        task.owner,
        loss=task.loss,
        recipe=recipe or task.recipe,
        rng=rng,
        terms=[term for run in runs for term in run.terms],
        extras=[extra for run in runs for extra in run.extras],
        augment=task.augment,
        on_epoch=on_epoch,
    )
    secrets = [run.finish(marked) for run in reversed(runs)][::-1]
    for (scheme, _), secret in zip(marks, secrets, strict=True):
        scheme.check_embedded(marked, secret)
    return marked, secrets


class Fingerprint(Verifiable):
    """Ownership without changing the model: the secret records what the model is or how it behaves."""

    @abstractmethod
    def enroll(
        self,
        model: nn.Module | Weights | Path | str,
        task: Task | None = None,
        *,
        references: Sequence[nn.Module | Weights | Path | str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """A secret that records the model; `Scheme.new_secret` makes it.

        Args:
            model: left as it is.
            task: what it is for, where the scheme must ask it.
            references: models that have nothing to do with it, the more the better: a law that is not
                exact is learned from them.
            owner: the owner's public key, bound into the secret.
            rng: for tests; the operating system's randomness by default.

        Raises:
            ParameterError: the scheme needs a live model, a task or references, and got none.
        """
