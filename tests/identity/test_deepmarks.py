"""DeepMarks on the digits: who leaked, alone or together, and that a model without a mark accuses nobody."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.collusion.average import Average
from sealmark.core.attack import Resources
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.registry import attack
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights, rewrite_model
from sealmark.identity.deepmarks import Deepmarks

SCHEME = Deepmarks(layer="conv3.weight")  # the layer and setting of the method card
USERS = [f"user{i}" for i in range(31)]
TEAM = ["user0", "user3", "user7", "user12", "user20", "user29"]


@pytest.fixture(scope="module")
def secret(plain) -> Secret:
    return SCHEME.enroll(plain, users=USERS, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def copies(digits, plain, secret) -> list[nn.Module]:
    return [SCHEME.issue(plain, secret, user, task=digits).model for user in TEAM]


@pytest.fixture(scope="module")
def stranger(digits) -> nn.Module:
    return train_task(digits, rng=np.random.default_rng(9))


def accused(suspect, secret, users=USERS):
    return {entry.user for entry in SCHEME.trace(WhiteBox(suspect), secret, users).accused}


def fused(copies, choose):
    sources = [ModelWeights(model) for model in copies]
    return rewrite_model(
        copies[0],
        lambda name, t: choose(torch.stack([s[name] for s in sources])) if t.is_floating_point() else t,
    )


def average(copies, digits):
    return Average().run(copies, Resources.of(digits), rng=np.random.default_rng(0)).model


def test_copies_cost_at_most_half_a_point_and_their_symbols_are_signs(digits, plain, secret, copies):
    assert np.mean([digits.score(model) for model in copies]) >= digits.score(plain) - 0.005
    for model in copies:
        symbols = SCHEME.symbols(WhiteBox(model), secret)
        assert np.abs(np.abs(symbols) - 1).max() < 0.05


def test_a_copy_names_its_user_at_once_and_its_word_is_read_whole(copies, secret):
    found = SCHEME.trace(WhiteBox(copies[2]), secret, USERS)
    assert [entry.user for entry in found.accused] == ["user7"]
    assert found.accused[0].log10_p < -20
    assert found.details["decoded"] == ["user7"]
    assert found.basis is Basis.BOUND
    assert "at most 5 colluders" in found.null


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_an_average_of_up_to_five_names_all_of_them_and_nobody_else(size, digits, secret, copies):
    pirate = average(copies[:size], digits)
    found = SCHEME.trace(WhiteBox(pirate), secret, USERS)
    assert {entry.user for entry in found.accused} == set(TEAM[:size])
    assert found.details["decoded"] == sorted(TEAM[:size])
    assert "nobody" not in found.details
    symbols = SCHEME.symbols(WhiteBox(pirate), secret)
    zeros = symbols[SCHEME.code.read(symbols) == 0]
    assert zeros.max() < 1 - 2 / size + 0.05  # all agree on a one, one of them at least has a zero


def test_six_colluders_are_too_many_and_nobody_is_accused(digits, secret, copies):
    pirate = average(copies, digits)
    found = SCHEME.trace(WhiteBox(pirate), secret, USERS)
    assert found.accused == ()
    assert "no 5 users or fewer" in found.details["nobody"]
    assert set(TEAM) <= set(found.details["decoded"])


@pytest.mark.parametrize(
    "choose",
    [
        lambda stack: stack.median(0).values,
        lambda stack: 0.7 * stack[0] + 0.2 * stack[1] + 0.1 * stack[2],
        lambda stack: stack.gather(0, torch.randint(3, stack.shape[1:], generator=torch.Generator())[None])[0],
    ],
    ids=["median", "unequal", "pick"],
)
def test_three_who_do_not_average_are_named_too(choose, secret, copies):
    assert accused(fused(copies[:3], choose), secret) == set(TEAM[:3])


@pytest.mark.parametrize("choose", [torch.amin, torch.amax], ids=["min", "max"])
def test_the_extremes_of_three_copies_name_nobody_innocent(choose, secret, copies):
    assert accused(fused(copies[:3], lambda stack: choose(stack, 0)), secret) <= set(TEAM[:3])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fine_tune", {"epochs": 15, "rate": 0.01}),
        ("prune", {"rate": 0.5}),
        ("quantize", {"bits": 8}),
    ],
)
def test_a_leak_is_traced_after_an_attack(name, parameters, digits, secret, copies, rng):
    result = attack(name, **parameters).run(copies[2], Resources.of(digits), rng=rng)
    assert accused(result.model, secret) == {"user7"}


def test_the_base_and_an_independent_model_accuse_nobody(plain, secret, stranger):
    for model in (plain, stranger):
        found = SCHEME.trace(WhiteBox(model), secret, USERS)
        assert found.verdict is Verdict.NO_MATCH
        assert found.details["decoded"] == []
        assert found.details["level"] < 0.2


def test_the_papers_decoder_without_a_gate_accuses_everybody_on_the_base(plain, secret):
    symbols = SCHEME.symbols(WhiteBox(plain), secret)
    assert SCHEME.code.covered((symbols > 0.85).astype(np.uint8)).all()


def test_a_projection_of_uniform_numbers_would_see_independent_models_alike(plain, stranger):
    uniform = np.random.default_rng(0).uniform(size=(31, 288))
    normal = np.random.default_rng(0).normal(size=(31, 288))

    def cosine(projection):
        one, other = (
            projection @ model.conv3.weight.detach().mean(0).reshape(-1).double().numpy()
            for model in (plain, stranger)
        )
        return abs(one @ other) / np.linalg.norm(one) / np.linalg.norm(other)

    assert cosine(uniform) > 0.7 > 0.5 > cosine(normal)


def test_another_secret_accuses_nobody(plain, copies):
    other = SCHEME.enroll(plain, users=USERS, rng=np.random.default_rng(1))
    assert accused(copies[0], other) == set()


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_ruined_layer_says_nothing(value, secret, copies):
    ruined = copy.deepcopy(copies[0])
    ruined.conv3.weight.data.fill_(value)
    assert accused(ruined, secret) == set()


def test_words_are_a_keyed_assignment_that_the_commitment_covers(plain, secret):
    words = [SCHEME._word(secret, user) for user in USERS]
    assert sorted(words) == list(range(31)) != words
    swapped = [USERS[1], USERS[0], *USERS[2:]]
    other = SCHEME.enroll(plain, users=swapped, rng=np.random.default_rng(0))
    assert other.commitment != secret.commitment
    assert [SCHEME._word(other, user) for user in USERS] != words


def test_the_rotation_keeps_lengths_and_the_projection_is_standard_normal(secret):
    rotation = SCHEME._rotation(secret)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(31), atol=1e-12)
    projection = SCHEME._projection(secret)
    assert abs(projection.mean()) < 0.05
    assert abs(projection.std() - 1) < 0.05


@pytest.mark.parametrize("users", [[], ["a", "a"], ["a", ""], [f"u{i}" for i in range(32)]])
def test_bad_rosters_are_refused(users, plain):
    with pytest.raises(ParameterError, match="bad list of users"):
        SCHEME.enroll(plain, users=users)


def test_who_is_not_on_the_roster_gets_no_copy_and_is_not_looked_for(digits, plain, secret, copies):
    with pytest.raises(ParameterError, match="not on the roster"):
        SCHEME.issue(plain, secret, "mallory", task=digits)
    with pytest.raises(ParameterError, match="not on the roster"):
        SCHEME.trace(WhiteBox(copies[0]), secret, ["user0", "mallory"])


def test_issuing_without_a_task_is_refused(plain, secret):
    with pytest.raises(ParameterError, match="expected a task"):
        SCHEME.issue(plain, secret, "user0")


def test_a_layer_that_is_missing_or_too_small_is_refused(plain, toy, rng):
    with pytest.raises(UnknownNameError):
        Deepmarks(layer="nothing").enroll(plain, users=USERS)
    with pytest.raises(ParameterError, match="too small"):
        SCHEME_OF_13.enroll(nn.Linear(12, 3), users=["a"], rng=rng)


def test_a_suspect_of_another_form_is_refused(secret, toy, rng):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.trace(WhiteBox(toy.model(rng)), secret, USERS)


def test_gamma_of_the_paper_does_not_embed_and_that_is_an_error(digits, plain):
    weak = Deepmarks(strength=0.1, epochs=1, rate=0.002)
    secret = weak.enroll(plain, users=USERS, rng=np.random.default_rng(0))
    with pytest.raises(MarkFailedError, match="did not take"):
        weak.issue(plain, secret, "user0", task=replace(digits, owner=digits.owner.take(slice(0, 128))))


SCHEME_OF_13 = Deepmarks(block=4, epochs=60, rate=0.05)


def test_a_smaller_code_fits_a_smaller_layer(toy, rng):
    assert (SCHEME_OF_13.places, Deepmarks().places, Deepmarks(block=8).places) == (13, 31, 57)
    model = train_task(toy, rng=rng)
    secret = SCHEME_OF_13.enroll(model, users=["a", "b"], rng=rng)
    leaked = SCHEME_OF_13.issue(model, secret, "b", task=toy).model
    found = SCHEME_OF_13.trace(WhiteBox(leaked), secret, ["a", "b"])
    assert [entry.user for entry in found.accused] == ["b"]
    assert toy.score(leaked) >= toy.score(model) - 0.05


@pytest.mark.parametrize("bad", [{"strength": 0.0}, {"epochs": 0}, {"rate": 0.0}, {"block": 5}, {"block": 3}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError):
        Deepmarks(**bad)
