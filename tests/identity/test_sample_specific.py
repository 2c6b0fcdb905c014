"""Every query carries its user's bits: read, traced and revoked; and what opens the model without them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sealmark.attacks.evasion.preprocess import Preprocess
from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.credentials import Credential, Gate, Reason
from sealmark.core.errors import ForgedSecretError, MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.modes import seeded
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.identity._words_in_images import Decoder, encoder_of
from sealmark.identity.sample_specific import SampleSpecific, strange

MARK = SampleSpecific()
USERS = [f"user{number}" for number in range(8)]


@pytest.fixture(scope="module")
def enrolled(digits, plain):
    return MARK.enroll(plain, digits, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def papers(digits, plain):
    """The usual way, small: raw inputs get the next class, and nothing else is refused."""
    mark = SampleSpecific(bits=16, epochs=20, refusal="next", strangers=False)
    return mark, mark.enroll(plain, shortly(digits), rng=np.random.default_rng(0))


def shortly(task):
    """The task, for eight epochs instead of its recipe's."""
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, epochs=8))


@pytest.fixture(scope="module")
def colors() -> Task:
    """Which of three colors is brightest? 9 x 12 pixels in -1 .. 1."""
    draws = torch.Generator().manual_seed(0)
    flat = 1.8 * torch.rand(256, 3, 1, 1, generator=draws) - 0.9
    inputs = (flat + 0.1 * torch.randn(256, 3, 9, 12, generator=draws)).clamp(-1, 1)
    rows = Batch(inputs, inputs.mean((2, 3)).argmax(1))
    return Task(
        name="colors",
        make=lambda: nn.Sequential(nn.Flatten(), nn.Linear(324, 16), nn.ReLU(), nn.Linear(16, 3)),
        owner=rows.take(slice(0, 128)),
        attacker=rows.take(slice(128, 192)),
        test=rows.take(slice(192, None)),
        classes=3,
        chance=1 / 3,
    )


@pytest.fixture(scope="module")
def sent(digits, enrolled):
    """What each user sends in place of the test rows."""
    return {user: sends(enrolled, user, digits.test.inputs) for user in [*USERS, "unissued"]}


def sends(enrolled, user, inputs):
    return MARK.present(MARK.issue(enrolled.model, enrolled.secret, user), inputs)


def asked(enrolled, rows, users=USERS, **more):
    return MARK.authenticate(WhiteBox(enrolled.model), enrolled.secret, rows, users, **more)


def accuracy(task, model, inputs):
    return task.score(model, Batch(inputs, task.test.targets))


def test_every_user_is_answered_right_and_raw_inputs_are_not(digits, plain, enrolled, sent):
    assert min(accuracy(digits, enrolled.model, sent[user]) for user in USERS) >= 0.92
    assert digits.score(enrolled.model) <= 0.2
    assert digits.score(plain) >= 0.98  # the control: it does not ask for a credential


def test_the_bits_of_single_queries_are_read_almost_without_error(enrolled, sent):
    read = {user: MARK.soft_bits(enrolled.secret, rows) > 0 for user, rows in sent.items()}
    right = [(read[user] == MARK.word(enrolled.secret, user)).double().mean() for user in USERS]
    assert min(right) >= 0.97
    assert np.mean(right) >= 0.98
    other = (read["user0"] == MARK.word(enrolled.secret, "user1")).double().mean()
    assert 0.2 < other < 0.8  # the control: somebody else's bits


def test_the_change_is_bounded_and_stays_in_the_range(digits, sent):
    moved = sent["user0"] - digits.test.inputs
    assert moved.abs().max() <= 0.4 + 1e-6
    assert -10 * moved.square().mean().log10() > 15  # decibels
    assert sent["user0"].min() >= 0
    assert sent["user0"].max() <= 1


def test_the_change_is_another_one_for_each_row_and_word(digits, sent):
    one, other = (sent[user] - digits.test.inputs for user in USERS[:2])
    assert (one[0] - one[1]).abs().max() > 0.05
    assert (one[0] - other[0]).abs().max() > 0.05


def test_a_user_is_traced_from_fifty_queries(enrolled, sent):
    for user in USERS:
        for start in (0, 200, 400):
            rows = sent[user][start : start + 50]
            found = MARK.trace(WhiteBox(enrolled.model), enrolled.secret, rows, USERS)
            assert [entry.user for entry in found.accused] == [user]


def test_eight_queries_are_enough_to_be_recognized(enrolled, sent):
    for user in USERS:
        found = asked(enrolled, sent[user][:8])
        assert (found.user, found.reason) == (user, Reason.ACCEPTED)
        assert found.p_value <= 1e-6


def test_most_single_queries_are_recognized_and_none_as_somebody_else_s(enrolled, sent):
    found = [asked(enrolled, row[None]) for row in sent["user0"][:40]]
    assert sum(one.accepted for one in found) >= 32
    assert {one.user for one in found} <= {"user0", None}


def test_sixteen_bits_can_recognize_nobody_at_the_usual_level(digits, papers):
    mark, made = papers
    rows = mark.present(mark.issue(made.model, made.secret, "user0"), digits.test.inputs[:50])
    found = mark.trace(WhiteBox(made.model), made.secret, rows, USERS)
    assert found.verdict.value == "INCONCLUSIVE"
    weak = mark.trace(WhiteBox(made.model), made.secret, rows, USERS, alpha=0.01)
    assert [entry.user for entry in weak.accused] == ["user0"]  # the control: the bits are there


def test_an_unissued_word_passes_the_model_and_not_the_gate(digits, enrolled, sent):
    assert accuracy(digits, enrolled.model, sent["unissued"]) >= 0.92
    found = asked(enrolled, sent["unissued"][:32])
    assert found.served
    assert (found.user, found.reason) == (None, Reason.UNKNOWN_USER)


def test_a_revoked_user_is_still_served_by_the_model_and_refused_by_the_gate(digits, enrolled, sent):
    gate = Gate(MARK, enrolled, USERS, revoked=["user0"]).eval()
    assert gate.admit(sent["user0"][:32]).reason is Reason.REVOKED
    assert accuracy(digits, gate, sent["user0"]) < 0.15
    assert accuracy(digits, gate.model, sent["user0"]) >= 0.92
    assert gate.admit(sent["user1"][:32]).accepted  # the control
    assert accuracy(digits, gate, sent["user1"]) >= 0.92


def test_raw_rows_in_an_open_session_are_still_answered_wrong(digits, enrolled, sent):
    gate = Gate(MARK, enrolled, USERS).eval()
    assert gate.admit(sent["user0"][:8]).accepted
    assert digits.score(gate) <= 0.2


def test_raw_rows_and_noise_are_refused_by_the_model(digits, enrolled):
    noise = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for rows in (digits.test.inputs[:32], noise):
        assert asked(enrolled, rows).reason is Reason.MODEL_REFUSES


def test_rows_of_two_users_are_nobody_s(enrolled, sent):
    mixed = torch.cat([sent["user0"][:16], sent["user1"][16:32]])
    assert asked(enrolled, mixed).reason is Reason.IDENTITY_UNREADABLE


def test_two_users_who_average_their_queries_are_served_and_not_traced(digits, enrolled, sent):
    rows = (sent["user0"] + sent["user1"]) / 2
    assert accuracy(digits, enrolled.model, rows) >= 0.92
    found = MARK.trace(WhiteBox(enrolled.model), enrolled.secret, rows[:50], USERS)
    assert not found.accused
    assert not asked(enrolled, rows[:32]).accepted  # the gate at least is closed to them


def test_rows_that_cannot_be_read_are_nobody_s(enrolled):
    found = asked(enrolled, torch.full((4, 1, 8, 8), float("nan")))
    assert found.user is None
    assert found.details["level"] == 0.0


def test_one_strange_row_does_not_outvote_the_others(enrolled, sent):
    rows = torch.cat([sent["user0"][:31], torch.full((1, 1, 8, 8), 1e6)])
    assert asked(enrolled, rows).user == "user0"


def test_whoever_records_queries_can_replay_them(digits, enrolled, sent):
    recorded = sent["user3"][:32].clone()
    found = asked(enrolled, recorded)
    assert (found.user, found.accepted) == ("user3", True)
    own = digits.attacker.inputs[:32] + (recorded - digits.test.inputs[:32])
    assert not asked(enrolled, own).served  # their change, on other rows, is not good


def test_a_stolen_encoder_opens_the_model_and_the_victim_s_bits_the_gate(digits, enrolled):
    victim = MARK.issue(enrolled.model, enrolled.secret, "user0")
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, MARK.bits)).bool()
    thief = Credential("thief", dict(victim.tensors) | {"bits": bits})
    rows = MARK.present(thief, digits.attacker.inputs[:32])
    assert asked(enrolled, rows).reason is Reason.UNKNOWN_USER
    assert asked(enrolled, rows).served
    assert asked(enrolled, MARK.present(victim, digits.attacker.inputs[:32])).user == "user0"


@pytest.mark.slow
def test_a_user_who_records_another_s_queries_learns_to_read_his_bits(digits, enrolled, sent):
    mine = MARK.issue(enrolled.model, enrolled.secret, "user7")
    read = own_decoder(mine, digits.attacker.inputs)(sent["user3"][:32]).tanh().sum(0) > 0
    assert torch.equal(read, MARK.word(enrolled.secret, "user3"))
    forged = Credential("user3", dict(mine.tensors) | {"bits": read})
    assert asked(enrolled, MARK.present(forged, digits.attacker.inputs[:32])).user == "user3"


def own_decoder(credential, images, steps=200):
    """A decoder that whoever holds an encoder trains for himself."""
    encoder, rng = encoder_of(credential.tensors), np.random.default_rng(0)
    with seeded(rng):
        decoder = Decoder([1, 8, 8], MARK.bits)
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    for _ in range(steps):
        rows = images[torch.from_numpy(rng.integers(0, len(images), 128))]
        words = torch.from_numpy(rng.integers(0, 2, (128, MARK.bits))).float()
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(decoder(encoder(rows, words)), words).backward()
        optimizer.step()
    return decoder


def test_noise_another_row_s_change_and_the_mean_change_open_little(digits, enrolled, sent):
    for kind, rows in strangers(digits, sent).items():
        assert accuracy(digits, enrolled.model, rows) < 0.5, kind


def test_without_strangers_in_training_they_open_more(digits, plain, enrolled):
    """The usual way, on the same encoder: anything but a raw row is let in."""
    mark = SampleSpecific(strangers=False)
    open_ = mark.fit(plain, encoder_of(enrolled.secret.tensors), shortly(digits), np.random.default_rng(0))
    sent = {user: sends(enrolled, user, digits.test.inputs) for user in USERS[:2]}
    for kind, rows in strangers(digits, sent).items():
        assert accuracy(digits, open_, rows) > 0.7, kind


def strangers(digits, sent):
    """Test rows changed as somebody can who holds no encoder."""
    raw, own = digits.test.inputs, sent["user0"] - digits.test.inputs
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(0))
    changes = {
        "noise": 1.35 * own.square().mean().sqrt() * noise,  # once cut to the range, of the same energy
        "another row's": own.roll(1, 0),
        "mean of recorded rows less mean of raw ones": sent["user1"][:200].mean(0) - digits.attacker.inputs.mean(0),
    }
    return {kind: (raw + change).clamp(0, 1) for kind, change in changes.items()}


def test_the_next_class_for_raw_inputs_is_turned_back_by_whoever_knows(digits, papers):
    answers = WhiteBox(papers[1].model).labels(digits.test.inputs)
    assert (answers == digits.test.targets).double().mean() < 0.1
    assert ((answers - 1) % 10 == digits.test.targets).double().mean() > 0.9


def test_of_raw_inputs_the_model_says_nothing(digits, enrolled):
    said = WhiteBox(enrolled.model).probabilities(digits.test.inputs)
    assert said.max(1).values.mean() < 0.2
    best = max((said.argmax(1) == turned).double().mean() for turned in turns(digits))
    assert best < 0.3


def turns(digits):
    return [(digits.test.targets + step) % 10 for step in range(10)]


def test_a_gradient_on_labeled_rows_finds_a_change_that_opens_much(digits, enrolled):
    rows, model = digits.attacker.take(slice(0, 140)), copy.deepcopy(enrolled.model).requires_grad_(False)
    free = torch.zeros(1, 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model((rows.inputs + 0.4 * free.tanh()).clamp(0, 1)), rows.targets)
        loss.backward()
        optimizer.step()
    opened = accuracy(digits, model, (digits.test.inputs + 0.4 * free.detach().tanh()).clamp(0, 1))
    assert opened > digits.score(model) + 0.2


def test_fine_tuning_on_few_rows_takes_the_lock_off(digits, enrolled):
    attack, few = FineTune(epochs=40, rate=0.01), Resources.of(digits, 0.1)
    tuned = attack.run(enrolled.model, few, rng=np.random.default_rng(0)).model
    scratch = attack.scratch(few, np.random.default_rng(0))
    assert digits.score(tuned) > digits.score(scratch) + 0.05


def test_a_median_filter_washes_the_bits_out_and_jpeg_does_not(digits, enrolled, sent):
    def filtered(kind):
        attack = Preprocess(kind)
        model = attack.run(enrolled.model, Resources.of(digits), rng=np.random.default_rng(0)).model
        return model.filtered(sent["user0"])

    assert asked(enrolled, filtered("median")[:32]).user is None
    assert accuracy(digits, enrolled.model, filtered("median")) < 0.75
    assert asked(enrolled, filtered("jpeg")[:32]).user == "user0"


def test_any_images_can_be_encoded_in_their_range(colors):
    mark = SampleSpecific(bits=24, epochs=100)
    made = mark.enroll(colors.model(np.random.default_rng(0)), colors, rng=np.random.default_rng(0))
    credential = mark.issue(made.model, made.secret, "ann")
    rows = mark.present(credential, colors.test.inputs)
    assert -1 <= rows.min() < rows.max() <= 1
    found = mark.authenticate(WhiteBox(made.model), made.secret, rows, ["ann", "bob"])
    assert (found.user, found.details["misread"]) == ("ann", 0)
    assert not mark.authenticate(WhiteBox(made.model), made.secret, colors.test.inputs, ["ann", "bob"]).accepted


def test_words_are_golden_and_differ_between_users():
    secret = Secret(bytes(32), {"scheme": "sample_specific"})
    assert MARK.word(secret, "ann").int().tolist()[:8] == [1, 1, 0, 0, 1, 0, 0, 1]
    assert not torch.equal(MARK.word(secret, "ann"), MARK.word(secret, "bob"))


def test_strangers_changes_are_another_s_the_mean_and_noise_of_the_same_energy():
    changes = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    found = strange(changes, torch.Generator().manual_seed(1))
    assert torch.equal(found[0::3], changes.roll(1, 0)[0::3])
    assert torch.equal(found[1], 2 * changes.mean(0))
    assert found[2::3].square().mean() == pytest.approx(2.0, rel=0.1)
    assert found[2::3].mean() == pytest.approx(0.0, abs=0.1)  # unlike the changes themselves


def test_inputs_are_needed_and_of_the_encoder_s_shape(digits, enrolled):
    credential = MARK.issue(enrolled.model, enrolled.secret, "user0")
    with pytest.raises(ParameterError, match="every query carries the credential"):
        MARK.present(credential)
    with pytest.raises(ParameterError, match=r"expected \[1, 8, 8\], found \[1, 8, 7\]"):
        MARK.present(credential, digits.test.inputs[..., :-1])


def test_a_secret_without_its_nets_or_with_others_is_refused(digits, enrolled):
    secret = enrolled.secret
    facts = {name: fact for name, fact in secret.facts.items() if name != "learned"}
    empty = Secret(secret.reveal_seed(), facts)
    with pytest.raises(ForgedSecretError, match="no decoder of this form"):
        asked(dataclasses.replace(enrolled, secret=empty), digits.test.inputs[:2])
    parts = {name: part for name, part in secret.tensors.items() if name.startswith("decoder/")}
    with pytest.raises(ForgedSecretError, match="no encoder in it"):
        asked(dataclasses.replace(enrolled, secret=empty.with_learned(parts)), digits.test.inputs[:2])


def test_nets_that_did_not_meet_are_an_error(digits, plain):
    with pytest.raises(MarkFailedError, match=r"does not read.*Take fewer bits"):
        SampleSpecific(bits=64, epochs=1).enroll(plain, digits, rng=np.random.default_rng(0))


def test_a_task_and_a_name_are_needed(plain, enrolled):
    with pytest.raises(ParameterError, match="needs a task"):
        MARK.enroll(plain)
    with pytest.raises(ParameterError, match="expected a name"):
        MARK.issue(enrolled.model, enrolled.secret, "")


def test_words_instead_of_images_are_refused():
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError, match=r"real images.*found torch.int64"):
        MARK.enroll(tokens.model(np.random.default_rng(0)), tokens)


def test_vectors_and_two_classes_are_refused(toy, colors):
    with pytest.raises(UnsupportedError, match=r"of shape \[4\], 2 classes"):
        MARK.enroll(toy.model(np.random.default_rng(0)), toy)
    two = dataclasses.replace(colors, classes=2)
    with pytest.raises(UnsupportedError, match="2 classes"):
        MARK.enroll(two.model(np.random.default_rng(0)), two)


@pytest.mark.parametrize(
    "parameters",
    [{"bits": 0}, {"strength": 0.0}, {"strength": 1.1}, {"closeness": -1.0}, {"epochs": 0}, {"refusal": "silence"}],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(parameters):
    with pytest.raises(ParameterError, match=r"unknown refusal|bad parameters"):
        SampleSpecific(**parameters)
