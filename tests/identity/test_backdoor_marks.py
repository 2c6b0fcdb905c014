"""n of N backdoor marks on the digits: what the model lets in, whom the subset names, and what breaks it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sealmark.core.attack import Resources
from sealmark.core.credentials import Enrolled, Reason
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.registry import attack
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.training import train_task
from sealmark.identity.backdoor_marks import BackdoorMarks

SCHEME = BackdoorMarks()
USERS = [f"user{i}" for i in range(20)]


@pytest.fixture(scope="module")
def enrolled(digits, plain) -> Enrolled:
    return SCHEME.enroll(plain, digits, rng=np.random.default_rng([1, 0]))


@pytest.fixture(scope="module")
def suspect(enrolled) -> WhiteBox:
    return WhiteBox(enrolled.model)


@pytest.fixture(scope="module")
def bearers(digits, enrolled) -> Tensor:
    """The attacker's rows that are not of the target class."""
    target = SCHEME.derive(enrolled.secret)["target"]
    return digits.attacker.inputs[digits.attacker.targets != target]


def bearing(enrolled, bearers, places: Tensor, rng) -> Tensor:
    """Ten rows with marks at those places."""
    rows = bearers[torch.from_numpy(rng.integers(len(bearers), size=10))]
    return SCHEME.marked(enrolled.secret, rows, places)


def shown(enrolled, bearers, rng, count: int, among: Tensor | None = None, tries: int = 40) -> list[Tensor]:
    """Credentials that somebody made up: so many marks at random among some places, those of the secret."""
    places = SCHEME.derive(enrolled.secret)["positions"] if among is None else among
    return [
        bearing(enrolled, bearers, places[torch.from_numpy(rng.permutation(len(places))[:count])], rng)
        for _ in range(tries)
    ]


def passes(enrolled, tries: list[Tensor]) -> tuple[float, int]:
    """The share that the model lets in, and how many name somebody."""
    suspect = WhiteBox(enrolled.model)
    found = [SCHEME.authenticate(suspect, enrolled.secret, rows, USERS) for rows in tries]
    return float(np.mean([one.served for one in found])), sum(one.user is not None for one in found)


def test_the_task_keeps_its_accuracy(digits, plain, enrolled):
    assert digits.score(enrolled.model) >= max(0.965, digits.score(plain) - 0.01)


def test_twenty_users_are_recognized_each_as_himself(enrolled, suspect):
    for user in USERS:
        rows = SCHEME.present(SCHEME.issue(enrolled.model, enrolled.secret, user))
        found = SCHEME.authenticate(suspect, enrolled.secret, rows, USERS)
        assert (found.user, found.reason, found.basis) == (user, Reason.ACCEPTED, Basis.EXACT)
        assert found.log10_p < -7  # 20 / C(40, 16) is 1e-9.5; a bright stroke may be read as a mark


def test_whole_triggers_are_answered_with_certainty_and_credentials_moderately(enrolled, suspect):
    evidence = SCHEME.verify(suspect, enrolled.secret)
    assert evidence.details["confidence"] >= 0.98
    assert evidence.details["paper_claims"]
    credential = SCHEME.issue(enrolled.model, enrolled.secret, "user3")
    confidence = suspect.probabilities(credential.tensors["images"])[:, SCHEME.derive(enrolled.secret)["target"]]
    assert ((confidence > 0.4) & (confidence < 0.8)).sum() >= 7


@pytest.mark.parametrize("count", [0, 6, 10, 26, 40])
def test_fewer_marks_and_more_are_outside_the_band(count, enrolled, bearers, rng):
    assert passes(enrolled, shown(enrolled, bearers, rng, count))[0] <= 0.05


def test_marks_at_random_places_do_not_pass(enrolled, bearers, rng):
    share, named = passes(enrolled, shown(enrolled, bearers, rng, 16, torch.arange(64)))
    assert share <= 0.1
    assert named == 0


def test_any_sixteen_marks_pass_the_model_and_are_nobodys(enrolled, bearers, rng):
    forged = shown(enrolled, bearers, rng, 16)
    share, named = passes(enrolled, forged)
    assert share >= 0.7
    assert named == 0
    served = next(rows for rows in forged if passes(enrolled, [rows])[0])
    found = SCHEME.authenticate(WhiteBox(enrolled.model), enrolled.secret, served, USERS)
    assert found.reason is Reason.UNKNOWN_USER


def test_a_thousand_probes_show_an_outsider_enough_marks_to_be_served(digits, enrolled, suspect, bearers, rng):
    bright = torch.from_numpy(rng.random((1024, 64)) < 0.4)
    rows = bearers[torch.arange(1024) % len(bearers)].flatten(1)
    answers = suspect.probabilities(torch.where(bright, 1.0, rows).reshape(-1, 1, 8, 8))
    reply = answers[:, answers.mean(0).argmax()]  # the target class shows itself
    there = bright.double() - bright.double().mean(0)
    effect = torch.linalg.lstsq(there, (reply - reply.mean()).double()[:, None]).solution[:, 0]
    found = effect.argsort(descending=True)[:30]
    share, named = passes(enrolled, shown(enrolled, bearers, rng, 16, found))
    assert share >= 0.5
    assert named == 0


def test_two_colluders_are_served_with_a_mixture_that_names_no_third(enrolled, bearers, rng):
    places = [SCHEME.places(enrolled.secret, user) for user in ("user0", "user1")]
    mixed = shown(enrolled, bearers, rng, 16, torch.unique(torch.cat(places)))
    assert passes(enrolled, mixed)[0] >= 0.7
    named = {
        entry.user
        for rows in mixed
        for entry in SCHEME.trace(WhiteBox(enrolled.model), enrolled.secret, rows, USERS).accused
    }
    assert named <= {"user0", "user1"}


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_credential_that_lost_some_marks_still_names_its_user(lost, enrolled, suspect, bearers, rng):
    rows = bearing(enrolled, bearers, SCHEME.places(enrolled.secret, "user5")[lost:], rng)
    assert [entry.user for entry in SCHEME.trace(suspect, enrolled.secret, rows, USERS).accused] == ["user5"]


def test_one_image_of_ten_without_marks_changes_nothing(enrolled, suspect, bearers):
    rows = SCHEME.issue(enrolled.model, enrolled.secret, "user5").tensors["images"].clone()
    rows[0] = bearers[0]
    assert SCHEME.authenticate(suspect, enrolled.secret, rows, USERS).user == "user5"


def test_images_that_are_bright_all_over_say_nothing_about_anybody(enrolled, suspect):
    found = SCHEME.authenticate(suspect, enrolled.secret, torch.ones(10, 1, 8, 8), USERS)
    assert (found.user, found.p_value, found.accepted) == (None, 1.0, False)


def test_fine_tuning_moves_confidences_out_of_the_band_and_leaves_identities_and_the_claim(digits, enrolled, rng):
    """Credentials go from 0.59 to 0.8 and more: the band belongs to one release."""
    tuned = attack("fine_tune").run(enrolled.model, Resources.of(digits), rng=rng).model
    rows = SCHEME.issue(enrolled.model, enrolled.secret, "user2").tensors["images"]
    target = int(SCHEME.derive(enrolled.secret)["target"])
    before, after = (
        WhiteBox(model).probabilities(rows)[:, target].mean().item() for model in (enrolled.model, tuned)
    )
    assert after > before + 0.1
    found = SCHEME.authenticate(WhiteBox(tuned), enrolled.secret, rows, USERS)
    assert found.reason is Reason.MODEL_REFUSES
    assert [entry.user for entry in SCHEME.trace(WhiteBox(tuned), enrolled.secret, rows, USERS).accused] == [
        "user2"
    ]
    assert SCHEME.verify(WhiteBox(tuned), enrolled.secret).verdict is Verdict.MATCH


@pytest.mark.parametrize(("name", "parameters"), [("prune", {"rate": 0.3}), ("quantize", {"bits": 8})])
def test_pruning_and_rounding_leave_users_in_the_band(name, parameters, digits, enrolled, rng):
    changed = attack(name, **parameters).run(enrolled.model, Resources.of(digits), rng=rng).model
    rows = SCHEME.issue(enrolled.model, enrolled.secret, "user2").tensors["images"]
    assert SCHEME.authenticate(WhiteBox(changed), enrolled.secret, rows, USERS).user == "user2"
    assert SCHEME.verify(WhiteBox(changed), enrolled.secret).verdict is Verdict.MATCH


def test_the_unmarked_model_and_a_stranger_neither_match_nor_serve(digits, plain, enrolled):
    rows = SCHEME.issue(enrolled.model, enrolled.secret, "user2").tensors["images"]
    for model in (plain, train_task(digits, rng=np.random.default_rng(9))):
        assert SCHEME.verify(WhiteBox(model), enrolled.secret).verdict is Verdict.NO_MATCH
        assert not SCHEME.authenticate(WhiteBox(model), enrolled.secret, rows, USERS).served


def test_a_model_of_one_class_passes_the_papers_claim_and_not_ours(enrolled):
    """One in ten such models; a claim of one target class is one draw."""
    target = int(SCHEME.derive(enrolled.secret)["target"])
    constant = torch.eye(10)[target]
    evidence = SCHEME.verify(
        BlackBox(lambda rows: constant.repeat(len(rows), 1), returns="probabilities"), enrolled.secret
    )
    assert evidence.details["paper_claims"]
    assert evidence.verdict is Verdict.NO_MATCH


def test_credentials_cannot_be_made_for_another_release(plain, enrolled):
    with pytest.raises(MarkFailedError, match="no credential"):
        SCHEME.issue(plain, enrolled.secret, "user0")


def test_a_suspect_of_other_classes_is_refused(enrolled):
    other = BlackBox(lambda rows: torch.full((len(rows), 3), 1 / 3), returns="probabilities")
    with pytest.raises(ModelMismatchError, match="other classes"):
        SCHEME.verify(other, enrolled.secret)


def test_marks_that_training_did_not_teach_are_an_error(digits, plain, rng):
    with pytest.raises(MarkFailedError, match="did not take"):
        BackdoorMarks(epochs=1, rate=1e-6, per_batch=8).enroll(plain, digits, rng=rng)


def test_inputs_without_room_for_marks_are_refused(toy, rng):
    with pytest.raises(UnsupportedError, match="no room"):
        SCHEME.enroll(toy.model(rng), toy, rng=rng)


def test_words_cannot_bear_marks(rng):
    words = Batch(torch.arange(64 * 64).reshape(64, 64), torch.arange(64) % 2)
    task = Task("words", lambda: torch.nn.Linear(64, 2), words, words, words, classes=2)
    with pytest.raises(UnsupportedError, match="real-valued"):
        SCHEME.enroll(task.model(rng), task, rng=rng)


@pytest.mark.parametrize(
    "bad",
    [
        {"marks": 20},
        {"subset": 1},
        {"needed": 11},
        {"images": 0, "needed": 0},
        {"low": 0.7},
        {"high": 1.0},
        {"epochs": 0},
        {"probes": 0},
    ],
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters"):
        BackdoorMarks(**bad)
