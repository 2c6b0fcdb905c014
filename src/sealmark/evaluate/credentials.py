"""What is measured of users' credentials: who is let in, who else gets past, and what a served model costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Gate
from sealmark.core.errors import MarkFailedError
from sealmark.core.impersonation import Impersonation, Spoils
from sealmark.core.modes import chunks
from sealmark.core.suspect import WhiteBox
from sealmark.evaluate.measure import Ground

_TRIES = 40
_SHOWN = 32  # queries by which somebody is recognized whose every query carries the credential


@dataclass(frozen=True)
class Pretense:
    """One way to get past without a credential of one's own.

    Attributes:
        title: unique.
        attack: its name.
        parameters: other than the defaults.
        stolen: how many users' credentials the impostor has.
    """

    title: str
    attack: str
    parameters: dict[str, Any] = field(default_factory=dict)
    stolen: int = 0


PRETENSES: tuple[Pretense, ...] = (
    Pretense("noise", "fingerprint_forgery", {"strategy": "noise"}),
    Pretense("ordinary rows", "fingerprint_forgery", {"strategy": "natural"}),
    Pretense("search by answers", "fingerprint_forgery", {"strategy": "search"}),
    Pretense("two blended", "fingerprint_mixing", {"strategy": "blend"}, 2),
    Pretense("two spliced", "fingerprint_mixing", {"strategy": "splice"}, 2),
    Pretense("a copied one", "replay", stolen=1),
)


@dataclass(frozen=True)
class CredentialEntry:
    """A scheme with its parameters.

    Attributes:
        scheme: public name.
        parameters: other than the defaults.
        users: who get credentials.
        pretenses: how others try to get past.
    """

    scheme: str
    parameters: dict[str, Any] = field(default_factory=dict)
    users: int = 20
    pretenses: tuple[Pretense, ...] = PRETENSES

    @property
    def title(self) -> str:
        """For tables; unique."""
        given = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.scheme} ({given})" if given else self.scheme

    def make(self) -> CredentialMark:
        """The scheme."""
        return cast("CredentialMark", registry.scheme(self.scheme, **self.parameters))


def credential_figures(base: Ground, entry: CredentialEntry) -> dict[str, Any]:
    """A scheme on one plain model: service, genuine users, false acceptance by each pretense, after fine-tuning.

    Counts are ``[successes, tries]``. ``served`` is what the paper's own rule lets in.
    """
    mark = entry.make()
    names = [f"user {number:03}" for number in range(entry.users)]
    began = time.process_time()
    enrolled = mark.enroll(base.plain, base.task, rng=base.generator(f"{entry.title} enroll"))
    middle = time.process_time()
    held = _issued(mark, enrolled, names, base)
    ended = time.process_time()
    work = _Work(base, mark, enrolled, held, names)
    tuned = registry.modification("fine_tune").run(
        enrolled.model, Resources.of(base.task, 0.1), rng=base.generator("fine-tuned")
    )
    return {
        "plain": base.accuracy,
        **work.service(),
        "issued": [len(held), len(names)],
        "genuine": work.genuine(enrolled.model),
        "genuine after fine-tuning": work.genuine(tuned.model),
        "unissued": work.unissued(),
        "pretenses": {one.title: work.pretended(one) for one in entry.pretenses},
        "enroll seconds": middle - began,
        "issue seconds": (ended - middle) / max(1, len(held)),
    }


def _issued(mark: CredentialMark, enrolled: Enrolled, names: list[str], base: Ground) -> list[Credential]:
    held = []
    for user in names:
        try:
            held.append(mark.issue(enrolled.model, enrolled.secret, user, task=base.task))
        except MarkFailedError:  # counted as not issued
            continue
    return held


@dataclass(frozen=True)
class _Work:
    base: Ground
    mark: CredentialMark
    enrolled: Enrolled
    held: list[Credential]
    names: list[str]

    def service(self) -> dict[str, float]:
        """Accuracy for users, at an open and at a closed gate."""
        rows, gate = self.base.task.test, Gate(self.mark, self.enrolled, self.names).eval()
        inputs = self._sent(self.held[0], rows.inputs)
        classes = self.base.task.classes
        with torch.no_grad():
            closed = torch.cat([gate(chunk) for chunk in chunks(inputs)])[:, :classes]
            answers = torch.cat([self.enrolled.model.eval()(chunk) for chunk in chunks(inputs)])[:, :classes]
            bare = torch.cat([self.enrolled.model(chunk) for chunk in chunks(rows.inputs)])[:, :classes]
        metric = self.base.task.metric
        return {
            "authorized": metric(answers, rows.targets),
            "closed gate": metric(closed, rows.targets),
            "without a gate": metric(bare, rows.targets),
        }

    def genuine(self, model: nn.Module) -> dict[str, list[int]]:
        """How many users are recognized, each as himself, and how many the paper's rule lets in."""
        found = [(self._authenticate(model, self._shown(one)), one.user) for one in self.held]
        right = sum(one.accepted and one.user == user for one, user in found)
        return {
            "accepted": [right, len(found)],
            "served": [sum(one.served for one, _ in found), len(found)],
            "as another": [sum(one.user not in (None, user) for one, user in found), len(found)],
        }

    def unissued(self) -> dict[str, list[int]]:
        """Credentials of the owner's own making for names that are on no list."""
        extra = _issued(self.mark, self.enrolled, [f"nobody {i}" for i in range(len(self.names))], self.base)
        found = [self._authenticate(self.enrolled.model, self._shown(one)) for one in extra]
        return {
            "accepted": [sum(one.accepted for one in found), len(found)],
            "served": [sum(one.served for one in found), len(found)],
        }

    def pretended(self, pretense: Pretense) -> dict[str, list[int]]:
        """What one way of pretending gets: let in as somebody, and as one who was robbed."""
        attack = cast("Impersonation", registry.attack(pretense.attack, **pretense.parameters))
        rng = self.base.generator(f"{self.mark.name} {pretense.title}")
        accepted = served = robbed = 0
        for _ in range(_TRIES):
            chosen = rng.choice(len(self.held), pretense.stolen, replace=False)
            stolen = [self.held[index] for index in chosen]
            spoils = Spoils(self.mark, self.enrolled, stolen)
            rows = attack.run(spoils, Resources.of(self.base.task), rng=rng).rows
            found = self._authenticate(self.enrolled.model, rows)
            accepted += found.accepted
            served += found.served
            robbed += found.accepted and found.user in {one.user for one in stolen}
        return {"accepted": [accepted, _TRIES], "served": [served, _TRIES], "as the robbed": [robbed, _TRIES]}

    def _authenticate(self, model: nn.Module, rows: torch.Tensor) -> Any:
        return self.mark.authenticate(WhiteBox(model), self.enrolled.secret, rows, self.names)

    def _shown(self, held: Credential) -> torch.Tensor:
        return self.mark.present(held, self.base.task.test.inputs[:_SHOWN])

    def _sent(self, held: Credential, inputs: torch.Tensor) -> torch.Tensor:
        if self.mark.card.key_point != "query":
            return inputs
        return torch.cat([self.mark.present(held, chunk) for chunk in chunks(inputs)])


def added(counts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Successes and tries of several seeds.

    Example:
        >>> added([[1, 20], [2, 20]])
        (3, 40)
    """
    successes, tries = np.asarray(counts, np.int64).sum(0).tolist()
    return successes, tries
