from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sealmark.core.errors import BudgetError, ForgedSecretError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.ownership.adi import Adi, Published, check_openings, verify_publicly

SCHEME = Adi()


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def scratch(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng).model


@pytest.fixture(scope="module")
def tuned(digits, plain, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0)).model


@pytest.mark.parametrize("how", ["scratch", "tuned"])
def test_30_triggers_are_all_answered_as_taught(how, request, secret, digits, plain):
    model = request.getfixturevalue(how)
    labels_only = BlackBox(lambda x: model.eval()(x).argmax(1))
    evidence = SCHEME.verify(labels_only, secret)
    assert evidence.details["trigger_accuracy"] == 1
    assert evidence.log10_p < -12
    assert evidence.queries == labels_only.queries == 30
    assert digits.score(model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three


def test_unmarked_twin_answers_by_chance(plain, secret):
    evidence = SCHEME.verify(WhiteBox(plain), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.details["trigger_accuracy"] < 0.4


def test_fresh_labels_do_not_match_the_marked_model(scratch, digits):
    for seed in range(20):
        other = SCHEME.keygen(scratch, digits, rng=np.random.default_rng(seed + 5))
        assert SCHEME.verify(WhiteBox(scratch), other).verdict is Verdict.NO_MATCH


def test_budget_smaller_than_the_trigger_set_is_refused_before_asking(scratch, secret):
    suspect = WhiteBox(scratch, budget=29)
    with pytest.raises(BudgetError):
        SCHEME.verify(suspect, secret)
    assert suspect.queries == 0


def test_published_commitments_hide_and_bind(secret):
    published = SCHEME.publish(secret)
    assert len(published.commitments) == len(set(published.commitments)) == 30
    assert len({label for _, label in published.commitments}) == 30  # equal labels do not show: they are salted
    check_openings(published, SCHEME.open(secret, [3, 17]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: replace(o, packed=o.packed ^ 1),
        lambda o: replace(o, label=(o.label + 1) % 10),
        lambda o: replace(o, salts=(o.salts[1], o.salts[0])),
        lambda o: replace(o, index=o.index + 1),
        lambda o: replace(o, index=99),
        lambda o: replace(o, packed=o.packed.reshape(8, 8)),
    ],
)
def test_opening_that_was_changed_is_refused(spoil, secret):
    (opening,) = SCHEME.open(secret, [4])
    with pytest.raises(ForgedSecretError):
        check_openings(SCHEME.publish(secret), [spoil(opening)])


def test_owner_may_choose_images_but_never_labels(digits, plain):
    images = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    secret = SCHEME.keygen(plain, digits, chosen={"inputs": images}, rng=np.random.default_rng(2))
    assert torch.equal(secret.tensors["inputs"], images)
    assert torch.allclose(SCHEME.trigger_set(secret).inputs, images / 255)
    swapped = images.flip(0)
    other = SCHEME.keygen(plain, digits, chosen={"inputs": swapped}, rng=np.random.default_rng(2))
    assert not torch.equal(SCHEME.trigger_set(other).targets.flip(0), SCHEME.trigger_set(secret).targets)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(30, 1, 8, 8),
        torch.zeros(30, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(29, 1, 8, 8, dtype=torch.uint8),
    ],
    ids=["not bytes", "all the same", "one missing"],
)
def test_unfit_images_are_refused(images, digits, plain):
    with pytest.raises(ParameterError):
        SCHEME.keygen(plain, digits, chosen={"inputs": images})


def test_task_is_needed(plain, digits):
    with pytest.raises(ParameterError, match="classification task"):
        SCHEME.keygen(plain)
    with pytest.raises(ParameterError, match="classification task"):
        SCHEME.keygen(plain, replace(digits, classes=0))


@pytest.mark.parametrize("parameters", [{"triggers": 0}, {"per_batch": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Adi(**parameters)


BEACON = b"a headline from the day after"


def opened(secret):
    return SCHEME.open(secret, range(SCHEME.triggers))


def test_judge_verifies_in_public_without_the_secret(scratch, plain, secret):
    published = SCHEME.publish(secret)
    evidence = verify_publicly(WhiteBox(scratch), published, opened(secret), beacon=BEACON)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries == 15  # the other half was inspected
    assert evidence.commitment == published.digest
    innocent = verify_publicly(WhiteBox(plain), published, opened(secret), beacon=BEACON)
    assert innocent.verdict is Verdict.NO_MATCH


def test_nobody_chooses_what_is_inspected(secret):
    published = SCHEME.publish(secret)
    halves = {tuple(published.inspected(bytes([i]))) for i in range(20)}
    assert len(halves) == 20
    assert all(len(half) == 15 for half in halves)


def test_labels_that_do_not_look_random_are_refused(secret, plain):
    answers = [replace(opening, label=3) for opening in opened(secret)]
    published = Published(SCHEME.publish(secret).form, tuple(o.commitments() for o in answers))
    with pytest.raises(ForgedSecretError, match="look random"):
        verify_publicly(WhiteBox(plain), published, answers, beacon=BEACON)


@pytest.mark.parametrize(
    "spoil", [lambda o: o[1:], lambda o: [*o, o[0]], lambda o: [*o[1:], replace(o[0], label=99)]]
)
def test_openings_must_be_complete_and_true(spoil, secret, plain):
    with pytest.raises(ForgedSecretError):
        verify_publicly(WhiteBox(plain), SCHEME.publish(secret), spoil(opened(secret)), beacon=BEACON)


def test_repeated_triggers_are_refused(secret, plain):
    one, *rest = opened(secret)
    twins = [one, replace(rest[0], packed=one.packed), *rest[1:]]
    published = Published(SCHEME.publish(secret).form, tuple(o.commitments() for o in twins))
    with pytest.raises(ForgedSecretError, match="the same"):
        verify_publicly(WhiteBox(plain), published, twins, beacon=BEACON)
