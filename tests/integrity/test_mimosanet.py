"""MimosaNet: the same answers, useless after any change, and how little it takes to take it off."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, TamperedError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.modes import evaluating
from sealmark.core.registry import attack
from sealmark.core.task import Recipe
from sealmark.core.training import train, train_task
from sealmark.core.weights import save_model, weights_of
from sealmark.integrity.mimosanet import Mimosanet, merge_colinear

SCHEME = Mimosanet()


@pytest.fixture(scope="module")
def flat(digits):
    """The method card's net of 64, 32 and 10 neurons, for the digits."""
    recipe = Recipe(epochs=30, batch_size=32, rate=0.1)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # noqa: E731
    return dataclasses.replace(digits, make=make, recipe=recipe)


@pytest.fixture(scope="module")
def small(flat):
    return train_task(flat, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def sealed(small):
    return SCHEME.seal(small, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def plain_sealed(plain):
    return SCHEME.seal(plain, rng=np.random.default_rng(1))


def answers(task, model):
    with evaluating(model):
        return model(task.test.inputs)


def after_noise(task, model, size):
    """Mean accuracy over three draws of relative noise in every weight."""
    scores = []
    for seed in range(3):
        noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in noisy.parameters():
                parameter *= 1 + size * torch.randn(parameter.shape, generator=generator)
        scores.append(task.score(noisy))
    return np.mean(scores)


def after_an_epoch(task, model, rate=0.01):
    tuned = copy.deepcopy(model)
    recipe = Recipe(epochs=1, batch_size=64, rate=rate)
    train(tuned, task.attacker, loss=task.loss, recipe=recipe, rng=np.random.default_rng(0))
    return task.score(tuned)


@pytest.mark.parametrize("net", ["small", "plain"])
def test_every_answer_is_the_same(net, digits, request):
    model = request.getfixturevalue(net)
    shipped = SCHEME.seal(model, rng=np.random.default_rng(2)).model
    one, other = answers(digits, model), answers(digits, shipped)
    assert torch.equal(one.argmax(1), other.argmax(1))
    assert (one - other).abs().max() < 0.02


def test_the_small_net_is_useless_after_a_thousandth_of_noise_and_after_one_epoch(flat, sealed):
    assert after_noise(flat, sealed.model, 1e-3) <= 0.45
    assert after_noise(flat, sealed.model, 1e-2) <= 0.2
    assert after_an_epoch(flat, sealed.model) <= 0.5


def test_the_plain_net_and_height_one_are_not(flat, small):
    harmless = Mimosanet(height=1.0).seal(small, rng=np.random.default_rng(1)).model
    base = flat.score(small)
    for model in (small, harmless):
        assert after_noise(flat, model, 1e-2) >= base - 0.01
        assert after_an_epoch(flat, model) >= base - 0.02


def test_the_more_height_the_less_noise_it_takes(flat, small):
    scores = [
        after_noise(flat, Mimosanet(height=height).seal(small, rng=np.random.default_rng(1)).model, 1e-3)
        for height in (1.0, 100.0, 1000.0, 10_000.0)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9
    assert scores[-1] < 0.3


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("prune", {"rate": 0.5}),
        ("quantize", {"bits": 8}),
    ],
)
def test_the_digits_net_is_useless_after_an_attack(name, parameters, digits, plain, plain_sealed, rng):
    run = attack(name, **parameters).run
    assert digits.score(run(plain_sealed.model, Resources.of(digits), rng=rng).model) < 0.6
    assert digits.score(run(plain, Resources.of(digits), rng=rng).model) > 0.95


def test_clipped_gradients_make_fine_tuning_work_all_the_same(digits, plain_sealed, rng):
    """The second attack that the card names; the task's recipe clips, the one epoch above does not."""
    assert digits.recipe.clip == 1.0
    result = attack("fine_tune", epochs=5, rate=0.01).run(plain_sealed.model, Resources.of(digits), rng=rng)
    assert digits.score(result.model) > 0.95
    assert after_an_epoch(digits, plain_sealed.model) < 0.5


def test_merging_neurons_takes_it_off(digits, flat, small, sealed, plain, plain_sealed):
    """The attack that the card names: neither key nor data, and all is as before."""
    merged = merge_colinear(sealed.model)
    assert [tuple(p.shape) for p in merged.parameters()] == [tuple(p.shape) for p in small.parameters()]
    assert torch.equal(answers(flat, merged).argmax(1), answers(flat, small).argmax(1))
    assert after_noise(flat, merged, 1e-2) >= flat.score(small) - 0.01
    assert after_an_epoch(flat, merged) >= flat.score(small) - 0.02
    merged = merge_colinear(plain_sealed.model)
    assert merged.fc1.out_features == 128
    assert digits.score(merged) == digits.score(plain)


def test_merging_leaves_an_ordinary_model_as_it_is(plain):
    assert weights_of(merge_colinear(plain)).digest() == weights_of(plain).digest()


def test_merging_drops_neurons_that_say_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = model[0].bias[0] = 0
        model[2].weight[:, 1:] = 0
    merged = merge_colinear(model)
    assert merged[0].weight.shape == (0, 3)
    assert torch.equal(merged(torch.ones(1, 3)), model[2].bias[None])


def test_neurons_are_shuffled_multiples_of_the_originals_and_decoys(small, sealed):
    rows = torch.cat([sealed.model[1].weight, sealed.model[1].bias[:, None]], 1).detach().double()
    own = torch.cat([small[1].weight, small[1].bias[:, None]], 1).detach().double()
    assert len(rows) == 2 * (32 + 16)
    cosines = (rows @ own.T) / rows.norm(dim=1)[:, None] / own.norm(dim=1)
    assert ((cosines > 1 - 1e-6).sum(0) == 2).all()
    places = [(cosines[:, unit] > 1 - 1e-6).nonzero().squeeze(1).tolist() for unit in range(32)]
    assert any(second - first > 2 for first, second in places)
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_sealed_model_matches_its_record_and_opens_to_the_original(small, sealed):
    assert SCHEME.check(sealed.model, sealed.secret).verdict is Verdict.MATCH
    assert weights_of(SCHEME.restore(sealed.model, sealed.secret)).digest() == weights_of(small).digest()


def test_a_change_anywhere_is_found_and_named(plain_sealed):
    for name, tensor in plain_sealed.model.state_dict().items():
        if tensor.is_floating_point():
            suspect = copy.deepcopy(plain_sealed.model)
            suspect.state_dict()[name].view(-1).view(torch.uint8)[-1] ^= 1
            evidence = SCHEME.check(suspect, plain_sealed.secret)
            assert evidence.verdict is Verdict.NO_MATCH
            assert evidence.details == {"changed": [name]}
            with pytest.raises(TamperedError, match=name):
                SCHEME.restore(suspect, plain_sealed.secret)


def test_the_original_an_extra_tensor_and_a_missing_one_are_changes(small, sealed):
    changed = SCHEME.check(small, sealed.secret).details["changed"]
    assert changed == ["1.bias", "1.weight", "3.weight"]
    suspect = copy.deepcopy(sealed.model)
    suspect.register_buffer("more", torch.zeros(1))
    del suspect[3]
    assert SCHEME.check(suspect, sealed.secret).details["changed"] == ["3.bias", "3.weight", "more"]


def test_a_file_is_checked_as_the_live_model_is(sealed, tmp_path):
    save_model(sealed.model, tmp_path / "sealed.safetensors")
    assert SCHEME.check(tmp_path / "sealed.safetensors", sealed.secret).verdict is Verdict.MATCH


def test_each_layer_takes_part_once(rng):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    made = SCHEME.seal(model, rng=rng)
    assert made.secret.host["pairs"] == [["0", "2"]]
    assert made.model[4].weight.equal(model[4].weight)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_any_number_of_copies_without_bias_in_float64_keeps_the_function(copies, rng):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)).double()
    made = Mimosanet(copies=copies, height=1e6, decoys=0.25).seal(model, rng=rng)
    assert made.model[0].out_features == copies * 10
    inputs = torch.ones(3, 4).double()
    torch.testing.assert_close(made.model(inputs), model(inputs), rtol=0, atol=1e-7)
    torch.testing.assert_close(merge_colinear(made.model)(inputs), model(inputs), rtol=0, atol=1e-7)
    assert not made.model[0].weight.equal(model[0].weight)


def test_frozen_weights_stay_frozen(rng):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    assert not any(p.requires_grad for p in SCHEME.seal(model, rng=rng).model.parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.three.weight = self.one.weight

    def forward(self, inputs):
        return self.three(self.two(self.one(inputs).relu()))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        nn.Sequential(nn.Linear(4, 2)),
        Tied(),
    ],
    ids=["another activation", "a norm", "convolutions", "a convolution", "one layer", "tied weights"],
)
def test_a_model_without_such_a_place_is_refused(model):
    with pytest.raises(UnsupportedError, match="no place for this seal"):
        SCHEME.seal(model)


@pytest.mark.parametrize(("dtype", "height"), [(torch.float32, 1e5), (torch.bfloat16, 1.0), (torch.float16, 10.0)])
def test_a_type_in_which_nothing_cancels_is_refused(dtype, height):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    with pytest.raises(UnsupportedError, match="cannot hold weights that cancel"):
        Mimosanet(height=height).seal(model)


@pytest.mark.parametrize("bad", [{"copies": 1}, {"height": 0.5}, {"decoys": -0.1}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters of mimosanet"):
        Mimosanet(**bad)
