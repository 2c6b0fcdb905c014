"""Which user is this, and who leaked it? Every user's copy carries a mark of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import DEFAULT_ALPHA, Basis, Evidence, Null, Score, Verdict, check_alpha, judge
from sealmark.core.leak import recover
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Task
from sealmark.core.weights import Progress, TensorMap, Weights, rewrite_file, rewrite_model, weights_of

_RANKED = 20


@dataclass(frozen=True)
class Issued:
    """A user's copy.

    Attributes:
        user: whose.
        model: the marked copy.
    """

    user: str
    model: nn.Module


@dataclass(frozen=True)
class Suspicion:
    """How much each user's mark shows in a suspect.

    Attributes:
        statistics: (U,) float64, one a user, in the order asked for.
        null: the law of one innocent user's statistic, whatever the suspect is.
        details: figures for the reader; plain JSON.
    """

    statistics: NDArray[np.float64]
    null: Null
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """One user's place in a trace; ``p_value`` is corrected for all users that were looked at."""

    user: str
    statistic: float
    p_value: float
    log10_p: float


@dataclass(frozen=True)
class Accusation:
    """Who leaked the suspect, and the bound on accusing anyone who did not.

    Attributes:
        verdict: MATCH when somebody is accused, INCONCLUSIVE when the null cannot reach alpha.
        accused: users whose p-value is at most alpha, most suspicious first.
        ranking: the most suspicious users, accused or not.
        alpha: the bound on the probability that anyone innocent is accused.
        users: how many were looked at.
        null: the law of an innocent user's statistic, in words.
        basis: why it holds.
        scheme: the scheme's public name.
        commitment: of the secret.
        details: further figures.
        suspicion: of everybody, in the order that they were named in, for a plot; not in `as_dict`.
    """

    verdict: Verdict
    accused: tuple[Ranked, ...]
    ranking: tuple[Ranked, ...]
    alpha: float
    users: int
    null: str
    basis: Basis
    scheme: str
    commitment: str
    details: Mapping[str, Any] = field(default_factory=dict)
    suspicion: Suspicion | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(replace(self, suspicion=None)) | {"verdict": self.verdict.value, "basis": self.basis.value}
        del plain["suspicion"]
        return plain


class UserMark(Scheme):
    """User identity management: issue marked copies, authenticate one, trace a leak.

    Attributes:
        access: what tracing touches.
        places: how many users a secret has room for; None for any number.
    """

    access: ClassVar[Access]
    places: ClassVar[int | None] = None

    @abstractmethod
    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        users: Sequence[str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """The owner's secret for all users of ``model``.

        Args:
            model: that users get copies of.
            task: what it is for, where the scheme must know.
            users: everyone who may get a copy, for schemes with a fixed number of ``places``: their
                assignment is committed. Others derive a user's mark from the name and need no list.
            owner: the owner's public key, bound into the secret.
            rng: for tests; the operating system's randomness by default.

        Raises:
            ParameterError: more users than places, or the same one twice.
        """

    @abstractmethod
    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Issued:
        """The copy of one user; the same user gets the same copy.

        Args:
            model: that the secret was made for.
            secret: of `enroll`.
            user: who gets the copy.
            task: the owner's rows and loss, for schemes that train.

        Raises:
            ParameterError: the user's name is empty or unknown, the secret belongs to another scheme, or
                there is no task where the scheme trains.
            ModelMismatchError: the secret was made for another model.
        """

    @abstractmethod
    def suspicion(
        self, suspect: Suspect, secret: Secret, users: Sequence[str], original: Weights | None
    ) -> Suspicion:
        """How much each user's mark shows in the suspect."""

    @final
    def trace(
        self,
        suspect: Suspect,
        secret: Secret,
        users: Sequence[str],
        *,
        alpha: float = DEFAULT_ALPHA,
        original: nn.Module | Weights | Path | str | None = None,
        commitment: str | None = None,
    ) -> Accusation:
        """Who leaked the suspect?

        Args:
            suspect: is not changed.
            secret: of `enroll`.
            users: everyone to whom copies were issued.
            alpha: bound on the probability of accusing anyone innocent, over all users together.
            original: the owner's unmarked model, for non-blind schemes. The suspect's tensors are first
                found under whatever names they have there; where it is a live model, hidden units are put
                back into its order, scale and sign. See `recover`; the note says what was undone.
            commitment: published before release; a secret that does not open it is refused.

        Raises:
            AccessError: the suspect does not show what the scheme reads.
            ParameterError: no users, a user twice, or no original where one is needed.
            ModelMismatchError: the original is not the model that the secret was made for.
            ForgedSecretError: the secret does not re-derive or open the commitment.
        """
        check_alpha(alpha)
        names = check_users(users)
        found = self._suspicion(suspect, secret, names, original, commitment)
        return accuse(found, names, alpha=alpha, scheme=self.name, commitment=secret.commitment)

    @final
    def authenticate(
        self,
        suspect: Suspect,
        secret: Secret,
        user: str,
        *,
        alpha: float = DEFAULT_ALPHA,
        original: nn.Module | Weights | Path | str | None = None,
    ) -> Evidence:
        """Is this the copy of that user? For raising exceptions and arguments see `trace`.

        A mark is no password: whoever holds the copy passes. Signatures authenticate people.
        """
        check_alpha(alpha)
        before = suspect.queries
        found = self._suspicion(suspect, secret, [user], original, None)
        return judge(
            Score(float(found.statistics[0]), found.null, {"user": user, **found.details}),
            alpha=alpha,
            scheme=self.name,
            commitment=secret.commitment,
            queries=suspect.queries - before,
        )

    def _suspicion(
        self,
        suspect: Suspect,
        secret: Secret,
        users: Sequence[str],
        original: nn.Module | Weights | Path | str | None,
        commitment: str | None,
    ) -> Suspicion:
        suspect.require(self.access)
        self.check_secret(secret, commitment)
        weights = None if original is None else weights_of(original)
        if weights is not None:
            check_model(weights, secret)
        if original is None or weights is None or not Access.WEIGHTS & suspect.access:
            return self.suspicion(suspect, secret, users, weights)
        note, suspect = recover(suspect, original if isinstance(original, nn.Module) else weights)
        found = self.suspicion(suspect, secret, users, weights)
        details = {**found.details, **note, "original": weights.digest()}
        return Suspicion(found.statistics, found.null, details)


class WeightMark(UserMark):
    """A user mark on the weights, tensor by tensor, with no data: write `bind`, `marker`, `suspicion`."""

    access = Access.WEIGHTS

    def bind(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the secret must note of the model (plain JSON), and what it must hold as tensors.

        Raises:
            UnsupportedError: the model has too little room for the mark.
        """
        return {}, {}

    @abstractmethod
    def marker(self, secret: Secret, user: str) -> TensorMap:
        """The change from an unmarked tensor to the user's."""

    @final
    def enroll(
        self,
        model: nn.Module | Weights | Path | str,
        task: Task | None = None,
        *,
        users: Sequence[str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `UserMark.enroll`; takes weight files as well as live models."""
        weights = weights_of(model)
        host, tensors = self.bind(weights)
        return self.new_secret(weights, host=host, tensors=tensors, owner=owner, rng=rng)

    @final
    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Issued:
        """See `UserMark.issue`."""
        self._check_issue(weights_of(model), secret, user)
        return Issued(user, rewrite_model(model, self.marker(secret, user)))

    @final
    def issue_file(
        self,
        source: Path | str,
        target: Path | str,
        secret: Secret,
        user: str,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Write the user's copy of a weight file or sharded folder, streaming; see `UserMark.issue`."""
        self._check_issue(weights_of(source), secret, user)
        rewrite_file(source, target, self.marker(secret, user), progress=progress)

    def _check_issue(self, weights: Weights, secret: Secret, user: str) -> None:
        require_name(user)
        self.check_secret(secret)
        check_model(weights, secret)


def require_name(user: str) -> None:
    """Refuse to issue anything to nobody.

    Raises:
        ParameterError: the name is empty.
    """
    if not user:
        raise ParameterError("bad user", expected="a name", found="an empty one")


def check_users(users: Sequence[str]) -> list[str]:
    """The users to look at.

    Raises:
        ParameterError: none, or one twice.
    """
    names = list(users)
    if not names or len(set(names)) != len(names):
        raise ParameterError("bad list of users", expected="one or more, each once", found=len(names))
    return names


def accuse(found: Suspicion, users: Sequence[str], *, alpha: float, scheme: str, commitment: str) -> Accusation:
    """Whoever is suspected by more than chance allows, over all users together.

    Args:
        found: how much each user is suspected, in the order of ``users``.
        users: everyone who was looked at; p-values are corrected for their number.
        alpha: bound on the chance that anyone innocent is accused.
        scheme: for the record.
        commitment: of the secret.
    """
    order = np.argsort(-found.statistics, kind="stable")
    ranked, guilty = list[Ranked](), 0
    for index in order:
        log_p = min(0.0, found.null.log_p(float(found.statistics[index])) + math.log(len(users)))
        if log_p > math.log(alpha) and len(ranked) >= _RANKED:
            break
        guilty += log_p <= math.log(alpha)
        ranked.append(Ranked(users[index], float(found.statistics[index]), math.exp(log_p), log_p / math.log(10)))
    accused = tuple(ranked[:guilty])
    reachable = found.null.floor + math.log(len(users)) <= math.log(alpha)
    return Accusation(
        verdict=Verdict.MATCH if accused else Verdict.NO_MATCH if reachable else Verdict.INCONCLUSIVE,
        accused=accused,
        ranking=tuple(ranked[:_RANKED]),
        alpha=alpha,
        users=len(users),
        null=str(found.null),
        basis=found.null.basis,
        scheme=scheme,
        commitment=commitment,
        details=dict(found.details),
        suspicion=found,
    )


def check_model(weights: Weights, secret: Secret) -> None:
    """Refuse weights that are not those of the model that the secret was made for.

    Raises:
        ModelMismatchError: they are not.
    """
    digest, expected = weights.digest(), secret.facts.get("model")
    if digest != expected:
        raise ModelMismatchError(
            "not the model that this secret was made for",
            expected=f"digest {str(expected)[:16]}",
            found=digest[:16],
            advice="pass the owner's unmarked original",
        )
