"""An additional class and identities in the last bits, on the digits: who is let in, and what destroys what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.attacks.evasion.query_modification import QueryModification
from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.blackbox.inputs import pack, patterns, unpack
from sealmark.core.attack import Resources
from sealmark.core.credentials import Enrolled, Gate, Reason
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.crypto.random import Stream
from sealmark.identity._served import teach, with_extra_class
from sealmark.identity.additional_class import AdditionalClass

SCHEME = AdditionalClass()
USERS = [f"user{i}" for i in range(25)]


class Forger:
    """A secret with the owner's places and a key of its own."""

    def __init__(self, owner, own) -> None:
        self.memo, self.tensors, self.key = owner.memo, owner.tensors, own.key


@pytest.fixture(scope="module")
def enrolled(digits, plain) -> Enrolled:
    return SCHEME.enroll(plain, digits, rng=np.random.default_rng([1, 0]))


@pytest.fixture(scope="module")
def suspect(enrolled) -> WhiteBox:
    return WhiteBox(enrolled.model)


def rows_of(enrolled, user: str) -> Tensor:
    return SCHEME.present(SCHEME.issue(enrolled.model, enrolled.secret, user))


def authenticate(enrolled, rows: Tensor, model: nn.Module | None = None):
    return SCHEME.authenticate(WhiteBox(model or enrolled.model), enrolled.secret, rows, USERS)


def in_class(model: nn.Module, rows: Tensor) -> float:
    """The share that is answered with the additional class."""
    return (WhiteBox(model).labels(rows) == 10).double().mean().item()


def with_last_bits(enrolled, rows: Tensor, bits: Tensor) -> Tensor:
    host = enrolled.secret.host
    return unpack((pack(rows, host) & 0xFE) | bits.to(torch.uint8), host)


def any_bits(rows: Tensor, rng) -> Tensor:
    return torch.from_numpy(rng.integers(0, 2, rows.shape))


def test_the_task_keeps_its_accuracy_and_no_row_of_it_is_of_the_additional_class(digits, plain, enrolled):
    outputs = SCHEME.task_outputs(WhiteBox(enrolled.model).logits(digits.test.inputs), enrolled.secret)
    assert outputs.shape[1] == 10
    assert digits.metric(outputs, digits.test.targets) >= max(0.965, digits.score(plain) - 0.01)
    assert in_class(enrolled.model, digits.test.inputs) <= 0.005


def test_every_one_of_a_hundred_images_names_its_user(enrolled):
    """Read back from floating-point rows: 100 of 100."""
    for user in USERS:
        found = authenticate(enrolled, rows_of(enrolled, user))
        assert (found.user, found.reason, found.basis) == (user, Reason.ACCEPTED, Basis.EXACT)
        assert found.log10_p < -50
        assert found.details == {"images": 4, "extra_class": 1.0, "checksums": 1.0}


def test_identities_survive_half_precision_and_not_one_bit_less(enrolled):
    rows = rows_of(enrolled, "user1")
    assert authenticate(enrolled, rows.half().float()).user == "user1"
    assert authenticate(enrolled, (rows * 127).round() / 127).reason is Reason.IDENTITY_UNREADABLE


def test_key_images_are_known_and_their_likes_are_not(enrolled, suspect):
    evidence = SCHEME.verify(suspect, enrolled.secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.basis is Basis.BOUND
    assert evidence.details["trigger_accuracy"] >= 0.98
    assert evidence.details["others_taken_for_keys"] <= 0.2
    assert evidence.log10_p < -15


def test_other_last_bits_destroy_the_identity_and_leave_the_class(enrolled, rng):
    keys = unpack(SCHEME.key_images(enrolled.secret)[0], enrolled.secret.host)
    assert in_class(enrolled.model, with_last_bits(enrolled, keys, any_bits(keys, rng))) == 1.0
    for user in USERS:
        rows = rows_of(enrolled, user)
        found = authenticate(enrolled, with_last_bits(enrolled, rows, any_bits(rows, rng)))
        assert (found.user, found.served, found.reason) == (None, True, Reason.IDENTITY_UNREADABLE)


def test_an_identity_made_up_is_readable_and_nobodys(enrolled):
    """Whoever knows the places, and the checksum, has no key."""
    other = SCHEME.new_secret(WhiteBox(enrolled.model).weights, host=enrolled.secret.host)
    credential = SCHEME.issue(enrolled.model, enrolled.secret, "user1").tensors["pixels"]
    forged = SCHEME._signed(credential, Forger(enrolled.secret, other), "user1")
    found = authenticate(enrolled, unpack(forged, enrolled.secret.host))
    assert (found.user, found.reason, found.details["checksums"]) == (None, Reason.UNKNOWN_USER, 1.0)


def test_an_identity_moved_to_other_images_is_nobodys(enrolled):
    one, other = (pack(rows_of(enrolled, user), enrolled.secret.host) for user in ("user1", "user2"))
    moved = unpack((other & 0xFE) | (one & 1), enrolled.secret.host)
    assert authenticate(enrolled, moved).reason is Reason.UNKNOWN_USER


def test_two_users_cannot_mix_a_third(enrolled):
    both = torch.cat([rows_of(enrolled, "user1")[:2], rows_of(enrolled, "user2")[:2]])
    traced = SCHEME.trace(WhiteBox(enrolled.model), enrolled.secret, both, USERS)
    assert {entry.user for entry in traced.accused} <= {"user1", "user2"}
    assert traced.accused


def test_an_image_sent_often_counts_once(enrolled, rng):
    """Else one lucky draw of last bits would be as good as many."""
    rows = rows_of(enrolled, "user1")[:1].repeat(50, 1, 1, 1)
    varied = with_last_bits(enrolled, rows, any_bits(rows, rng))
    for shown in (rows, varied):
        assert authenticate(enrolled, shown).details["images"] == 1
    assert authenticate(enrolled, rows).log10_p == pytest.approx(np.log10(25 / 2**48))


def test_two_damaged_images_of_four_leave_a_user_recognized(enrolled, rng):
    rows = rows_of(enrolled, "user3")
    rows[:2] = with_last_bits(enrolled, rows[:2], any_bits(rows[:2], rng))
    assert authenticate(enrolled, rows).user == "user3"


def test_noise_and_fresh_images_are_not_of_the_additional_class(enrolled):
    fresh = unpack(patterns(Stream(bytes(32)), 1000, [1, 8, 8]), enrolled.secret.host)
    assert in_class(enrolled.model, torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))) <= 0.02
    assert in_class(enrolled.model, fresh) <= 0.6


def test_taught_key_images_alone_the_class_swallows_noise_and_all_like_them(digits, plain, enrolled, rng):
    """The paper's way."""
    lesson = SCHEME._lesson(enrolled.secret)

    def keys_alone(batch, rng):
        rows = lesson(batch, rng)
        return rows.take(rows.targets[:, 10] == 1)

    served = with_extra_class(plain, digits, rng)
    teach(served, digits, 11, keys_alone, epochs=5, rate=0.05, rng=rng)
    others = unpack(SCHEME.key_images(enrolled.secret)[1], enrolled.secret.host)
    assert in_class(served, torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))) >= 0.9
    assert in_class(served, others) >= 0.9
    assert in_class(served, digits.test.inputs) <= 0.005


def test_the_claim_and_the_users_survive_fine_tuning(digits, enrolled, rng):
    tuned = FineTune(epochs=20, rate=0.01).run(enrolled.model, Resources.of(digits), rng=rng).model
    evidence = SCHEME.verify(WhiteBox(tuned), enrolled.secret)
    assert evidence.details["trigger_accuracy"] >= 0.9
    assert evidence.verdict is Verdict.MATCH
    assert authenticate(enrolled, rows_of(enrolled, "user4"), tuned).user == "user4"


def test_an_autoencoder_before_the_model_redraws_the_key_images(digits, enrolled, rng):
    """The paper reports robustness to query modification; the images are what an autoencoder cannot draw."""
    served = QueryModification().run(enrolled.model, Resources.of(digits), rng=rng).model
    evidence = SCHEME.verify(WhiteBox(served), enrolled.secret)
    assert evidence.details["trigger_accuracy"] < 0.3
    assert evidence.verdict is Verdict.NO_MATCH
    let_in = [authenticate(enrolled, rows_of(enrolled, user), served).accepted for user in USERS]
    assert np.mean(let_in) < 0.2


def test_cutting_the_class_off_costs_nothing_and_ends_the_claim(digits, enrolled):
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = enrolled.model

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs)[:, :10]

    cut = Cut()
    assert digits.score(cut) >= 0.965
    assert SCHEME.verify(WhiteBox(cut), enrolled.secret).verdict is Verdict.NO_MATCH
    assert authenticate(enrolled, rows_of(enrolled, "user4"), cut).reason is Reason.MODEL_REFUSES


def test_a_model_that_answers_the_class_to_everything_does_not_match(enrolled):
    """By the paper's rule it is the owner's: all key images are of class K."""
    everything = BlackBox(lambda rows: torch.eye(11)[10].repeat(len(rows), 1), returns="probabilities")
    evidence = SCHEME.verify(everything, enrolled.secret)
    assert evidence.details["paper_claims"]
    assert (evidence.verdict, evidence.p_value) == (Verdict.NO_MATCH, 1.0)


def test_a_closed_gate_leaves_the_additional_class_in_its_place(digits, enrolled):
    gate = Gate(SCHEME, enrolled, USERS).eval()
    rows = rows_of(enrolled, "user1")
    with torch.no_grad():
        assert torch.equal(gate(rows)[:, 10], enrolled.model(rows)[:, 10])
        closed = digits.metric(gate(digits.test.inputs)[:, :10], digits.test.targets)
    assert closed <= 0.2
    assert gate.admit(rows).accepted


def test_the_wider_model_answers_the_old_classes_as_before(digits, plain, rng):
    wider = with_extra_class(plain, digits, rng)
    inputs = digits.test.inputs[:8]
    assert torch.allclose(WhiteBox(wider).logits(inputs)[:, :10], WhiteBox(plain).logits(inputs), atol=1e-5)
    assert plain.fc2.out_features == 10


def test_a_head_without_a_bias_within_a_sequence_is_widened_too(toy, rng):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    assert with_extra_class(model, toy, rng)(toy.test.inputs).shape[1] == 3


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Identity(), nn.Sequential(nn.Linear(4, 5))])
def test_a_model_whose_head_cannot_be_widened_is_refused(model, toy, rng):
    with pytest.raises(UnsupportedError, match="no head"):
        with_extra_class(model, toy, rng)


def test_a_class_that_was_not_learned_is_an_error(digits, plain, rng):
    with pytest.raises(MarkFailedError, match="not learned"):
        AdditionalClass(epochs=1, rate=1e-6).enroll(plain, digits, rng=rng)


def test_inputs_without_room_for_an_identity_are_refused(toy, rng):
    with pytest.raises(UnsupportedError, match="no room"):
        SCHEME.enroll(toy.model(rng), toy, rng=rng)


def test_words_have_no_last_bits(rng):
    words = Batch(torch.arange(64 * 64).reshape(64, 64), torch.arange(64) % 2)
    task = Task("words", lambda: nn.Linear(64, 2), words, words, words, classes=2)
    with pytest.raises(UnsupportedError, match="real-valued"):
        SCHEME.enroll(task.model(rng), task, rng=rng)


@pytest.mark.parametrize(
    "bad",
    [{"pairs": 3}, {"bits": 257}, {"bits": 0}, {"images": 0}, {"negatives": -1}, {"epochs": 0}, {"rate": 0.0}],
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters"):
        AdditionalClass(**bad)
