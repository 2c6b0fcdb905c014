from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import sealmark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ModelMismatchError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import WeightFile, WhiteBox
from sealmark.core.training import train, train_task
from sealmark.core.weights import ModelWeights, save_model
from sealmark.ownership._passport import TwoBranches, answer, named, with_tensors
from sealmark.ownership.passport_normalization import PassportNormalization

SCHEME = PassportNormalization()


def other_keys(secret, count):
    return [Secret(np.random.default_rng(1000 + s).bytes(32), secret.facts, secret.tensors) for s in range(count)]


@pytest.fixture(scope="module")
def made(digits):
    rng = np.random.default_rng(0)
    start = digits.model(rng)
    secret = SCHEME.keygen(start, digits, payload=b"sealmark", rng=np.random.default_rng([1, 0]))
    return SCHEME.embed(start, secret, digits, rng=rng)


@pytest.fixture(scope="module")
def mlp(toy):
    """Two normalized linear layers on the toy task."""
    return dataclasses.replace(
        toy,
        make=lambda: nn.Sequential(
            *(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU()),
            *(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
            nn.Linear(32, 2),
        ),
    )


def test_both_branches_work_with_batch_normalization_and_the_weights_bear_the_signature(made, digits, plain):
    evidence = SCHEME.verify(WhiteBox(made.model), made.secret)
    assert evidence.details == {"bits": 96, "ber": 0.0}
    assert evidence.log10_p < -28
    assert digits.score(made.model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three
    assert digits.score(SCHEME.private(made.model, made.secret)) >= 0.965
    assert SCHEME.decode(WhiteBox(made.model), made.secret) == b"sealmark"


def test_an_independent_net_bears_half_of_it_and_the_private_branch_is_useless_in_it(plain, made, digits):
    evidence = SCHEME.verify(WhiteBox(plain), made.secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert 0.35 < evidence.details["ber"] < 0.65
    assert digits.score(SCHEME.private(plain, made.secret)) < 0.2


def test_shared_statistics_ruin_the_private_branch(made, digits):
    """Why there are two: this is what `passports` refuses to do with batch normalization."""
    rng = np.random.default_rng(0)
    model = digits.model(rng)
    secret = SCHEME.keygen(model, digits, rng=rng)
    shared = TwoBranches(SCHEME, model, secret, digits)
    recipe = dataclasses.replace(digits.recipe, epochs=6)
    train(model, digits.owner, loss=digits.loss, recipe=recipe, rng=rng, terms=shared.terms)
    private = with_tensors(model, named(SCHEME.answers(model, secret)))
    assert digits.score(private) < min(0.85, digits.score(model) - 0.1)


def test_random_passports_do_not_read_the_signature(made):
    rates = [SCHEME.score(WhiteBox(made.model), key).details["ber"] for key in other_keys(made.secret, 100)]
    assert min(rates) > 0.29  # 29 of 96 would be p = 1e-4
    assert abs(np.mean(rates) - 0.5) < 4 * 0.5 / np.sqrt(100 * 96)


def test_known_weakness_the_best_of_100_random_passports_works_in_the_private_branch(made, digits):
    """The small network may ignore what it is given: accuracy by passports proves little, signs do."""
    accuracies = [digits.score(SCHEME.private(made.model, key)) for key in other_keys(made.secret, 100)]
    assert np.mean(accuracies) < 0.35
    assert max(accuracies) > 0.5


@pytest.mark.parametrize(
    ("attack", "parameters"),
    [("fine_tune", {"epochs": 15, "rate": 0.05}), ("prune", {"rate": 0.5}), ("quantize", {"bits": 8})],
)
def test_mark_survives_what_keeps_the_model_alive(attack, parameters, made, digits):
    surrogate = registry.modification(attack, **parameters).run(
        made.model, Resources.of(digits), rng=np.random.default_rng(0)
    )
    assert SCHEME.verify(WhiteBox(surrogate.model), made.secret).details["ber"] <= 0.05
    private = SCHEME.private(surrogate.model, made.secret, recalibrate=digits.owner.inputs)
    assert digits.score(private) >= 0.96


def test_recalibration_finds_lost_statistics_again(made, digits):
    lost = Secret(
        made.secret.reveal_seed(),
        made.secret.facts,
        {k: torch.ones_like(t) if "running" in k else t for k, t in made.secret.tensors.items()},
    )
    assert digits.score(SCHEME.private(made.model, lost)) < 0.9
    recalibrated = SCHEME.private(made.model, lost, recalibrate=digits.owner.inputs)
    assert digits.score(recalibrated) >= 0.96
    assert recalibrated.norm2.momentum == made.model.norm2.momentum


def test_overwriting_leaves_both_signatures(made, digits):
    thief = SCHEME.keygen(made.model, digits, rng=np.random.default_rng(5))
    recipe = dataclasses.replace(digits.recipe, epochs=5)
    twice = SCHEME.embed(made.model, thief, digits, rng=np.random.default_rng(5), recipe=recipe)
    assert SCHEME.verify(WhiteBox(twice.model), made.secret).verdict is Verdict.MATCH
    assert SCHEME.verify(WhiteBox(twice.model), twice.secret).verdict is Verdict.MATCH


@pytest.mark.parametrize("attack", ["permute", "sign_flip"])
def test_known_break_free_rewrites_hide_the_mark_until_the_suspect_is_aligned(attack, made, digits):
    hidden = registry.modification(attack).run(made.model, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert digits.score(hidden) == pytest.approx(digits.score(made.model), abs=0.003)
    assert SCHEME.verify(WhiteBox(hidden), made.secret).verdict is Verdict.NO_MATCH
    assert SCHEME.verify(WhiteBox(hidden), made.secret, original=made.model).verdict is Verdict.MATCH


def test_aligning_an_innocent_net_does_not_bend_it_towards_the_mark(plain, made):
    evidence = SCHEME.verify(WhiteBox(plain), made.secret, original=made.model)
    assert 0.35 < evidence.details["ber"] < 0.65


def test_shipped_model_has_its_own_form_and_the_private_branch_is_in_the_secret_alone(made, plain, tmp_path):
    assert ModelWeights(made.model).info == ModelWeights(plain).info
    norms = {place.norm for place in SCHEME.places(made.secret)}
    learned = made.secret.facts["learned"]
    assert {f"{norm}/{part}" for norm in norms for part in ("mixer_down", "mixer_up")} <= learned.keys()
    assert f"statistics/{min(norms)}.running_var" in learned
    save_model(made.model, tmp_path / "shipped.safetensors")
    assert SCHEME.verify(WeightFile(tmp_path / "shipped.safetensors"), made.secret).verdict is Verdict.MATCH


def test_private_statistics_are_not_the_public_ones(made):
    public, private = made.model.norm3.running_mean, made.secret.tensors["statistics/norm3.running_mean"]
    assert (public - private).abs().max() > 0.1
    # the same answers of conv1 in both branches: it comes before every passport
    assert torch.allclose(made.model.norm1.running_mean, made.secret.tensors["statistics/norm1.running_mean"])


def test_another_private_branch_is_refused_by_the_commitment(made):
    tensors = dict(made.secret.tensors) | {"norm2/mixer_up": made.secret.tensors["norm2/mixer_up"] * 0}
    with pytest.raises(ForgedSecretError, match="not the committed ones"):
        SCHEME.verify(WhiteBox(made.model), Secret(made.secret.reveal_seed(), made.secret.facts, tensors))


def test_secret_from_before_the_training_verifies_and_has_no_private_branch(made, digits):
    facts = {name: fact for name, fact in made.secret.facts.items() if name != "learned"}
    before = Secret(made.secret.reveal_seed(), facts)
    assert SCHEME.verify(WhiteBox(made.model), before).verdict is Verdict.MATCH
    with pytest.raises(ParameterError, match="the secret that embed returned"):
        SCHEME.private(made.model, before)


def test_mark_is_put_in_by_a_loop_of_the_users_own(mlp):
    scheme = PassportNormalization(layers=("0", "3"), strength=1.0)
    plain = train_task(mlp, rng=np.random.default_rng(0))
    secret = scheme.keygen(plain, mlp, rng=np.random.default_rng(1))
    model, rng = copy.deepcopy(plain), np.random.default_rng(0)
    model, criterion = sealmark.attach(scheme, model, cross_entropy, secret, rng=rng)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        criterion(model(mlp.owner.inputs), mlp.owner.targets).backward()
        optimizer.step()
    secret = criterion.detach()
    assert scheme.verify(WhiteBox(model), secret).verdict is Verdict.MATCH
    assert mlp.score(model, mlp.owner) > 0.9
    assert mlp.score(scheme.private(model, secret), mlp.owner) > 0.9
    assert ModelWeights(model).info == ModelWeights(plain).info


def test_suspect_of_another_form_is_refused(made):
    bare = copy.deepcopy(made.model)
    bare.norm1 = nn.Identity()
    for model in (bare, nn.Linear(3, 3)):
        with pytest.raises(ModelMismatchError, match="another form"):
            SCHEME.private(model, made.secret)


@given(seed=st.integers(0, 2**32), size=st.floats(-10, 10))
def test_blinding_forgets_the_signature_and_nothing_else(made, seed, size):
    blind = SCHEME.blind(made.secret)
    direction = SCHEME.directions(made.secret)["norm3"][0]
    weight = made.model.conv3.weight.detach()
    shares = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    blinded = blind("conv3.weight", weight)
    assert torch.allclose(blind("conv3.weight", weight + size * shares * direction), blinded, atol=1e-4)
    assert answer(blinded, direction).abs().max() < 1e-5
    assert torch.equal(blind("fc1.weight", made.model.fc1.weight), made.model.fc1.weight)
