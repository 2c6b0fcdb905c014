from __future__ import annotations

import copy
import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.ownership.neuralmark import NeuralMark, key_of, matching
from sealmark.stats.calibration import super_uniformity

SCHEME = NeuralMark(layer="fc1.weight")
WEIGHTS = 128 * 1024


@pytest.fixture(scope="module")
def secret(plain):
    return SCHEME.keygen(plain, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def scratch(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng).model


@pytest.fixture(scope="module")
def tuned(digits, plain, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture
def attacked(digits, scratch):
    """The marked model after an attack."""

    def run(name, **parameters):
        attack = registry.attack(name, **parameters)
        return attack.run(scratch, Resources.of(digits), rng=np.random.default_rng(5)).model

    return run


def ber(scheme, model, secret):
    return scheme.score(WhiteBox(model), secret).details["ber"]


@pytest.mark.parametrize("how", ["scratch", "tuned"])
def test_256_bits_are_read_without_error_however_they_were_embedded(how, request, secret, digits, plain):
    model = request.getfixturevalue(how)
    evidence = SCHEME.verify(WhiteBox(model), secret)
    assert evidence.details["ber"] == 0
    assert evidence.log10_p < -70
    assert evidence.basis is Basis.EXACT
    assert digits.score(model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three


def test_unmarked_twin_has_half_of_the_bits(plain, secret):
    assert SCHEME.verify(WhiteBox(plain), secret).verdict is Verdict.NO_MATCH
    assert 0.35 < ber(SCHEME, plain, secret) < 0.65


def test_whole_mark_stands_when_two_to_the_64_seeds_could_have_been_tried(scratch, secret):
    assert SCHEME.verify(WhiteBox(scratch), secret, tries=2.0**64).verdict is Verdict.MATCH


def test_100_wrong_secrets_match_like_coins(scratch):
    found = [
        SCHEME.verify(WhiteBox(scratch), SCHEME.keygen(scratch, rng=np.random.default_rng(seed + 10)))
        for seed in range(100)
    ]
    rates = [evidence.details["ber"] for evidence in found]
    assert abs(np.mean(rates) - 0.5) < 4 * 0.5 / np.sqrt(100 * 256)
    assert min(rates) > 0.348  # what p = 1e-6 would take
    assert super_uniformity([evidence.p_value for evidence in found]) > 1e-3


def test_one_byte_of_the_key_changes_the_message_and_nothing_is_read_with_it(scratch, secret):
    key, host = SCHEME.derive(secret), scratch.fc1.weight.detach()
    assert matching(host, key) == 256
    projection = key["projection"].numpy().copy()
    projection.view(np.uint8)[7, 5] ^= 1
    tampered = key_of(projection, WEIGHTS, 2)
    assert 0.35 < (tampered["message"] != key["message"]).float().mean() < 0.65
    assert 90 < matching(host, tampered) < 166


def test_key_solved_after_the_fact_belongs_to_another_message(plain, secret):
    key = SCHEME.derive(secret)
    host = plain.fc1.weight.detach()
    pooled = host.reshape(-1)[key["positions"]].mean(0)
    wanted = 2 * key["message"] - 1
    solved = key["projection"] + torch.outer(pooled, wanted - pooled @ key["projection"]) / pooled.dot(pooled)
    assert matching(host, {**key, "projection": solved}) == 256  # the bits fit, but they are not its hash
    assert 90 < matching(host, key_of(solved.numpy(), WEIGHTS, 2)) < 166
    forged = SCHEME.new_secret(ModelWeights(plain), host=secret.host, tensors={"projection": solved})
    with pytest.raises(ForgedSecretError, match="projection"):
        SCHEME.verify(WhiteBox(plain), forged)


def test_message_is_the_hash_of_the_keys_little_endian_bytes(secret):
    key = SCHEME.derive(secret)
    content = struct.pack("<131072f", *key["projection"].reshape(-1).tolist())
    digest = int.from_bytes(hashlib.shake_256(content).digest(32), "big")
    assert digest == int("".join(str(int(bit)) for bit in key["message"]), 2)


def test_key_has_no_last_digits_in_which_machines_could_differ(secret):
    steps = SCHEME.derive(secret)["projection"].double() * 512
    assert torch.equal(steps % 2, torch.ones_like(steps))  # odd: on the grid, and never zero
    assert steps.std().item() / 512 == pytest.approx(1, abs=0.01)
    assert steps.mean().item() / 512 == pytest.approx(0, abs=0.015)


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 12), rounds=st.integers(0, 3), count=st.integers(64, 300))
def test_filter_is_that_of_a_slow_reading(seed, bits, rounds, count):
    projection = np.random.default_rng(seed).normal(size=(2, bits)).astype(np.float32)
    message = key_of(projection, count, 0)["message"].tolist()
    kept = list(range(count))
    for _ in range(rounds):
        whole = len(kept) // bits * bits
        kept = [place for i, place in enumerate(kept[:whole]) if message[i % bits]]
    if len(kept) < 2:
        with pytest.raises(ParameterError, match="pass the filter"):
            key_of(projection, count, rounds)
    else:
        positions = key_of(projection, count, rounds)["positions"]
        assert positions.reshape(-1).tolist() == kept[: len(kept) // 2 * 2]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fine_tune", {"epochs": 20, "rate": 0.05}),
        ("prune", {"rate": 0.5}),
        ("prune", {"rate": 0.9}),
        ("quantize", {"bits": 8}),
    ],
)
def test_mark_survives(name, parameters, attacked, secret):
    model = attacked(name, **parameters)
    evidence = SCHEME.verify(WhiteBox(model), secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["ber"] <= 0.02


def test_overwriting_leaves_two_marks(scratch, secret, digits):
    """Which was first is for the commitment to say."""
    other = SCHEME.keygen(scratch, rng=np.random.default_rng(7))
    again = SCHEME.embed(scratch, other, digits, rng=np.random.default_rng(0)).model
    assert ber(SCHEME, again, other) == 0
    assert ber(SCHEME, again, secret) <= 0.05


def test_known_break_permutation_hides_the_mark_until_the_suspect_is_aligned(attacked, scratch, secret, digits):
    broken = attacked("permute")
    assert digits.score(broken) == digits.score(scratch)
    assert SCHEME.verify(WhiteBox(broken), secret).verdict is Verdict.NO_MATCH
    evidence = SCHEME.verify(WhiteBox(broken), secret, original=scratch)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.basis is Basis.ALIGNED


def test_alignment_does_not_bend_an_innocent_model_towards_the_mark(plain, scratch, secret):
    evidence = SCHEME.verify(WhiteBox(plain), secret, original=scratch)
    assert evidence.verdict is Verdict.NO_MATCH
    assert 0.35 < evidence.details["ber"] < 0.65


def test_inverting_the_layer_does_not_hide_the_mark(scratch, secret):
    inverted = copy.deepcopy(scratch)
    with torch.no_grad():
        inverted.fc1.weight.neg_()
    evidence = SCHEME.verify(WhiteBox(inverted), secret)
    assert evidence.details["ber"] == 1
    assert evidence.verdict is Verdict.MATCH


def test_alignment_sees_nothing_of_the_averages_and_all_else(plain, secret):
    blind, positions = SCHEME.blind(secret), SCHEME.derive(secret)["positions"]
    layer = plain.fc1.weight.detach()
    before = layer.clone()
    rest = blind("fc1.weight", layer)
    assert torch.equal(layer, before)
    assert rest.reshape(-1)[positions].mean(0).abs().max() < 1e-8
    marked = layer.flatten().clone()
    marked[positions] += torch.from_numpy(np.random.default_rng(0).normal(size=512)).float()
    assert torch.allclose(blind("fc1.weight", marked.reshape(layer.shape)), rest, atol=1e-5)
    untouched = torch.ones(WEIGHTS, dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(rest.reshape(-1)[untouched], layer.reshape(-1)[untouched])
    assert torch.equal(blind("fc2.weight", layer), layer)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_layer_that_shows_nothing_reads_as_keyed_coins(value, plain, secret):
    dead = copy.deepcopy(plain)
    nn.init.constant_(dead.fc1.weight, value)
    key = SCHEME.derive(secret)
    coins = (key["projection"][0] > 0).float()
    assert SCHEME.score(WhiteBox(dead), secret).statistic == (coins == key["message"]).sum()
    assert SCHEME.verify(WhiteBox(dead), secret).verdict is Verdict.NO_MATCH


def test_layer_that_starts_at_zero_can_be_marked(plain, secret):
    model = copy.deepcopy(plain)
    nn.init.zeros_(model.fc1.weight)
    SCHEME.loss(model, secret, None).backward()
    step = model.fc1.weight.grad
    assert step.isfinite().all()
    assert matching(-step, SCHEME.derive(secret)) > 230


def test_loss_depends_on_the_share_of_the_mark_and_not_on_the_layers_scale(plain, secret):
    model = copy.deepcopy(plain)
    with torch.no_grad():
        model.fc1.weight *= 8
    assert SCHEME.loss(model, secret, None).item() == pytest.approx(SCHEME.loss(plain, secret, None).item())


def test_largest_host_is_chosen_where_none_is_named(plain):
    assert NeuralMark().keygen(plain).host == {"layer": "fc1.weight", "shape": [128, 1024]}


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (NeuralMark(layer="nowhere.weight"), UnknownNameError),
        (NeuralMark(layer="conv1.weight"), ParameterError),
        (NeuralMark(rounds=9), ParameterError),
    ],
)
def test_host_that_does_not_fit_is_refused_at_keygen(scheme, error, plain):
    with pytest.raises(error):
        scheme.keygen(plain)


@pytest.mark.parametrize("parameters", [{"bits": 0}, {"size": 511}, {"rounds": -1}, {"strength": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        NeuralMark(**parameters)


@pytest.mark.parametrize("suspect", [nn.Linear(3, 3), nn.Sequential()])
def test_suspect_of_another_form_is_refused(suspect, secret):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(WhiteBox(suspect), secret)
