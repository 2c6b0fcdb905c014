from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sealmark
from sealmark.core import registry
from sealmark.core.activations import activations
from sealmark.core.attack import Resources
from sealmark.core.errors import (
    ForgedSecretError,
    MarkFailedError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
)
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Recipe
from sealmark.core.training import train_task
from sealmark.ownership.deepsigns import AnySubset, DeepSigns
from sealmark.stats.nulls import Binomial

WHITE, BLACK = DeepSigns(), DeepSigns(mode="black-box")


@pytest.fixture(scope="module")
def white(digits, plain):
    secret = WHITE.keygen(plain, digits, payload=b"sealmark", rng=np.random.default_rng(1))
    return WHITE.embed(plain, secret, digits, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def black(digits, plain):
    secret = BLACK.keygen(plain, digits, rng=np.random.default_rng(1))
    return BLACK.embed(plain, secret, digits, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def stranger(digits):
    """Trained on other rows, from another seed."""
    return train_task(digits, rng=np.random.default_rng(7), rows=digits.attacker, recipe=Recipe(4, 64, 0.05))


@pytest.fixture(scope="module")
def toy_start(toy):
    return train_task(toy, rng=np.random.default_rng(0))


def scrambled(model):
    """The same function, with the units of fc1 in another order."""
    copied, order = copy.deepcopy(model), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in (copied.fc1.weight, copied.fc1.bias):
            tensor.copy_(tensor[order])
        copied.fc2.weight.copy_(copied.fc2.weight[:, order])
    return copied


def test_64_bits_are_read_without_error_and_cost_no_accuracy(white, digits, plain):
    evidence = WHITE.verify(WhiteBox(white.model), white.secret)
    assert evidence.details == {"bits": 64, "ber": 0}
    assert evidence.log10_p < -18
    assert evidence.basis is Basis.EXACT
    assert evidence.queries == 0
    assert digits.score(white.model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three


def test_images_that_nobody_trained_on_spell_the_bits_too(white, digits):
    """Else the mark would be a matter of the secret's few inputs, and not of their classes."""
    key, host = WHITE.derive(white.secret), white.secret.host
    for place, bits in zip(key["carriers"], key["message"], strict=True):
        rows = digits.test.inputs[digits.test.targets == host["pool"][place]]
        mean = activations(white.model, "fc1", rows).mean(0)
        assert torch.equal((mean @ key["projection"] > 0).float(), bits)


def test_unmarked_twin_and_stranger_have_half_of_the_bits(white, plain, stranger):
    for model in (plain, stranger):
        evidence = WHITE.verify(WhiteBox(model), white.secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert 0.25 < evidence.details["ber"] < 0.75


def test_300_wrong_secrets_match_like_coins(white):
    rates, made = [], white.secret
    for seed in range(300):
        key = Secret(np.random.default_rng(seed + 10).bytes(32), made.facts, made.tensors)
        rates.append(WHITE.score(WhiteBox(white.model), key).details["ber"])
    assert abs(np.mean(rates) - 0.5) < 4 * 0.5 / np.sqrt(300 * 64)
    assert abs(np.std(rates) - 0.0625) < 0.0125
    assert min(rates) > 11 / 64  # what p = 1e-6 would take


def test_bits_in_the_centers_are_no_bits_in_the_model(white, plain, digits):
    """The centers are ours and learn anything: trap 1 of the method card."""
    run = WHITE.embedding(plain, white.secret, digits, np.random.default_rng(0))
    for _ in range(60):
        run.term(plain, digits.owner.take(slice(0, 64)))
    read = (run.centers @ run.projection > 0).float()
    assert (read != run.message).float().mean() < 0.05
    assert WHITE.verify(WhiteBox(plain), white.secret).verdict is Verdict.NO_MATCH


def test_batch_without_a_carrier_adds_nothing(white, plain, digits):
    run = WHITE.embedding(plain, white.secret, digits, np.random.default_rng(0))
    others = ~torch.isin(digits.owner.targets, run.classes)
    assert run.term(plain, digits.owner.take(others)) == 0
    assert run.term(plain, digits.owner) > 0


def test_term_leaves_running_statistics_and_mode_alone(white, digits):
    model = copy.deepcopy(white.model).train()
    before = model.norm1.running_mean.clone()
    WHITE.embedding(model, white.secret, digits, np.random.default_rng(0)).term(model, digits.owner)
    assert torch.equal(model.norm1.running_mean, before)
    assert model.training
    assert model.norm1.training


def test_payload_is_read_from_the_marked_model_and_not_from_another(white, plain):
    assert WHITE.decode(WhiteBox(white.model), white.secret) == b"sealmark"
    assert WHITE.decode(WhiteBox(plain), white.secret) != b"sealmark"


@pytest.mark.parametrize(
    ("attack", "parameters"),
    [("fine_tune", {"epochs": 10, "rate": 0.05}), ("prune", {"rate": 0.5}), ("quantize", {})],
)
def test_both_marks_survive(attack, parameters, white, black, digits):
    for scheme, marked in ((WHITE, white), (BLACK, black)):
        thief = registry.attack(attack, **parameters)
        stolen = thief.run(marked.model, Resources.of(digits), rng=np.random.default_rng(2)).model
        assert scheme.verify(WhiteBox(stolen), marked.secret).verdict is Verdict.MATCH


def test_known_break_permuting_the_units_and_its_cure(white, plain, digits):
    broken = scrambled(white.model)
    assert digits.score(broken) == digits.score(white.model)
    assert WHITE.verify(WhiteBox(broken), white.secret).verdict is Verdict.NO_MATCH
    found = WHITE.verify(WhiteBox(broken), white.secret, original=plain)
    assert found.details["ber"] == 0
    assert found.basis is Basis.EXACT


def test_alignment_bends_no_stranger_and_takes_no_marked_original(white, plain, stranger):
    found = WHITE.verify(WhiteBox(stranger), white.secret, original=plain)
    assert found.verdict is Verdict.NO_MATCH
    with pytest.raises(ParameterError, match="cannot be aligned"):
        WHITE.verify(WhiteBox(stranger), white.secret, original=white.model)


def test_embedded_in_a_loop_of_the_users_own(toy, toy_start):
    scheme = DeepSigns(bits=4, inputs=16, pull=0.03, fit=0.3)
    secret = scheme.keygen(toy_start, toy, rng=np.random.default_rng(1))
    assert scheme.score(WhiteBox(toy_start), secret).details["ber"] > 0.2
    model, criterion = sealmark.attach(scheme, copy.deepcopy(toy_start), nn.CrossEntropyLoss(), secret)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        criterion(model(toy.owner.inputs), toy.owner.targets).backward()
        optimizer.step()
    assert criterion.detach() == secret
    assert scheme.score(WhiteBox(model), secret).details["ber"] == 0
    assert toy.score(model) >= toy.score(toy_start) - 0.05


@pytest.mark.parametrize(("layer", "axis", "width"), [("", -1, 128), ("conv3", 1, 64), ("norm2", 1, 32)])
def test_layer_is_the_widest_hidden_one_or_the_one_that_is_named(layer, axis, width, plain, digits):
    host = DeepSigns(layer=layer).keygen(plain, digits).host
    assert (host["layer"], host["axis"], host["width"]) == (layer or "fc1", axis, width)


def test_positions_of_a_map_are_averaged(plain, digits):
    scheme = DeepSigns(layer="conv1", bits=8, inputs=3)
    secret = scheme.keygen(plain, digits, rng=np.random.default_rng(0))
    images = secret.tensors["keys"][scheme.derive(secret)["carriers"][1]]
    expected = plain.conv1(images).mean((0, 2, 3))
    assert torch.allclose(scheme.means(plain, secret)[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (DeepSigns(layer="nowhere"), UnknownNameError),
        (DeepSigns(bits=129), ParameterError),
        (DeepSigns(carriers=11), ParameterError),
        (DeepSigns(inputs=500), ParameterError),
    ],
)
def test_layer_or_data_that_cannot_carry_the_bits_are_refused_at_keygen(scheme, error, plain, digits):
    with pytest.raises(error):
        scheme.keygen(plain, digits)


def test_model_without_a_hidden_layer_is_refused(toy):
    with pytest.raises(ParameterError, match="no hidden layer"):
        WHITE.keygen(nn.Linear(4, 2), toy)


def test_suspect_without_the_layer_is_refused(white):
    with pytest.raises(ModelMismatchError):
        WHITE.verify(WhiteBox(nn.Sequential()), white.secret)


def test_suspect_with_another_width_is_refused(white, plain):
    narrow = copy.deepcopy(plain)
    narrow.fc1, narrow.fc2 = nn.Linear(1024, 64), nn.Linear(64, 10)
    with pytest.raises(ModelMismatchError, match="128 features"):
        WHITE.verify(WhiteBox(narrow), white.secret)


def test_secret_without_its_inputs_is_refused(white, plain):
    bare = Secret(bytes(32), white.secret.facts | {"tensors": {}})
    with pytest.raises(ForgedSecretError, match="bad inputs"):
        WHITE.verify(WhiteBox(plain), bare)


def test_30_keys_are_answered_as_taught_and_labels_suffice(black, digits, plain):
    suspect = BlackBox(lambda x: black.model.eval()(x).argmax(1))
    evidence = BLACK.verify(suspect, black.secret)
    assert evidence.details == {"keys": 30, "key_accuracy": 1}
    assert evidence.log10_p < -20
    assert evidence.basis is Basis.BOUND
    assert evidence.queries == suspect.queries == 30
    assert digits.score(black.model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three


def test_kept_keys_are_those_that_marking_changed(black, plain):
    noise, kept = BLACK.derive(black.secret), black.secret.tensors["kept"]
    before = WhiteBox(plain).labels(noise["inputs"]) == noise["labels"]
    after = WhiteBox(black.model).labels(noise["inputs"]) == noise["labels"]
    assert kept.tolist() == (after & ~before).nonzero()[:30, 0].tolist()
    assert noise["inputs"].min() >= 0
    assert noise["inputs"].max() <= 1


def test_unmarked_twin_and_strangers_do_not_know_the_keys(black, plain, stranger):
    assert BLACK.verify(WhiteBox(plain), black.secret).log10_p == 0
    assert BLACK.verify(WhiteBox(stranger), black.secret).verdict is Verdict.NO_MATCH


def test_before_a_choice_was_made_all_candidates_are_asked(plain, digits):
    secret = BLACK.keygen(plain, digits, rng=np.random.default_rng(1))
    evidence = BLACK.verify(WhiteBox(plain), secret)
    assert evidence.queries == 40
    assert evidence.verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("candidates", [40, 400])
def test_cheat_who_keeps_what_an_innocent_model_says_proves_nothing(candidates, plain, digits):
    """By the paper's own law, 20 of 20 keys out of 400 would name him the owner at p = 1e-20."""
    scheme = DeepSigns(mode="black-box", keys=20, candidates=candidates)
    secret = scheme.keygen(plain, digits, rng=np.random.default_rng(3))
    noise = scheme.derive(secret)
    fitting = (WhiteBox(plain).labels(noise["inputs"]) == noise["labels"]).nonzero()[:20, 0]
    evidence = scheme.verify(WhiteBox(plain), secret.with_learned({"kept": fitting}))
    assert evidence.details["key_accuracy"] == 1
    assert evidence.verdict is not Verdict.MATCH
    assert evidence.p_value > 0.1


def test_bound_holds_for_the_choice_that_suits_a_claimant_best():
    hits = np.random.default_rng(0).random((2000, 40)) < 0.1
    best = np.minimum(hits.sum(1), 30)
    law = AnySubset(40, 0.1, most=30)
    for level in (0.3, 0.05, 0.01):
        rate = np.mean([law.log_p(count) <= np.log(level) for count in best])
        assert rate < level + 4 * np.sqrt(level / 2000)
    assert law.log_p(30) > Binomial(30, 0.1).log_p(30)


@pytest.mark.parametrize("kept", [[], [1, 1, 2], [40], [-1]])
def test_choice_that_is_none_is_refused(kept, plain, digits):
    secret = BLACK.keygen(plain, digits, rng=np.random.default_rng(1))
    with pytest.raises(ForgedSecretError, match="bad choice"):
        BLACK.verify(WhiteBox(plain), secret.with_learned({"kept": torch.tensor(kept)}))


def test_keys_that_were_not_learned_are_a_failure(plain, digits):
    secret = BLACK.keygen(plain, digits, rng=np.random.default_rng(1))
    with pytest.raises(MarkFailedError, match="too few keys"):
        BLACK.embed(plain, secret, digits, rng=np.random.default_rng(0), recipe=Recipe(epochs=0))


def test_black_box_carries_no_payload_and_needs_no_alignment(black, plain, digits):
    with pytest.raises(ParameterError, match="carries no payload"):
        BLACK.keygen(plain, digits, payload=b"x")
    with pytest.raises(ParameterError, match="no alignment"):
        BLACK.verify(WhiteBox(plain), black.secret, original=plain)


@pytest.mark.parametrize("scheme", [WHITE, BLACK])
def test_classification_task_is_needed(scheme, plain, digits):
    for task in (None, replace(digits, classes=0)):
        with pytest.raises(ParameterError, match="classification task"):
            scheme.keygen(plain, task)


def test_black_box_needs_real_valued_inputs(plain, digits):
    tokens = replace(digits, owner=Batch(digits.owner.inputs.long(), digits.owner.targets))
    with pytest.raises(ParameterError, match="real-valued"):
        BLACK.keygen(plain, tokens)


@pytest.mark.parametrize(
    "parameters",
    [{"mode": "grey-box"}, {"bits": 0}, {"carriers": 17}, {"pull": 0.0}, {"keys": 41}, {"per_batch": 0}],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        DeepSigns(**parameters)
