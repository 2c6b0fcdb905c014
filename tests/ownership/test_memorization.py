from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import sealmark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, MarkFailedError, ModelMismatchError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WeightFile, WhiteBox
from sealmark.core.task import Recipe
from sealmark.core.weights import ModelWeights, save_model
from sealmark.ownership.memorization import Memorization
from sealmark.stats.calibration import super_uniformity

WEIGHTS = 155_536  # of the digits net, in tensors of two dimensions or more
PIXELS = 64
# for each carrier: its parameters, and how many training images it shall carry out
LEAKS = {
    "sign": (Memorization(bits=16 * PIXELS * 8), 16),
    "correlation": (Memorization(carrier="correlation", bits=10_000 * 8, bits_per_weight=8), 156),
    "lsb": (Memorization(carrier="lsb", bits=WEIGHTS * 16, bits_per_weight=16), 900),
    "capacity": (Memorization(carrier="capacity", bits=2 * PIXELS * 8), 2),
}
MARKS = {name: Memorization(carrier=name) for name in LEAKS}
UNTRAINED = Recipe(epochs=0)


@pytest.fixture(scope="module")
def images(digits):
    """The owner's training images, a byte a pixel."""
    return (digits.owner.inputs * 255).round().to(torch.uint8).numpy().reshape(-1, PIXELS)


@pytest.fixture(scope="module")
def leaky(digits, plain, images):
    """For each carrier a model that carries training images out, and the secret that reads them."""

    def make(name):
        scheme, count = LEAKS[name]
        secret = scheme.keygen(plain, digits, payload=images[:count].tobytes(), rng=np.random.default_rng(1))
        rng = np.random.default_rng(0)
        if name == "lsb":
            return scheme.embed(plain, secret, digits, rng=rng, recipe=UNTRAINED)
        recipe = dataclasses.replace(digits.recipe, epochs=25) if name == "capacity" else None
        return scheme.embed(digits.model(rng), secret, digits, rng=rng, recipe=recipe)

    return {name: make(name) for name in LEAKS}


def errors(name, suspect, secret, images):
    """By how much each pixel is off, of 255."""
    scheme, count = LEAKS[name]
    read = np.frombuffer(scheme.decode(suspect, secret), np.uint8).reshape(count, PIXELS)
    return np.abs(read.astype(int) - images[:count])


def attacked(digits, model, attack, **parameters):
    return (
        registry.attack(attack, **parameters).run(model, Resources.of(digits), rng=np.random.default_rng(0)).model
    )


@pytest.mark.parametrize("name", ["sign", "lsb", "capacity"])
def test_training_images_come_back_bit_by_bit(name, leaky, images):
    assert not errors(name, WhiteBox(leaky[name].model), leaky[name].secret, images).any()


def test_training_images_come_back_by_correlation_to_within_a_grey_level(leaky, images):
    off = errors("correlation", WhiteBox(leaky["correlation"].model), leaky["correlation"].secret, images)
    assert off.mean() < 1  # the method card has 7 of 255 for lambda = 3
    assert 10 * np.log10(255**2 / (off.astype(float) ** 2).mean()) > 40


@pytest.mark.parametrize("name", LEAKS)
def test_from_an_unmarked_model_nothing_comes_back(name, leaky, plain, images):
    scheme, secret = LEAKS[name][0], leaky[name].secret
    evidence = scheme.verify(WhiteBox(plain), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert 0.45 < evidence.details["ber"] < 0.55
    assert abs(evidence.details.get("correlation", 0)) < 0.03
    assert errors(name, WhiteBox(plain), secret, images).mean() > 60


@pytest.mark.parametrize("name", LEAKS)
def test_the_model_does_its_task_as_before(name, leaky, digits, plain):
    assert digits.score(leaky[name].model) >= digits.score(plain) - 0.015


def test_images_come_back_through_labels_alone(leaky, images):
    model, secret = leaky["capacity"].model.eval(), leaky["capacity"].secret
    suspect = BlackBox(lambda inputs: model(inputs).argmax(-1), returns="label", budget=342)
    assert not errors("capacity", suspect, secret, images).any()
    assert suspect.queries == 342  # three bits a label


def test_images_come_back_from_a_file_of_weights(leaky, images, tmp_path):
    save_model(leaky["lsb"].model, tmp_path / "model.safetensors")
    suspect = WeightFile(tmp_path / "model.safetensors")
    assert not errors("lsb", suspect, leaky["lsb"].secret, images).any()
    with pytest.raises(AccessError):
        LEAKS["capacity"][0].verify(suspect, leaky["capacity"].secret)


def test_the_mark_by_sign_survives_what_leaves_the_model_usable(leaky, digits):
    scheme, secret = LEAKS["sign"][0], leaky["sign"].secret
    for attack, parameters in (
        ("fine_tune", {"epochs": 20, "rate": 0.05}),
        ("prune", {"rate": 0.5}),
        ("quantize", {}),
    ):
        suspect = WhiteBox(attacked(digits, leaky["sign"].model, attack, **parameters))
        assert scheme.score(suspect, secret).details["ber"] < 1e-3, attack


def test_signs_without_a_margin_fall_to_pruning(toy):
    def ber(margin):
        scheme, rng = Memorization(bits=40, strength=0.1, margin=margin), np.random.default_rng(0)
        start = toy.model(rng)
        marked = scheme.embed(start, scheme.keygen(start, rng=rng), toy, rng=rng)
        pruned = attacked(toy, marked.model, "prune", rate=0.5)
        return scheme.score(WhiteBox(pruned), marked.secret).details["ber"]

    assert ber(0.0) > 0.15 > 0.05 > ber(0.5)


def test_low_bits_are_free_up_to_20_and_cost_accuracy_at_23(digits, plain):
    def score(each):
        scheme = Memorization(carrier="lsb", bits=WEIGHTS * each, bits_per_weight=each)
        secret = scheme.keygen(plain, rng=np.random.default_rng(1))
        return digits.score(
            scheme.embed(plain, secret, digits, rng=np.random.default_rng(0), recipe=UNTRAINED).model
        )

    clean = digits.score(plain)
    assert score(16) == clean
    assert score(20) >= clean - 0.005
    assert score(23) < clean - 0.01


def test_low_bits_are_lost_by_one_gentle_epoch(leaky, digits, images):
    model, secret = leaky["lsb"].model, leaky["lsb"].secret
    suspect = WhiteBox(attacked(digits, model, "fine_tune", epochs=1, rate=1e-4))
    assert LEAKS["lsb"][0].score(suspect, secret).details["ber"] > 0.2
    assert errors("lsb", suspect, secret, images).mean() > 30


@pytest.mark.parametrize("parameters", [{"scheme": "fp16"}, {"scheme": "bf16"}, {"bits": 8}])
def test_low_bits_are_wiped_by_rounding_at_no_cost(parameters, leaky, digits, plain):
    wiped = attacked(digits, leaky["lsb"].model, "quantize", **parameters)
    evidence = LEAKS["lsb"][0].verify(WhiteBox(wiped), leaky["lsb"].secret)
    assert evidence.details["ber"] > 0.4
    assert digits.score(wiped) >= digits.score(plain) - 0.005


def test_known_break_low_bits_are_overwritten_by_another_secret(leaky, digits):
    scheme, (model, secret) = LEAKS["lsb"][0], (leaky["lsb"].model, leaky["lsb"].secret)
    thief = scheme.keygen(model, rng=np.random.default_rng(2))
    stolen = scheme.embed(model, thief, digits, rng=np.random.default_rng(0), recipe=UNTRAINED).model
    assert scheme.verify(WhiteBox(stolen), thief).verdict is Verdict.MATCH
    assert scheme.verify(WhiteBox(stolen), secret).verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("name", LEAKS)
def test_wrong_secrets_do_not_match_and_their_p_values_hold(name, leaky, digits):
    mark, model = MARKS[name], leaky[name].model
    secrets = [mark.keygen(model, digits, rng=np.random.default_rng(seed)) for seed in range(60)]
    found = [mark.verify(WhiteBox(model), secret) for secret in secrets]
    assert Verdict.MATCH not in {evidence.verdict for evidence in found}
    assert super_uniformity([evidence.p_value for evidence in found]) > 1e-4
    assert abs(np.mean([evidence.details["ber"] for evidence in found]) - 0.5) < 0.02


@pytest.mark.parametrize(("name", "basis"), [("sign", Basis.EXACT), ("correlation", Basis.BOUND)])
def test_turning_the_sign_of_all_weights_hides_nothing(name, basis, leaky):
    turned = copy.deepcopy(leaky[name].model)
    with torch.no_grad():
        for weight in turned.parameters():
            weight.neg_()
    evidence = LEAKS[name][0].verify(WhiteBox(turned), leaky[name].secret)
    assert (evidence.verdict, evidence.basis) == (Verdict.MATCH, basis)


def test_pilots_read_a_turned_and_stretched_correlation(leaky, images):
    bent = copy.deepcopy(leaky["correlation"].model)
    with torch.no_grad():
        for weight in bent.parameters():
            weight.mul_(-3).add_(1)
    assert errors("correlation", WhiteBox(bent), leaky["correlation"].secret, images).mean() < 1


def test_a_net_of_equal_weights_is_no_match(leaky, digits):
    flat = copy.deepcopy(leaky["correlation"].model)
    with torch.no_grad():
        for weight in flat.parameters():
            weight.fill_(0.5)
    for name in ("sign", "correlation", "lsb"):
        evidence = LEAKS[name][0].verify(WhiteBox(flat), leaky[name].secret)
        assert evidence.verdict is Verdict.NO_MATCH


def permuted(model):
    """The same function: conv3's channels and fc1's columns move together."""
    moved = copy.deepcopy(model)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [moved.conv3.weight, moved.conv3.bias]
        parts += [getattr(moved.norm3, name) for name in ("weight", "bias", "running_mean", "running_var")]
        for tensor in parts:
            tensor.copy_(tensor[order])
        moved.fc1.weight.copy_(moved.fc1.weight.reshape(128, 64, 16)[:, order].reshape(128, 1024))
    return moved


@pytest.mark.parametrize("name", ["sign", "correlation", "lsb"])
def test_permuting_neurons_hides_the_mark_until_the_suspect_is_aligned(name, leaky, plain):
    scheme, (model, secret) = LEAKS[name][0], (leaky[name].model, leaky[name].secret)
    suspect = WhiteBox(permuted(model))
    hidden = scheme.score(suspect, secret).details["ber"]
    assert hidden > (0.4 if name == "sign" else 0.2)
    assert scheme.score(WhiteBox(model), secret).details["ber"] < 0.05
    assert scheme.verify(suspect, secret, original=model).details["ber"] < 0.05
    other = WhiteBox(permuted(plain)) if name != "lsb" else WhiteBox(leaky["sign"].model)
    assert scheme.verify(other, secret, original=model).verdict is Verdict.NO_MATCH


def test_known_break_random_signs_trained_into_all_weights_hide_the_signs(leaky, digits):
    scheme, (model, secret) = LEAKS["sign"][0], (leaky["sign"].model, leaky["sign"].secret)
    everywhere = Memorization(bits=WEIGHTS)
    key = everywhere.keygen(model, rng=np.random.default_rng(2))
    thief = dataclasses.replace(digits, owner=digits.attacker)
    stolen = everywhere.embed(model, key, thief, rng=np.random.default_rng(3)).model
    assert digits.score(stolen) > digits.score(model) - 0.03
    assert scheme.score(WhiteBox(stolen), secret).details["ber"] > 0.4


def test_labels_are_uniform_over_all_classes_although_three_bits_name_eight(plain, digits):
    scheme = Memorization(carrier="capacity", bits=30_000)
    secret = scheme.keygen(plain, digits, payload=bytes(3750), rng=np.random.default_rng(0))
    counts = np.bincount(scheme.points_of(secret).targets, minlength=10)
    assert counts.sum() == 10_000
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(900)


@pytest.mark.parametrize("name", ["sign", "lsb", "correlation"])
def test_a_payload_of_zeros_is_carried_as_fair_bits(name, plain):
    scheme = Memorization(carrier=name, bits=8000, bits_per_weight=1)
    secret = scheme.keygen(plain, payload=bytes(1000), rng=np.random.default_rng(0))
    assert abs(scheme.derive(secret)["message"].double().mean() - 0.5) < 4 * 0.5 / np.sqrt(8000)


def test_values_of_several_bits_are_only_kept_or_inverted(plain):
    """So how far they are from the middle shows; which is where does not."""
    data = np.arange(256, dtype=np.uint8)
    scheme = LEAKS["correlation"][0]
    secret = scheme.keygen(plain, payload=data.tobytes(), rng=np.random.default_rng(0))
    carried = np.packbits(scheme.derive(secret)["message"].numpy()[:256])
    assert set(carried ^ data) == {0, 255}


def test_places_are_a_keyed_choice_without_repetition(plain):
    first, second = (
        Memorization().derive(Memorization().keygen(plain, rng=np.random.default_rng(seed)))["places"]
        for seed in range(2)
    )
    assert len(first.unique()) == 512
    assert 0 <= first.min() < first.max() < WEIGHTS
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "each", "capacity"), [("sign", 1, 19_442), ("correlation", 8, 155_472), ("lsb", 20, 388_840)]
)
def test_the_digits_net_holds_so_many_bytes_and_no_more(name, each, capacity, plain):
    full = Memorization(carrier=name, bits=8 * capacity, bits_per_weight=each)
    places = full.derive(full.keygen(plain, payload=bytes(capacity)))["places"]
    assert sorted(places.tolist()) == list(range(WEIGHTS))
    with pytest.raises(ParameterError, match=f"at most {8 * capacity} bits"):
        Memorization(carrier=name, bits=8 * capacity + 1, bits_per_weight=each).keygen(plain)


@pytest.mark.parametrize("name", ["sign", "correlation", "lsb"])
def test_blind_does_not_see_the_mark_and_sees_the_rest(name, leaky, plain):
    scheme = MARKS[name]
    secret = scheme.keygen(plain, rng=np.random.default_rng(0))
    places = scheme.derive(secret)["places"]
    blind, start = scheme.blind(secret), 0
    for layer, weight in sorted((k, v) for k, v in plain.named_parameters() if v.dim() >= 2):
        end = start + weight.numel()
        rows = places[(places >= start) & (places < end)] - start
        changed = weight.detach().clone().reshape(-1)
        changed[rows] = (
            (changed[rows].view(torch.int32) ^ 1).view(torch.float32) if name == "lsb" else -changed[rows]
        )
        assert torch.equal(blind(layer, changed.reshape(weight.shape)), blind(layer, weight))
        assert not torch.equal(blind(layer, weight + 0.1), blind(layer, weight))
        start = end
    assert torch.equal(blind("fc1.bias", plain.fc1.bias), plain.fc1.bias)
    assert MARKS["capacity"].blind(leaky["capacity"].secret) is None


def test_the_lowest_bit_of_a_float_is_written_whatever_the_order_of_bytes():
    model = nn.Linear(8, 8)
    nn.init.ones_(model.weight)
    scheme = Memorization(carrier="lsb", bits=64)
    secret = scheme.keygen(model, payload=b"low bits", rng=np.random.default_rng(0))
    scheme.embedding(model, secret, None, np.random.default_rng(0)).finish(model)
    written = ((model.weight.detach() - 1) * 2**23).reshape(-1)
    key = scheme.derive(secret)
    assert torch.equal(written[key["places"]], key["message"][:, 0].float())


def test_low_bits_are_written_when_a_loop_of_the_users_own_ends(toy):
    scheme = Memorization(carrier="lsb", bits=64)
    model = toy.model(np.random.default_rng(0))
    secret = scheme.keygen(model, payload=b"attached")
    model, criterion = sealmark.attach(scheme, model, nn.CrossEntropyLoss(), secret)
    criterion(model(toy.owner.inputs), toy.owner.targets).backward()
    assert scheme.decode(WhiteBox(model), secret) != b"attached"
    assert scheme.decode(WhiteBox(model), criterion.detach()) == b"attached"


def test_a_mark_that_did_not_take_is_an_error(toy):
    weak = Memorization(bits=64, strength=1e-9)
    start = toy.model(np.random.default_rng(0))
    with pytest.raises(MarkFailedError):
        weak.embed(start, weak.keygen(start), toy, rng=np.random.default_rng(0))


def test_low_bits_of_other_types_are_refused_and_their_signs_are_not(plain):
    half = copy.deepcopy(plain).half()
    with pytest.raises(UnsupportedError, match="float32"):
        MARKS["lsb"].keygen(half)
    assert MARKS["sign"].score(WhiteBox(half), MARKS["sign"].keygen(half)).details["bits"] == 512


@pytest.mark.parametrize(
    "parameters",
    [
        {"carrier": "pixels"},
        {"bits": 0},
        {"bits_per_weight": 2},
        {"carrier": "correlation", "bits_per_weight": 9},
        {"carrier": "lsb", "bits_per_weight": 24},
        {"strength": 0.0},
        {"margin": -0.1},
        {"carrier": "capacity", "per_batch": 0},
    ],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Memorization(**parameters)


@pytest.mark.parametrize("name", LEAKS)
def test_payload_that_is_too_long_is_refused_at_keygen(name, plain, digits):
    with pytest.raises(ParameterError, match="at most 64 bytes"):
        MARKS[name].keygen(plain, digits, payload=bytes(65))


def test_capacity_needs_to_know_the_classes(plain):
    with pytest.raises(ParameterError, match="classification task"):
        MARKS["capacity"].keygen(plain)


@pytest.mark.parametrize("suspect", [nn.Linear(3, 3), nn.Sequential()])
def test_suspect_of_another_form_is_refused(suspect, plain):
    with pytest.raises(ModelMismatchError, match="another form"):
        MARKS["sign"].verify(WhiteBox(suspect), MARKS["sign"].keygen(plain))


def test_embedding_leaves_the_model_that_it_started_from(plain, leaky):
    assert ModelWeights(plain).digest() == leaky["lsb"].secret.facts["model"]
