"""ActiveGuard on the digits: images of a class and a confidence, the control layer, the weight watermark."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.credentials import Credential, Enrolled, Gate, Reason
from sealmark.core.errors import (
    MarkFailedError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
    UnsupportedError,
)
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Batch
from sealmark.core.weights import weights_of
from sealmark.identity.activeguard import ActiveGuard

SCHEME = ActiveGuard()
USERS = [f"user{i}" for i in range(20)]
MANY = [f"user{i}" for i in range(60)]


@pytest.fixture(scope="module")
def enrolled(plain, digits) -> Enrolled:
    return SCHEME.enroll(plain, digits, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def secret(enrolled) -> Secret:
    return enrolled.secret


@pytest.fixture(scope="module")
def served(enrolled) -> WhiteBox:
    return WhiteBox(enrolled.model)


@pytest.fixture(scope="module")
def held(digits, enrolled) -> dict[str, Credential]:
    issued = [SCHEME.issue(enrolled.model, enrolled.secret, user, task=digits) for user in USERS]
    return {credential.user: credential for credential in issued}


@pytest.fixture(scope="module")
def tuned(digits, enrolled) -> nn.Module:
    attack = registry.attack("fine_tune", epochs=5, rate=0.01)
    return attack.run(enrolled.model, Resources.of(digits), rng=np.random.default_rng(0)).model


def images(credential):
    return credential.tensors["images"]


def in_their_cells(model, secret, held):
    """How many images of how many still lie in the cells of their users."""
    found = (SCHEME.examine(WhiteBox(model), secret, images(c), [user]) for user, c in held.items())
    return sum(float(one.suspicion.statistics[0]) for one in found), SCHEME.images * len(held)


def taken_for_somebody(scheme, secret, served, rows):
    """Share of presentations that the paper's rule lets in, as whomsoever of 60 users."""
    shown = rows.unflatten(0, (-1, scheme.images))
    return np.mean([scheme.examine(served, secret, some, MANY).served for some in shown])


def noise(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_every_user_of_twenty_gets_images_and_is_recognized_by_them(held, secret, served):
    assert len(held) == 20
    for user, credential in held.items():
        found = SCHEME.authenticate(served, secret, images(credential), USERS)
        assert (found.user, found.reason, found.served) == (user, Reason.ACCEPTED, True)
    assert found.p_value == pytest.approx(20 / 450**3)
    assert found.basis is Basis.BOUND


def test_images_are_bytes_of_their_class_within_half_the_tolerance(held, secret, enrolled):
    for user, credential in held.items():
        steps = images(credential) * 255
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        cells = torch.from_numpy(SCHEME._cells(secret, user))
        confidence, top = WhiteBox(enrolled.model).probabilities(images(credential)).max(-1)
        assert torch.equal(top, cells // 45)
        wanted = 0.5 + 0.01 * (cells % 45) + 0.005
        assert (confidence - wanted).abs().max() < 0.0026


def test_the_task_costs_at_most_a_point(digits, plain, enrolled):
    assert digits.score(enrolled.model) >= digits.score(plain) - 0.01
    assert enrolled.model.training == plain.training


def test_a_credential_says_for_which_weights_it_was_made(held, enrolled, tuned):
    noted = bytes(held["user0"].tensors["model"].tolist()).hex()
    assert noted == weights_of(enrolled.model).digest() != weights_of(tuned).digest()


@pytest.mark.parametrize("change", ["swapped class", "another order", "one fewer", "one more", "half and half"])
def test_images_that_are_not_a_users_own_are_nobodys(change, digits, held, secret, served, enrolled):
    mine = images(held["user3"])
    if change == "swapped class":
        cells = torch.from_numpy((SCHEME._cells(secret, "user3") + 45) % 450)
        mine, fit = SCHEME._crafted(enrolled.model, digits.owner.inputs[:3], cells, secret)
        assert fit.all()
    rows = {
        "swapped class": mine,
        "another order": mine.roll(1, 0),
        "one fewer": mine[:2],
        "one more": torch.cat([mine, mine[:1]]),
        "half and half": (mine + images(held["user4"])) / 2,
    }[change]
    found = SCHEME.authenticate(served, secret, rows, USERS)
    assert found.reason is Reason.MODEL_REFUSES
    assert (found.user is None) == (change != "one more")  # all three of his are among them


def test_images_of_three_users_together_pass_by_the_papers_rule_and_are_nobodys(held, secret, served):
    rows = torch.stack([images(held[f"user{i}"])[i] for i in range(3)])
    found = SCHEME.authenticate(served, secret, rows, USERS)
    assert (found.served, found.user, found.reason) == (True, None, Reason.UNKNOWN_USER)


def test_a_revoked_user_is_refused_by_name_and_closes_the_gate(digits, held, enrolled):
    gate, rows = Gate(SCHEME, enrolled, USERS), images(held["user5"])
    gate.admit(rows)
    gate.revoked.add("user5")
    assert digits.score(gate) <= 0.2
    assert gate.admit(rows).reason is Reason.REVOKED
    assert digits.score(gate) <= 0.2


def test_a_closed_gate_is_useless_and_an_open_one_is_the_model(digits, held, enrolled):
    gate, inputs = Gate(SCHEME, enrolled, USERS), digits.test.inputs
    assert digits.score(gate) <= 0.2
    gate.admit(images(held["user2"]))
    with torch.no_grad():
        assert torch.equal(gate(inputs), enrolled.model.eval()(inputs))


def test_the_model_without_its_control_layer_is_whole(digits, plain, enrolled):
    assert digits.score(Gate(SCHEME, enrolled, USERS).model) >= digits.score(plain) - 0.01


def test_by_the_papers_rule_noise_is_somebody_with_one_image_and_nobody_with_three(plain, secret, served):
    one = ActiveGuard(images=1)
    single = one.new_secret(weights_of(plain), host=secret.host, rng=np.random.default_rng(0))
    rows = noise(600)
    share = taken_for_somebody(one, single, served, rows)
    assert 0.03 < share <= 0.12  # at most 60 users / 450 cells; noise is often surer than any cell
    assert taken_for_somebody(SCHEME, secret, served, rows) <= 0.005  # 1 of 200, for 0.002 and less expected


def test_noise_and_natural_rows_are_accepted_as_nobody(digits, secret, served):
    rows = torch.cat([noise(150, seed=1), digits.test.inputs[:150]])
    for shown in rows.unflatten(0, (-1, 3)):
        assert not SCHEME.authenticate(served, secret, shown, MANY).accepted


def test_one_image_alone_can_accept_nobody_at_the_usual_level(digits, plain, secret, enrolled):
    one = ActiveGuard(images=1)
    single = one.new_secret(weights_of(plain), host=secret.host, rng=np.random.default_rng(0))
    rows = images(one.issue(enrolled.model, single, "user0", task=digits))
    found = one.trace(WhiteBox(enrolled.model), single, rows, ["user0"])
    assert (found.verdict, found.accused) == (Verdict.INCONCLUSIVE, ())
    assert one.examine(WhiteBox(enrolled.model), single, rows, ["user0"]).served


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e30])
def test_rows_of_no_sense_are_refused_and_break_nothing(value, secret, served):
    assert not SCHEME.authenticate(served, secret, torch.full((3, 1, 8, 8), value), USERS).accepted


def test_five_epochs_of_fine_tuning_break_more_than_half_of_the_images(digits, plain, held, secret, tuned):
    left, of = in_their_cells(tuned, secret, held)
    assert left < of / 2
    assert digits.score(tuned) >= digits.score(plain) - 0.02


def test_after_a_change_of_the_model_images_are_issued_again_for_the_same_cells(digits, held, secret, tuned):
    again = SCHEME.issue(tuned, secret, "user0", task=digits)
    assert not torch.equal(images(again), images(held["user0"]))
    assert SCHEME.authenticate(WhiteBox(tuned), secret, images(again), USERS).user == "user0"
    assert SCHEME.authenticate(WhiteBox(tuned), secret, images(held["user0"]), USERS).user is None


def test_distances_of_probabilities_leave_images_too_far_off(digits, secret, enrolled):
    weak = ActiveGuard(objective="probability", steps=200)
    cells = torch.from_numpy(np.concatenate([SCHEME._cells(secret, user) for user in USERS[:8]]))
    starts = digits.owner.inputs[: len(cells)]
    _, fit = weak._crafted(enrolled.model, starts, cells, secret)
    _, well = SCHEME._crafted(enrolled.model, starts, cells, secret)
    assert fit.float().mean() < 0.5 < 0.9 < well.float().mean()


def test_what_puts_them_off_is_the_weight_of_the_change_and_not_the_rounding(digits, secret, enrolled):
    free = ActiveGuard(objective="probability", steps=200, closeness=0)
    cells = torch.from_numpy(np.concatenate([SCHEME._cells(secret, user) for user in USERS[:8]]))
    _, fit = free._crafted(enrolled.model, digits.owner.inputs[: len(cells)], cells, secret)
    assert fit.float().mean() > 0.7


def test_no_image_that_fits_is_an_error(digits, secret, enrolled):
    hasty = ActiveGuard(steps=1, attempts=1)
    own = hasty.new_secret(weights_of(enrolled.model), host=secret.host)
    with pytest.raises(MarkFailedError, match="3 of 3 images"):
        hasty.issue(enrolled.model, own, "user0", task=digits)


def test_issuing_leaves_the_model_and_its_gradients_as_they_were(digits, secret, enrolled):
    model = copy.deepcopy(enrolled.model).train()
    model.zero_grad(set_to_none=True)
    before = weights_of(model).digest()
    SCHEME.issue(model, secret, "somebody", task=digits)
    assert weights_of(model).digest() == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_images_start_from_rows_of_other_classes_or_from_any_where_there_are_none(digits, secret):
    classes = torch.tensor([1, 1, 7])
    starts = torch.cat(SCHEME._starts(secret, "user0", digits, classes))
    for image, wanted in zip(starts, classes.repeat(SCHEME.attempts), strict=True):
        same = (digits.owner.inputs == image).flatten(1).all(1)
        assert (digits.owner.targets[same] != wanted).any()
    ones = digits.owner.take(digits.owner.targets == 1).take(slice(0, 4))
    assert len(SCHEME._starts(secret, "user0", replace(digits, owner=ones), classes)) == SCHEME.attempts


def test_the_owner_finds_his_model_by_bits_that_are_read_without_error(plain, secret, served):
    found = SCHEME.verify(served, secret)
    assert (found.verdict, found.details["ber"]) == (Verdict.MATCH, 0)
    assert SCHEME.verify(WhiteBox(plain), secret).verdict is Verdict.NO_MATCH


def test_other_secrets_read_half_of_the_bits(secret, served):
    rates = [SCHEME.score(served, Secret(bytes([seed]) * 32, secret.facts)).details["ber"] for seed in range(60)]
    assert abs(np.mean(rates) - 0.5) < 0.04  # five standard deviations


def test_the_watermark_outlives_the_fingerprints(secret, tuned):
    assert SCHEME.verify(WhiteBox(tuned), secret).verdict is Verdict.MATCH


def test_a_suspect_whose_neurons_were_permuted_is_put_back(digits, secret, enrolled, rng):
    moved = registry.attack("permute").run(enrolled.model, Resources.of(digits), rng=rng).model
    assert SCHEME.verify(WhiteBox(moved), secret, original=enrolled.model).verdict is Verdict.MATCH


def test_a_suspect_of_another_form_is_refused(toy, secret, rng):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(WhiteBox(toy.model(rng)), secret)


def test_a_watermark_that_does_not_take_is_an_error(digits, plain):
    few = replace(digits, owner=digits.owner.take(slice(0, 64)))
    with pytest.raises(MarkFailedError, match="did not take"):
        ActiveGuard(strength=1e-6, epochs=1).enroll(plain, few, rng=np.random.default_rng(0))


def test_words_cannot_be_adversarial_images(digits, plain):
    words = Batch(digits.owner.inputs.long(), digits.owner.targets)
    with pytest.raises(UnsupportedError, match="real-valued"):
        SCHEME.enroll(plain, replace(digits, owner=words))


def test_a_layer_that_is_missing_or_too_small_is_refused(digits, plain):
    with pytest.raises(UnknownNameError):
        ActiveGuard(layer="nothing").enroll(plain, digits)
    with pytest.raises(ParameterError, match="too small"):
        ActiveGuard(layer="conv1.weight").enroll(plain, digits)


def test_enrolling_or_issuing_without_a_task_is_refused(plain, secret, enrolled):
    with pytest.raises(ParameterError, match="task"):
        SCHEME.enroll(plain)
    with pytest.raises(ParameterError, match="task"):
        SCHEME.issue(enrolled.model, secret, "user0")


@pytest.mark.parametrize(
    "bad",
    [
        {"images": 0},
        {"tolerance": 0.0},
        {"tolerance": 0.3},
        {"least": 0.4},
        {"most": 1.0},
        {"objective": "distance"},
        {"closeness": -1.0},
        {"steps": 0},
        {"attempts": 0},
        {"bits": 0},
        {"strength": 0.0},
        {"epochs": 0},
        {"rate": 0.0},
    ],
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters of activeguard"):
        ActiveGuard(**bad)
