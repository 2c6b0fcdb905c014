from __future__ import annotations

import copy
import dataclasses

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
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.ownership.greedy_residuals import GreedyResiduals

SCHEME = GreedyResiduals(layer="fc1.weight")
INNER = GreedyResiduals(layer="conv3.weight")
PUBLIC = dataclasses.replace(SCHEME, keyed=False)


@pytest.fixture(scope="module")
def secret(plain):
    return SCHEME.keygen(plain, payload=b"sealmark", rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def scratch(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng).model


@pytest.fixture(scope="module")
def tuned(digits, plain, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def convolution(digits, plain):
    """Marked in a layer whose units a thief can permute and negate at no cost."""
    key = INNER.keygen(plain, rng=np.random.default_rng(2))
    marked = INNER.embed(plain, key, digits, rng=np.random.default_rng(0))
    return marked.model, marked.secret


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


@pytest.mark.parametrize("scheme", [SCHEME, PUBLIC])
def test_wrong_secrets_match_like_coins(scheme, scratch):
    rates = [
        1 - ber(scheme, scratch, scheme.keygen(scratch, rng=np.random.default_rng(seed + 10)))
        for seed in range(100)
    ]
    assert abs(np.mean(rates) - 0.5) < 4 * 0.5 / np.sqrt(100 * 256)
    assert max(rates) < 167 / 256  # what p = 1e-6 would take


def test_payload_is_read_from_the_marked_model_and_not_from_another(scratch, plain, secret):
    assert SCHEME.decode(WhiteBox(scratch), secret) == b"sealmark"
    assert SCHEME.decode(WhiteBox(plain), secret) != b"sealmark"


def test_bits_file_of_ones_own_is_refused(plain, secret):
    """Reading any model spells a message that fits it; without a seed it is nothing."""
    honest = SCHEME.keygen(plain, rng=np.random.default_rng(3))
    fitting = {"message": torch.ones(256)}
    forged = SCHEME.new_secret(ModelWeights(plain), host=honest.host, tensors=fitting)
    with pytest.raises(ForgedSecretError, match="message"):
        SCHEME.verify(WhiteBox(plain), forged)


def test_mark_belongs_to_the_owner_whose_key_is_in_the_facts(scratch, secret):
    thief = Secret(secret.reveal_seed(), secret.facts | {"owner": "another"})
    assert SCHEME.verify(WhiteBox(scratch), secret).verdict is Verdict.MATCH
    assert SCHEME.verify(WhiteBox(scratch), thief).verdict is Verdict.NO_MATCH


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


def test_overwriting_leaves_the_mark_because_its_rows_are_secret(scratch, secret, digits):
    other = SCHEME.keygen(scratch, rng=np.random.default_rng(7))
    again = SCHEME.embed(scratch, other, digits, rng=np.random.default_rng(0)).model
    assert ber(SCHEME, again, other) == 0
    assert ber(SCHEME, again, secret) <= 0.02


def test_known_break_overwriting_erases_a_mark_with_public_rows(digits, plain):
    """Both marks are the same signs of the same rows, and the last who writes them is right."""
    secrets = [PUBLIC.keygen(plain, rng=np.random.default_rng(seed)) for seed in (8, 9)]
    first = PUBLIC.embed(plain, secrets[0], digits, rng=np.random.default_rng(0)).model
    assert ber(PUBLIC, first, secrets[0]) == 0
    again = PUBLIC.embed(first, secrets[1], digits, rng=np.random.default_rng(0)).model
    assert ber(PUBLIC, again, secrets[1]) == 0
    assert PUBLIC.verify(WhiteBox(again), secrets[0]).verdict is Verdict.NO_MATCH
    assert digits.score(again) >= digits.score(plain) - 0.015


@pytest.mark.parametrize("name", ["permute", "sign_flip"])
def test_known_break_equal_functions_hide_the_mark_until_the_suspect_is_aligned(name, convolution, digits):
    model, secret = convolution
    broken = registry.attack(name).run(model, Resources.of(digits), rng=np.random.default_rng(5)).model
    assert digits.score(broken) == digits.score(model)
    assert INNER.verify(WhiteBox(broken), secret).verdict is Verdict.NO_MATCH
    evidence = INNER.verify(WhiteBox(broken), secret, original=model)
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


def test_alignment_sees_nothing_of_the_layer(plain, scratch, secret):
    blind = SCHEME.blind(secret)
    ours, others = plain.fc1.weight.detach(), scratch.fc1.weight.detach()
    assert not torch.equal(ours, others)
    assert torch.equal(blind("fc1.weight", ours), blind("fc1.weight", others))
    assert torch.equal(blind("fc2.weight", ours), ours)


@pytest.mark.parametrize("keyed", [False, True])
@given(seed=st.integers(0, 2**32), bits=st.integers(1, 8), ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_bits_are_those_of_a_slow_reading(keyed, seed, bits, ratio):
    scheme = GreedyResiduals(bits=bits, ratio=ratio, keyed=keyed)
    model = nn.Linear(13, 5)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 13))))
    key = scheme.keygen(model, rng=np.random.default_rng(seed))
    parts = scheme.derive(key)
    weights = model.weight.detach().reshape(-1).tolist()
    matches = 0
    for row, bit in zip(parts["rows"].tolist(), parts["message"].tolist(), strict=True):
        values = sorted((weights[place] for place in row), key=abs)
        matches += (sum(values[int(ratio * len(values)) :]) >= 0) == (bit == 1)
    assert scheme.score(WhiteBox(model), key).statistic == matches


def test_rows_are_consecutive_or_dealt_by_the_key_and_never_share_a_weight(plain):
    count = 128 * 1024
    keys = [SCHEME.keygen(plain, rng=np.random.default_rng(seed)) for seed in range(2)]
    rows = [SCHEME.derive(key)["rows"] for key in keys]
    assert all(row.shape == (256, 512) and len(row.unique()) == count for row in rows)
    assert not torch.equal(*rows)
    public = PUBLIC.derive(PUBLIC.keygen(plain))["rows"]
    assert torch.equal(public.reshape(-1), torch.arange(count))


def test_hinge_switches_off_when_every_residual_reaches_the_margin(plain, secret):
    model, key = copy.deepcopy(plain), SCHEME.derive(secret)
    assert SCHEME.loss(model, secret, None) > 0
    signs = 2 * key["message"] - 1
    with torch.no_grad():
        model.fc1.weight.reshape(-1)[key["rows"]] = signs[:, None].expand(-1, 512)
    assert SCHEME.loss(model, secret, None) == 0


def test_loss_grows_with_the_layers_scale_and_has_no_scale_of_its_own(plain, secret):
    model = copy.deepcopy(plain)
    with torch.no_grad():
        model.fc1.weight *= 8
    assert SCHEME.loss(model, secret, None).item() == pytest.approx(8 * SCHEME.loss(plain, secret, None).item())


def test_largest_host_is_chosen_where_none_is_named(plain):
    assert GreedyResiduals().keygen(plain).host == {"layer": "fc1.weight", "shape": [128, 1024]}


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (GreedyResiduals(layer="nowhere.weight"), UnknownNameError),
        (GreedyResiduals(layer="conv1.weight"), ParameterError),
        (GreedyResiduals(bits=20000), ParameterError),
    ],
)
def test_host_that_does_not_fit_is_refused_at_keygen(scheme, error, plain):
    with pytest.raises(error):
        scheme.keygen(plain)


@pytest.mark.parametrize("parameters", [{"bits": 0}, {"ratio": 1.0}, {"margin": 0.0}, {"strength": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        GreedyResiduals(**parameters)


@pytest.mark.parametrize("suspect", [nn.Linear(3, 3), nn.Sequential()])
def test_suspect_of_another_form_is_refused(suspect, secret):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(WhiteBox(suspect), secret)
