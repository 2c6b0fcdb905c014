"""Credentials: who is let in and why not, and the gate in front of a served model."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sealmark.core.credentials import (
    Credential,
    CredentialMark,
    Enrolled,
    Examination,
    Gate,
    Reason,
    shuffles,
)
from sealmark.core.errors import AccessError, ForgedSecretError, ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.identity import Suspicion
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, BlackBox, Suspect, WhiteBox
from sealmark.core.task import Task
from sealmark.core.weights import weights_of
from sealmark.stats.nulls import Binomial

USERS = ("alice", "bob", "carol")
LENGTH, CLASSES = 40, 5


@dataclass(frozen=True)
class Signed(CredentialMark):
    """A user shows his keyed signs in the first row; what is not finite is refused."""

    null: Binomial = field(default_factory=lambda: Binomial(LENGTH, 0.5))
    examines = Access.LABELS

    @property
    def parameters(self) -> dict[str, Any]:
        return {"n": self.null.n}

    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Enrolled:
        host = {"shape": [LENGTH]}
        return Enrolled(copy.deepcopy(model), self.new_secret(weights_of(model), host=host, owner=owner, rng=rng))

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        return Credential(user, {"images": self.signs(secret, user)[None]})

    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        statistics = np.array([float((self.signs(secret, user) == rows[0]).sum()) for user in users])
        suspect.labels(rows)
        served = bool(rows.isfinite().all())
        return Examination(
            served, bool((rows.abs() == 1).all()), Suspicion(statistics, self.null, {"rows": len(rows)})
        )

    @staticmethod
    def signs(secret: Secret, user: str) -> Tensor:
        return torch.from_numpy(secret.stream(f"user/{user}").signs(LENGTH)).float()


class Normalized(nn.Module):
    """Answers otherwise in training mode than in evaluation mode, and learns from what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(LENGTH), nn.Linear(LENGTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(inputs))
        return outputs


MARK = Signed()


@pytest.fixture
def model() -> nn.Module:
    made = Normalized()
    with torch.no_grad():
        made.head.weight.copy_(torch.randn(CLASSES, LENGTH, generator=torch.Generator().manual_seed(0)))
        made.head.bias.zero_()
    return made.eval()


@pytest.fixture
def enrolled(model: nn.Module) -> Enrolled:
    return MARK.enroll(model, rng=np.random.default_rng(0))


@pytest.fixture
def suspect(enrolled: Enrolled) -> WhiteBox:
    return WhiteBox(enrolled.model)


def shown(enrolled: Enrolled, user: str) -> Tensor:
    return MARK.present(MARK.issue(enrolled.model, enrolled.secret, user))


def noise(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, LENGTH, generator=torch.Generator().manual_seed(seed))


def test_a_credential_is_accepted_as_its_users(enrolled: Enrolled, suspect: WhiteBox) -> None:
    found = MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "bob"), USERS)
    assert (found.user, found.reason, found.accepted) == ("bob", Reason.ACCEPTED, True)
    assert found.p_value == pytest.approx(3 * 2.0**-LENGTH)
    assert found.log10_p == pytest.approx(np.log10(3) - LENGTH * np.log10(2))
    assert (found.users, found.basis, found.scheme) == (3, Basis.EXACT, "test_credentials")
    assert found.commitment == enrolled.secret.commitment
    assert found.details == {"rows": 1}


def test_an_authentication_is_plain_json(enrolled: Enrolled, suspect: WhiteBox) -> None:
    found = MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "bob"), USERS).as_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert (again["reason"], again["basis"], again["served"]) == ("ACCEPTED", "exact", True)


def test_a_credential_does_not_show_what_it_holds(enrolled: Enrolled) -> None:
    assert "tensor" not in repr(MARK.issue(enrolled.model, enrolled.secret, "bob"))


def test_the_revoked_are_refused_by_name_and_still_traced(enrolled: Enrolled, suspect: WhiteBox) -> None:
    rows = shown(enrolled, "bob")
    found = MARK.authenticate(suspect, enrolled.secret, rows, USERS, revoked=["bob"])
    assert (found.user, found.reason, found.accepted) == ("bob", Reason.REVOKED, False)
    other = MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "carol"), USERS, revoked=["bob"])
    assert other.accepted
    traced = MARK.trace(suspect, enrolled.secret, rows, USERS)
    assert traced.verdict is Verdict.MATCH
    assert [entry.user for entry in traced.accused] == ["bob"]


def test_an_identity_of_nobody_on_the_list_is_unknown(enrolled: Enrolled, suspect: WhiteBox) -> None:
    rows = shown(enrolled, "mallory")
    found = MARK.authenticate(suspect, enrolled.secret, rows, USERS)
    assert (found.user, found.reason, found.served) == (None, Reason.UNKNOWN_USER, True)
    assert found.p_value > 1e-3
    assert MARK.trace(suspect, enrolled.secret, rows, USERS).accused == ()


def test_rows_without_an_identity_are_unreadable(enrolled: Enrolled, suspect: WhiteBox) -> None:
    assert MARK.authenticate(suspect, enrolled.secret, noise(), USERS).reason is Reason.IDENTITY_UNREADABLE


def test_the_model_can_refuse_whom_the_statistics_accept(enrolled: Enrolled, suspect: WhiteBox) -> None:
    rows = torch.cat([shown(enrolled, "bob"), torch.full((1, LENGTH), torch.inf)])
    served = BlackBox(lambda inputs: torch.zeros(len(inputs)), returns="label")
    found = MARK.authenticate(served, enrolled.secret, rows, USERS)
    assert (found.reason, found.accepted, found.served) == (Reason.MODEL_REFUSES, False, False)
    assert found.p_value < found.alpha


def test_the_model_alone_accepts_nobody(enrolled: Enrolled, suspect: WhiteBox) -> None:
    found = [MARK.authenticate(suspect, enrolled.secret, noise(seed=s), USERS) for s in range(50)]
    assert all(one.served for one in found)
    assert not any(one.accepted for one in found)


def test_p_values_are_paid_for_by_the_number_of_users(enrolled: Enrolled, suspect: WhiteBox) -> None:
    rows = shown(enrolled, "alice")
    few = MARK.authenticate(suspect, enrolled.secret, rows, ["alice"])
    many = MARK.authenticate(suspect, enrolled.secret, rows, ["alice", *(f"u{i}" for i in range(99))])
    assert many.p_value == pytest.approx(100 * few.p_value)


def test_a_level_that_no_reading_can_reach_is_said_and_lets_nobody_in(
    enrolled: Enrolled, suspect: WhiteBox
) -> None:
    found = MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "bob"), USERS, alpha=1e-300)
    assert (found.user, found.reason) == (None, Reason.INCONCLUSIVE)


@pytest.mark.parametrize("rows", [noise()[:0], noise()[:, 1:], noise()[0]], ids=["none", "narrow", "flat"])
def test_rows_of_another_form_are_refused(rows: Tensor, enrolled: Enrolled, suspect: WhiteBox) -> None:
    for call in (MARK.authenticate, MARK.trace):
        with pytest.raises(ParameterError, match="no credential"):
            call(suspect, enrolled.secret, rows, USERS)


@pytest.mark.parametrize("users", [[], ["bob", "bob"]])
def test_bad_lists_of_users_are_refused(users: list[str], enrolled: Enrolled, suspect: WhiteBox) -> None:
    with pytest.raises(ParameterError, match="bad list of users"):
        MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "bob"), users)
    with pytest.raises(ParameterError, match="bad list of users"):
        Gate(MARK, enrolled, users)


def test_a_secret_that_does_not_open_the_commitment_is_refused(enrolled: Enrolled, suspect: WhiteBox) -> None:
    rows, published = shown(enrolled, "bob"), enrolled.secret.commitment
    assert MARK.authenticate(suspect, enrolled.secret, rows, USERS, commitment=published).accepted
    other = MARK.enroll(enrolled.model, rng=np.random.default_rng(1)).secret
    for call in (MARK.authenticate, MARK.trace):
        with pytest.raises(ForgedSecretError):
            call(suspect, other, rows, USERS, commitment=published)


def test_a_suspect_that_answers_too_little_is_refused(enrolled: Enrolled) -> None:
    class Asking(Signed):
        examines = Access.LOGITS

    labels = BlackBox(lambda inputs: torch.zeros(len(inputs)), returns="label")
    rows = shown(enrolled, "bob")
    assert MARK.authenticate(labels, enrolled.secret, rows, USERS).accepted
    with pytest.raises(AccessError):
        Asking().authenticate(labels, enrolled.secret, rows, USERS)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_levels_that_mean_nothing_are_refused(alpha: float, enrolled: Enrolled, suspect: WhiteBox) -> None:
    with pytest.raises(ParameterError, match="alpha"):
        MARK.authenticate(suspect, enrolled.secret, shown(enrolled, "bob"), USERS, alpha=alpha)


def test_an_open_gate_answers_as_the_model_does(enrolled: Enrolled) -> None:
    gate, inputs = Gate(MARK, enrolled, USERS), noise(20)
    assert gate.admit(shown(enrolled, "bob")).accepted
    assert gate.user == "bob"
    assert torch.equal(gate(inputs), enrolled.model(inputs))
    gate.close()
    assert not torch.equal(gate(inputs), enrolled.model(inputs))


def test_a_closed_gate_gives_the_same_scores_to_other_classes(enrolled: Enrolled) -> None:
    inputs = noise(400)
    plain, spoiled = enrolled.model(inputs), Gate(MARK, enrolled, USERS)(inputs)
    assert torch.equal(plain.sort().values, spoiled.sort().values)
    assert torch.equal(spoiled, MARK.spoil(plain, enrolled.secret))
    right = (plain.argmax(1) == spoiled.argmax(1)).float().mean()
    assert abs(right - 1 / CLASSES) < 0.08  # four standard deviations


def test_revoking_closes_a_gate_that_is_open(enrolled: Enrolled) -> None:
    gate, inputs = Gate(MARK, enrolled, USERS), noise(20)
    gate.admit(shown(enrolled, "bob"))
    gate.revoked.add("bob")
    assert not torch.equal(gate(inputs), enrolled.model(inputs))
    assert gate.admit(shown(enrolled, "bob")).reason is Reason.REVOKED
    assert gate.admit(shown(enrolled, "alice")).accepted


def test_a_gate_that_was_open_is_closed_by_whoever_fails(enrolled: Enrolled) -> None:
    gate = Gate(MARK, enrolled, USERS)
    gate.admit(shown(enrolled, "bob"))
    assert not gate.admit(noise()).accepted
    assert gate.user is None


def test_a_gate_that_was_open_is_closed_by_whoever_makes_it_raise(enrolled: Enrolled) -> None:
    gate = Gate(MARK, enrolled, USERS)
    gate.admit(shown(enrolled, "bob"))
    with pytest.raises(ParameterError):
        gate.admit(noise()[:, 1:])
    assert gate.user is None


def test_a_gate_is_as_strict_as_its_level(enrolled: Enrolled) -> None:
    rows = shown(enrolled, "bob")
    assert Gate(MARK, enrolled, USERS).admit(rows).accepted
    assert not Gate(MARK, enrolled, USERS, alpha=1e-15).admit(rows).accepted


def test_serving_does_not_train_a_model_whose_gate_is_in_training_mode(enrolled: Enrolled) -> None:
    gate, inputs = Gate(MARK, enrolled, USERS).train(), noise(20) + 5
    gate.admit(shown(enrolled, "bob"))
    before = weights_of(enrolled.model).digest()
    answers = gate(inputs)
    assert weights_of(enrolled.model).digest() == before
    assert enrolled.model.training
    assert not answers.requires_grad
    assert torch.equal(answers, enrolled.model.eval()(inputs))


def test_whoever_takes_the_model_from_behind_its_gate_has_it_all(enrolled: Enrolled) -> None:
    gate, inputs = Gate(MARK, enrolled, USERS), noise(20)
    assert torch.equal(gate.model(inputs), enrolled.model(inputs))


def test_a_gate_adds_nothing_to_what_is_saved(enrolled: Enrolled) -> None:
    names = {f"model.{name}" for name in enrolled.model.state_dict()}
    assert set(Gate(MARK, enrolled, USERS).state_dict()) == names


def test_one_labeled_row_a_class_would_undo_one_order_for_all_and_does_not_undo_ours(enrolled: Enrolled) -> None:
    plain = torch.eye(CLASSES)[torch.arange(1000) % CLASSES] + 0.1 * torch.rand(
        1000, CLASSES, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(1000) % CLASSES

    def undone(spoiled: Tensor) -> float:
        seen = spoiled.argmax(1)
        back = torch.zeros(CLASSES, dtype=torch.int64).scatter_(0, seen[:CLASSES], labels[:CLASSES])
        return (back[seen] == labels).float().mean().item()

    assert undone(plain.roll(1, 1)) == 1
    assert undone(MARK.spoil(plain, enrolled.secret)) < 0.35


def test_asking_again_with_a_little_noise_tells_no_class(enrolled: Enrolled) -> None:
    row = torch.tensor([[3.0, 0, 0, 0, 0]]) + 1e-4 * noise(2000)[:, :CLASSES]
    counts = MARK.spoil(row, enrolled.secret).argmax(1).bincount(minlength=CLASSES)
    assert (counts - 400).abs().max() < 80  # 4.5 standard deviations


@given(
    st.integers(1, 40),
    st.sampled_from([(3,), (2, 4), ()]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_shuffles_are_orders_that_follow_from_secret_and_answer(
    classes: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    outputs = torch.randn(*shape, classes, generator=torch.Generator().manual_seed(classes)).to(dtype)
    orders = shuffles(Secret(bytes(32), {}), outputs)
    assert torch.equal(orders.sort(-1).values, torch.arange(classes).expand(outputs.shape))
    assert torch.equal(orders, shuffles(Secret(bytes(32), {}), outputs))
    if classes == 40:
        assert not torch.equal(orders, shuffles(Secret(b"\1" * 32, {}), outputs))
        assert not torch.equal(orders, shuffles(Secret(bytes(32), {}), outputs + 1))


def test_no_answers_stay_no_answers() -> None:
    assert shuffles(Secret(bytes(32), {}), torch.empty(0, 3)).shape == (0, 3)
