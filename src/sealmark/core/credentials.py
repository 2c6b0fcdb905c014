"""Which user asks? Users of one served model hold credentials that it, or the gate before it, tells apart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from hashlib import shake_256
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import DEFAULT_ALPHA, Basis, Verdict, check_alpha
from sealmark.core.identity import Accusation, Suspicion, accuse, check_users, require_name
from sealmark.core.modes import evaluating
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Task


@dataclass(frozen=True)
class Enrolled:
    """A model as it is served, and the owner's secret for all of its users.

    Attributes:
        model: one for everybody; knows credentials from other inputs.
        secret: what credentials are issued from.
    """

    model: nn.Module
    secret: Secret


@dataclass(frozen=True)
class Credential:
    """What a user holds: a bearer's secret.

    Attributes:
        user: whose.
        tensors: by name; ``images`` (R, ...) are shown as they are, other names are the scheme's own.
    """

    user: str
    tensors: Mapping[str, Tensor] = field(repr=False)


class Reason(StrEnum):
    """Why somebody was let in, or not."""

    ACCEPTED = "ACCEPTED"
    MODEL_REFUSES = "MODEL_REFUSES"  # the served model does not take these rows for a credential's
    IDENTITY_UNREADABLE = "IDENTITY_UNREADABLE"  # it does, and no identity can be read in them
    UNKNOWN_USER = "UNKNOWN_USER"  # one can, and it is nobody's who was asked for
    INCONCLUSIVE = "INCONCLUSIVE"  # nothing that could be read would be enough at this alpha, for so many users
    REVOKED = "REVOKED"  # it is that of a user who was revoked


@dataclass(frozen=True)
class Examination:
    """What the rows that somebody shows say.

    Attributes:
        served: whether the paper's own rule takes them for a credential, whoever's: what the model by
            itself would let in.
        readable: whether an identity, right or wrong, can be read in them.
        suspicion: how much they look like each user's.
    """

    served: bool
    readable: bool
    suspicion: Suspicion


@dataclass(frozen=True)
class Authentication:
    """Who asks, and the bound on taking anybody for someone else.

    Attributes:
        user: as whom; None where nobody was recognized. Also stated where he is not let in: the user was revoked,
            or the model refuses the rows.
        reason: ACCEPTED, or why not.
        served: whether the paper's own rule would have let these rows in.
        p_value: of the most likely user, corrected for all users; an upper bound on the chance that rows
            made without that user's part of the secret look so much like it.
        log10_p: the same, also where it is too small for a double.
        alpha: what it was compared with.
        users: how many were looked at.
        null: the law, in words.
        basis: why it holds.
        scheme: public name.
        commitment: of the secret.
        details: further figures.
    """

    user: str | None
    reason: Reason
    served: bool
    p_value: float
    log10_p: float
    alpha: float
    users: int
    null: str
    basis: Basis
    scheme: str
    commitment: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether the gate opens."""
        return self.reason is Reason.ACCEPTED

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"reason": self.reason.value, "basis": self.basis.value}


class CredentialMark(Scheme):
    """User identity management by credentials: write `enroll`, `issue` and `examine`.

    A neural credential is no password: it can be copied, and the model alone often takes what nobody was
    issued. So a user is recognized by what is drawn for him from the owner's secret, as a p-value; what the
    model says is the paper's rule, is kept beside it, and can refuse alone but never accept alone.

    Attributes:
        examines: what `examine` touches of the served model.
    """

    examines: ClassVar[Access]

    @abstractmethod
    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Enrolled:
        """A model that knows credentials, trained from a copy of ``model``, and the owner's secret.

        Args:
            model: left as it is.
            task: data to train on.
            owner: the owner's public key, bound into the secret.
            rng: order of rows and all other randomness of training; the operating system's by default.

        Raises:
            ParameterError: no task.
            UnsupportedError: such inputs cannot carry a credential.
        """

    @abstractmethod
    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        """The credential of one user; the same user gets the same.

        Args:
            model: as served; left as it is.
            secret: of `enroll`.
            user: any name: what is his is derived from it.
            task: where credentials are made of the owner's rows.

        Raises:
            ParameterError: the user's name is empty, or no task where one is needed.
            MarkFailedError: no credential can be made for this user and model.
        """

    @final
    def check_issue(self, secret: Secret, user: str) -> None:
        """Refuse what nothing can be issued from or to: every `issue` begins with it.

        Raises:
            ParameterError: the user's name is empty, or the secret is of another scheme.
            ForgedSecretError: the secret does not re-derive.
        """
        require_name(user)
        self.check_secret(secret)

    def present(self, credential: Credential, inputs: Tensor | None = None) -> Tensor:
        """The rows that its holder sends: the images that he holds, or his inputs as he must send them.

        Args:
            credential: of `issue`.
            inputs: (N, ...) where every query carries the credential; not used otherwise.

        Raises:
            ParameterError: no inputs where they are needed.
        """
        return credential.tensors["images"]

    @abstractmethod
    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        """What rows say, and whether the served model takes them for a credential's.

        Args:
            suspect: the served model.
            secret: of `enroll`.
            rows: (R, ...), whatever somebody sent: of any number, perhaps of no sense.
            users: whom they might be of; the statistics are in their order.
        """

    def spoil(self, outputs: Tensor, secret: Secret) -> Tensor:
        """What a closed gate answers in place of (..., K) outputs: the same scores, given to classes at random."""
        return outputs.gather(-1, shuffles(secret, outputs))

    @final
    def authenticate(
        self,
        suspect: Suspect,
        secret: Secret,
        rows: Tensor,
        users: Sequence[str],
        *,
        alpha: float = DEFAULT_ALPHA,
        revoked: Collection[str] = (),
        commitment: str | None = None,
    ) -> Authentication:
        """Who sends these rows?

        Args:
            suspect: the served model.
            secret: of `enroll`.
            rows: (R, ...) as somebody sent them.
            users: everyone to whom credentials were issued, revoked or not.
            alpha: bound on the chance that rows made without any user's part of the secret pass.
            revoked: users who are recognized and let in no more.
            commitment: published before; a secret that does not open it is refused.

        Raises:
            AccessError: the suspect does not show what the scheme reads.
            ParameterError: no rows, rows of another shape, no users, or a user twice.
            ForgedSecretError: the secret does not re-derive or open the commitment.
        """
        examination, names = self._examined(suspect, secret, rows, users, alpha, commitment)
        found = accuse(examination.suspicion, names, alpha=alpha, scheme=self.name, commitment=secret.commitment)
        user = found.accused[0].user if found.accused else None
        best = found.ranking[0]
        return Authentication(
            user=user,
            reason=_reason(examination, found.verdict, user, revoked),
            served=examination.served,
            p_value=best.p_value,
            log10_p=best.log10_p,
            alpha=alpha,
            users=len(names),
            null=found.null,
            basis=found.basis,
            scheme=self.name,
            commitment=secret.commitment,
            details=found.details,
        )

    @final
    def trace(
        self,
        suspect: Suspect,
        secret: Secret,
        rows: Tensor,
        users: Sequence[str],
        *,
        alpha: float = DEFAULT_ALPHA,
        commitment: str | None = None,
    ) -> Accusation:
        """Whose credential are these rows, found where it should not be? Arguments and errors: `authenticate`."""
        examination, names = self._examined(suspect, secret, rows, users, alpha, commitment)
        return accuse(examination.suspicion, names, alpha=alpha, scheme=self.name, commitment=secret.commitment)

    def _examined(
        self,
        suspect: Suspect,
        secret: Secret,
        rows: Tensor,
        users: Sequence[str],
        alpha: float,
        commitment: str | None,
    ) -> tuple[Examination, list[str]]:
        check_alpha(alpha)
        names = check_users(users)
        suspect.require(self.examines)
        self.check_secret(secret, commitment)
        shape = list(secret.host["shape"])
        if rows.ndim == 0 or len(rows) == 0 or list(rows.shape[1:]) != shape:
            raise ParameterError(
                "these rows are no credential", expected=f"one or more rows of {shape}", found=list(rows.shape)
            )
        return self.examine(suspect, secret, rows, names), names


class Gate(nn.Module):
    """A served model that spoils its answers until somebody authenticates (the control layer of ActiveGuard).

    It is a rule of whoever runs the model, not a lock: ``gate.model`` is the whole model, and the gate
    holds the owner's secret. One gate is one session: give each client its own around the same model.
    Answers come in evaluation mode and without gradients, in whatever mode the gate is.

    Args:
        mark: the scheme.
        enrolled: the served model and the secret.
        users: everyone to whom credentials were issued.
        revoked: of these, who is let in no more.
        alpha: see `CredentialMark.authenticate`; it bounds one presentation, so bound their number too.

    Raises:
        ParameterError: no users, or one twice.
    """

    def __init__(
        self,
        mark: CredentialMark,
        enrolled: Enrolled,
        users: Sequence[str],
        *,
        revoked: Collection[str] = (),
        alpha: float = DEFAULT_ALPHA,
    ) -> None:
        super().__init__()
        self.model, self._mark, self._secret = enrolled.model, mark, enrolled.secret
        self.users, self.revoked, self.alpha = check_users(users), set(revoked), alpha
        self.user: str | None = None

    def admit(self, rows: Tensor) -> Authentication:
        """Authenticate; the gate is open from now on, or closed, also where it raises an error.

        What is found is the owner's to know: told to strangers, reasons and figures help them search.
        """
        self.close()
        found = self._mark.authenticate(
            WhiteBox(self.model), self._secret, rows, self.users, alpha=self.alpha, revoked=self.revoked
        )
        self.user = found.user if found.accepted else None
        return found

    def close(self) -> None:
        """End the session."""
        self.user = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's answers to a user who was let in and is not revoked since; spoiled ones to others."""
        with evaluating(self.model):
            outputs: Tensor = self.model(inputs)
        let_in = self.user is not None and self.user not in self.revoked
        return outputs if let_in else self._mark.spoil(outputs, self._secret)


def shuffles(secret: Secret, outputs: Tensor) -> Tensor:
    """(..., K) a keyed order of the classes for each of (..., K) outputs, uniform among all orders.

    It follows from the secret and the answer, so that asking again tells nothing new. One order for all
    answers is undone with one labeled row a class. Orders that leave no class at its place say which class
    it is not: the one that never comes, when a row is asked for again and again with a little noise.

    Example:
        >>> orders = shuffles(Secret(bytes(32), {}), torch.eye(5))
        >>> orders.sort().values[0].tolist(), len(orders.unique(dim=0))
        ([0, 1, 2, 3, 4], 5)
    """
    key, classes = secret.key("spoil"), outputs.shape[-1]
    answers = outputs.detach().to("cpu").contiguous().reshape(-1, classes).view(torch.uint8).numpy()
    drawn = b"".join(shake_256(key + answer.tobytes()).digest(8 * classes) for answer in answers)
    words = np.frombuffer(drawn, "<u8").reshape(-1, classes)
    return torch.from_numpy(words.argsort(-1)).reshape(outputs.shape).to(outputs.device)


def _reason(examination: Examination, verdict: Verdict, user: str | None, revoked: Collection[str]) -> Reason:
    if not examination.served:
        return Reason.MODEL_REFUSES
    if verdict is Verdict.INCONCLUSIVE:
        return Reason.INCONCLUSIVE
    if user is None:
        return Reason.UNKNOWN_USER if examination.readable else Reason.IDENTITY_UNREADABLE
    return Reason.REVOKED if user in revoked else Reason.ACCEPTED
