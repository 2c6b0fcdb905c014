from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import sealmark
from sealmark.core.errors import (
    ForgedSecretError,
    MarkFailedError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
)
from sealmark.core.evidence import Verdict
from sealmark.core.modes import chunks
from sealmark.core.secret import tensor_digest
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.ownership.uchida import Uchida

SCHEME = Uchida(layer="fc1.weight")


@pytest.fixture(scope="module")
def secret(plain):
    return SCHEME.keygen(plain, payload=b"sealmark", rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def scratch(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng)


@pytest.fixture(scope="module")
def tuned(digits, plain, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def looped(digits, secret):
    """Trained in a loop of the user's own, with Adam."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    model, criterion = sealmark.attach(SCHEME, digits.model(rng), nn.CrossEntropyLoss(), secret, rng=rng)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(10):
        for rows in chunks(torch.randperm(digits.owner.rows, generator=generator), 64):
            optimizer.zero_grad()
            criterion(model(digits.owner.inputs[rows]), digits.owner.targets[rows]).backward()
            optimizer.step()
    criterion.detach()
    return model


@pytest.mark.parametrize("how", ["scratch", "tuned", "looped"])
def test_256_bits_are_read_without_error_however_they_were_embedded(how, request, secret, digits, plain):
    model = request.getfixturevalue(how)
    evidence = SCHEME.verify(WhiteBox(model), secret)
    assert evidence.details["ber"] == 0
    assert evidence.log10_p < -30
    assert digits.score(model) >= digits.score(plain) - 0.015  # one seed; the bound is held over three


def test_unmarked_twin_has_half_of_the_bits(plain, secret):
    evidence = SCHEME.verify(WhiteBox(plain), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert 0.35 < evidence.details["ber"] < 0.65


def test_500_wrong_secrets_match_like_coins(scratch):
    rates = []
    for seed in range(500):
        key = SCHEME.keygen(scratch, rng=np.random.default_rng(seed + 10))
        rates.append(1 - SCHEME.score(WhiteBox(scratch), key).details["ber"])
    assert abs(np.mean(rates) - 0.5) < 4 * 0.5 / np.sqrt(500 * 256)
    assert max(rates) < 167 / 256  # what p = 1e-6 would take


def test_message_is_fair_and_belongs_to_its_secret(plain):
    messages = [
        SCHEME.derive(SCHEME.keygen(plain, rng=np.random.default_rng(seed)))["message"].numpy()
        for seed in range(20)
    ]
    assert abs(np.mean(messages) - 0.5) < 4 * 0.5 / np.sqrt(20 * 256)
    assert len({message.tobytes() for message in messages}) == 20


def test_payload_is_read_from_the_marked_model_and_not_from_another(scratch, plain, secret):
    assert SCHEME.decode(WhiteBox(scratch), secret) == b"sealmark"
    assert SCHEME.decode(WhiteBox(plain), secret) != b"sealmark"


def test_key_solved_after_the_fact_fits_and_is_refused(plain):
    honest = SCHEME.keygen(plain, rng=np.random.default_rng(3))
    key = SCHEME.derive(honest)
    host = plain.get_parameter("fc1.weight").detach().mean(0)
    wanted = 2 * key["message"] - 1
    solved = key["projection"] + torch.outer(wanted - key["projection"] @ host, host) / host.dot(host)
    assert torch.equal((solved @ host >= 0).float(), key["message"])  # it would decode without an error
    forged = SCHEME.new_secret(ModelWeights(plain), host=honest.host, tensors={"projection": solved})
    assert forged.facts["tensors"]["projection"] == tensor_digest(solved)
    with pytest.raises(ForgedSecretError, match="projection"):
        SCHEME.verify(WhiteBox(plain), forged)


def test_inverting_the_mark_does_not_hide_it(scratch, secret):
    """Weight shifting by more than the mean turns every bit round (Lukas et al. 2022)."""
    shifted = copy.deepcopy(scratch)
    with torch.no_grad():
        shifted.fc1.weight -= 1.2 * shifted.fc1.weight.mean(0)
    evidence = SCHEME.verify(WhiteBox(shifted), secret)
    assert evidence.details["ber"] == 1
    assert evidence.verdict is Verdict.MATCH


def test_order_of_output_filters_does_not_matter(scratch, secret):
    shuffled = copy.deepcopy(scratch)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in (shuffled.fc1.weight, shuffled.fc1.bias):
            tensor.copy_(tensor[order])
        shuffled.fc2.weight.copy_(shuffled.fc2.weight[:, order])
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(shuffled.eval()(x), scratch.eval()(x), atol=1e-4)
    assert SCHEME.verify(WhiteBox(shuffled), secret).verdict is Verdict.MATCH


def test_known_break_permuting_the_inputs_hides_the_mark(scratch, secret, digits):
    """It costs nothing: conv3's channels and fc1's columns move together. Alignment is the cure."""
    broken = copy.deepcopy(scratch)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [broken.conv3.weight, broken.conv3.bias]
        parts += [getattr(broken.norm3, name) for name in ("weight", "bias", "running_mean", "running_var")]
        for tensor in parts:
            tensor.copy_(tensor[order])
        columns = broken.fc1.weight.reshape(128, 64, 16)[:, order].reshape(128, 1024)
        broken.fc1.weight.copy_(columns)
    assert digits.score(broken) == digits.score(scratch)
    assert SCHEME.verify(WhiteBox(broken), secret).verdict is Verdict.NO_MATCH


def test_too_few_bits_for_the_level_are_inconclusive(plain):
    short = Uchida(layer="fc1.weight", bits=16)
    evidence = short.verify(WhiteBox(plain), short.keygen(plain))
    assert evidence.verdict is Verdict.INCONCLUSIVE


def test_a_short_mark_that_is_whole_was_embedded_although_it_proves_nothing(toy):
    rng = np.random.default_rng(0)
    short = Uchida(layer="2.weight", bits=8, strength=1.0)
    start = toy.model(rng)
    key = short.keygen(start, rng=rng)
    marked = short.embed(start, key, toy, rng=rng)
    evidence = short.verify(WhiteBox(marked), key)
    assert evidence.details["ber"] == 0
    assert evidence.verdict is Verdict.INCONCLUSIVE
    with pytest.raises(MarkFailedError):
        short.check_embedded(start, key)


def test_largest_host_is_chosen_where_none_is_named(plain):
    assert Uchida().keygen(plain).host == {"layer": "fc1.weight", "length": 1024}


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (Uchida(layer="nowhere.weight"), UnknownNameError),
        (Uchida(layer="conv1.weight"), ParameterError),
        (Uchida(bits=2000), ParameterError),
    ],
)
def test_host_that_does_not_fit_is_refused_at_keygen(scheme, error, plain):
    with pytest.raises(error):
        scheme.keygen(plain)


@pytest.mark.parametrize("parameters", [{"bits": 0}, {"strength": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Uchida(**parameters)


def test_payload_that_is_too_long_is_refused_at_keygen(plain):
    with pytest.raises(ParameterError, match="at most 32 bytes"):
        SCHEME.keygen(plain, payload=bytes(33))


@pytest.mark.parametrize("suspect", [nn.Linear(3, 3), nn.Sequential()])
def test_suspect_of_another_form_is_refused(suspect, secret):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(WhiteBox(suspect), secret)
