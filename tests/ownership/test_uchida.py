from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import nn

import sealmark
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import (
    ForgedSecretError,
    MarkFailedError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
)
from sealmark.core.evidence import Verdict
from sealmark.core.modes import chunks
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Batch
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights
from sealmark.ownership.uchida import Uchida, distilled, soft_cross_entropy

SCHEME = Uchida(layer="fc1.weight")
SPARSE = [Uchida(layer="fc1.weight", strength=1.0, projection=kind) for kind in ("direct", "diff")]
HINGE = Uchida(layer="conv3.weight", bits=64, objective="hinge")
DISTILL = Uchida(layer="fc1.weight", strength=0.05, distill=True)


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
def brief(digits):
    return dataclasses.replace(digits.recipe, epochs=6)


@pytest.fixture(scope="module")
def sparse(digits, plain, brief):
    """For each of `SPARSE` its secret and a marked model."""
    made = {}
    for scheme in SPARSE:
        rng = np.random.default_rng(0)
        marked = scheme.embed(plain, scheme.keygen(plain, rng=rng), digits, rng=rng, recipe=brief)
        made[scheme] = (marked.secret, marked.model)
    return made


@pytest.fixture(scope="module")
def covert(digits, brief):
    """The mark under the hinge and under the paper's loss, on the same start in the same order."""
    made = {}
    for scheme in (HINGE, dataclasses.replace(HINGE, objective="bce")):
        rng = np.random.default_rng(0)
        start = digits.model(rng)
        marked = scheme.embed(start, scheme.keygen(start, rng=rng), digits, rng=rng, recipe=brief)
        made[scheme.objective] = (marked.secret, marked.model)
    return made


@pytest.fixture(scope="module")
def pool(digits, brief):
    """Hosts of four unmarked models."""
    models = [train_task(digits, rng=np.random.default_rng(100 + seed), recipe=brief) for seed in range(4)]
    return [host_of(model, "conv3.weight") for model in models]


def host_of(model, layer):
    return model.get_parameter(layer).detach().mean(0).flatten().numpy()


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


def test_secret_with_a_projection_of_its_own_fits_and_is_refused_wherever_it_is_used(plain, digits):
    honest = SCHEME.keygen(plain, payload=b"mine", rng=np.random.default_rng(3))
    key = SCHEME.derive(honest)
    host = torch.from_numpy(host_of(plain, "fc1.weight"))
    wanted = 2 * key["message"] - 1
    solved = key["projection"] + torch.outer(wanted - key["projection"] @ host, host) / host.dot(host)
    forged = honest.with_learned({"projection": solved})
    assert SCHEME.score(WhiteBox(plain), forged).details["ber"] == 0  # so the refusal is all that stands
    assert SCHEME.score(WhiteBox(plain), honest).details["ber"] > 0.35
    for use in (
        partial(SCHEME.verify, WhiteBox(plain), forged),
        partial(SCHEME.decode, WhiteBox(plain), forged),
        partial(SCHEME.embed, plain, forged, digits, rng=np.random.default_rng(0)),
        partial(sealmark.attach, SCHEME, plain, nn.CrossEntropyLoss(), forged),
    ):
        with pytest.raises(ForgedSecretError, match="its own projection"):
            use()


def test_solved_projection_that_is_committed_changes_the_message_it_was_solved_for(plain):
    """Only what is learned stays out of the streams: a forger must bring the message along, too."""
    honest = SCHEME.keygen(plain, rng=np.random.default_rng(3))
    carried = SCHEME.new_secret(
        ModelWeights(plain),
        host=honest.host,
        tensors={"projection": torch.ones(256, 1024)},
        rng=np.random.default_rng(3),
    )
    assert carried.reveal_seed() == honest.reveal_seed()
    matches = (SCHEME.derive(carried)["message"] == SCHEME.derive(honest)["message"]).sum()
    assert 80 < matches < 176


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
    marked = short.embed(start, key, toy, rng=rng).model
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


@pytest.mark.parametrize(
    "parameters", [{"bits": 0}, {"strength": 0.0}, {"margin": 0.0}, {"projection": "dense"}, {"objective": "mse"}]
)
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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fine_tune", {"epochs": 20, "rate": 0.05}),
        ("prune", {"rate": 0.5, "scope": "tensor"}),
        ("quantize", {"bits": 8}),
    ],
)
def test_mark_survives(name, settings, scratch, secret, digits):
    attack = registry.modification(name, **settings)
    attacked = attack.run(scratch, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert ModelWeights(attacked).digest() != ModelWeights(scratch).digest()
    assert SCHEME.verify(WhiteBox(attacked), secret).details["ber"] == 0


@pytest.mark.parametrize("scheme", SPARSE, ids=lambda scheme: scheme.projection)
class TestSparseProjections:
    def test_every_row_has_its_entries_in_columns_of_its_own(self, scheme, plain):
        projection = scheme.derive(scheme.keygen(plain))["projection"]
        entries = [1.0] if scheme.projection == "direct" else [-1.0, 1.0]
        assert projection.shape == (256, 1024)
        assert [sorted(row[row != 0].tolist()) for row in projection] == [entries] * 256
        assert (projection != 0).sum(0).max() == 1

    def test_columns_are_keyed(self, scheme, plain):
        one, other = (scheme.derive(scheme.keygen(plain))["projection"] for _ in range(2))
        assert (one == other).all(1).sum() < 16

    def test_256_bits_are_read_without_error_from_a_marked_model_and_not_from_its_twin(
        self, scheme, sparse, plain, digits
    ):
        secret, model = sparse[scheme]
        assert scheme.verify(WhiteBox(model), secret).details["ber"] == 0
        assert digits.score(model) >= digits.score(plain) - 0.015
        assert 0.35 < scheme.verify(WhiteBox(plain), secret).details["ber"] < 0.65

    def test_wrong_secrets_match_like_coins(self, scheme, sparse):
        _, model = sparse[scheme]
        keys = [scheme.keygen(model, rng=np.random.default_rng(seed + 10)) for seed in range(200)]
        rates = np.array([1 - scheme.score(WhiteBox(model), key).details["ber"] for key in keys])
        assert abs(rates.mean() - 0.5) < 4 * 0.5 / np.sqrt(200 * 256)
        assert 0.8 < rates.var() / (0.25 / 256) < 1.25
        assert rates.max() < 167 / 256

    def test_inverting_the_mark_does_not_hide_it(self, scheme, sparse):
        secret, model = sparse[scheme]
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            shifted.fc1.weight -= 2 * shifted.fc1.weight.mean(0)
        assert scheme.verify(WhiteBox(shifted), secret).details["ber"] == 1
        assert scheme.verify(WhiteBox(shifted), secret).verdict is Verdict.MATCH

    def test_far_too_little_strength_is_told(self, scheme, plain, digits, brief):
        weak = dataclasses.replace(scheme, strength=0.001)
        once = dataclasses.replace(brief, epochs=1)
        with pytest.raises(MarkFailedError, match="Raise the strength"):
            weak.embed(plain, weak.keygen(plain), digits, rng=np.random.default_rng(0), recipe=once)


def test_difference_needs_two_entries_a_bit(plain):
    with pytest.raises(ParameterError, match="at most 512 bits"):
        Uchida(layer="fc1.weight", bits=513, projection="diff").keygen(plain)
    Uchida(layer="fc1.weight", bits=513, projection="direct").keygen(plain)


@pytest.mark.parametrize("objective", ["hinge", "bce"])
def test_64_bits_are_read_without_error_under_either_objective(objective, covert, digits):
    secret, model = covert[objective]
    assert registry.scheme_of(secret).verify(WhiteBox(model), secret).details["ber"] <= (objective == "bce") / 64
    assert digits.score(model) > 0.97


def test_hinge_leaves_the_distribution_of_the_weights_as_it_was_and_the_paper_does_not(covert, pool):
    clean = np.concatenate(pool)
    usual = max(ks_2samp(one, np.concatenate([o for o in pool if o is not one])).statistic for one in pool)
    hinge, paper = (host_of(covert[name][1], "conv3.weight") for name in ("hinge", "bce"))
    assert usual < 0.12
    assert ks_2samp(hinge, clean).statistic < 0.12
    assert 0.8 < hinge.std() / clean.std() < 1.25
    assert ks_2samp(paper, clean).statistic > 0.3
    assert paper.std() > 3 * clean.std()


def test_hinge_stops_pushing_at_its_margin_and_the_paper_does_not(covert, digits):
    batch = digits.owner.take(slice(0, 2))
    for objective, sign in (("hinge", 0), ("bce", 1)):
        secret, _ = covert["hinge"]
        scheme = dataclasses.replace(HINGE, objective=objective)
        key = scheme.derive(secret)
        model = copy.deepcopy(covert["hinge"][1])
        with torch.no_grad():  # a host that has exactly the margin, twice over
            host = torch.linalg.pinv(key["projection"]) @ ((2 * key["message"] - 1) * 2 * scheme.margin)
            model.conv3.weight.copy_(host.reshape(32, 3, 3).expand_as(model.conv3.weight))
        assert (scheme.loss(model, secret, batch).item() > 1e-6) == sign


def test_hinge_outlives_fine_tuning(covert, digits):
    secret, model = covert["hinge"]
    attack = registry.modification("fine_tune", epochs=10, rate=0.05)
    tuned = attack.run(model, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert HINGE.verify(WhiteBox(tuned), secret).details["ber"] <= 1 / 64


@pytest.fixture(scope="module")
def mislabeled(digits):
    """The digits with the owner's labels shuffled."""
    order = torch.randperm(digits.owner.rows, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(digits, owner=Batch(digits.owner.inputs, digits.owner.targets[order]))


def test_distilling_marks_a_trained_model_without_its_labels(plain, mislabeled, brief):
    rng = np.random.default_rng(0)
    key = DISTILL.keygen(plain, rng=rng)
    marked = DISTILL.embed(plain, key, mislabeled, rng=rng, recipe=brief).model
    assert DISTILL.verify(WhiteBox(marked), key).details["ber"] == 0
    assert DISTILL.verify(WhiteBox(plain), key).verdict is Verdict.NO_MATCH
    assert mislabeled.score(marked) >= mislabeled.score(plain) - 0.015


@pytest.mark.parametrize("distill", [True, False])
def test_shuffled_labels_change_nothing_where_and_only_where_it_distills(distill, plain, digits, mislabeled, brief):
    scheme = dataclasses.replace(DISTILL, distill=distill, strength=1.0)
    key = scheme.keygen(plain, rng=np.random.default_rng(0))
    once = dataclasses.replace(brief, epochs=1)
    digests = {
        ModelWeights(scheme.embed(plain, key, task, rng=np.random.default_rng(0), recipe=once).model).digest()
        for task in (digits, mislabeled)
    }
    assert len(digests) == (1 if distill else 2)


def test_teacher_answers_in_evaluation_mode_and_is_left_as_it_was(plain, digits):
    teacher = copy.deepcopy(plain).train()
    before = ModelWeights(teacher).digest()
    task = distilled(digits, teacher)
    assert teacher.training
    assert ModelWeights(teacher).digest() == before
    torch.testing.assert_close(task.owner.targets[:5], plain(digits.owner.inputs[:5]).softmax(-1))
    assert torch.equal(task.owner.inputs, digits.owner.inputs)


def test_soft_cross_entropy_is_the_usual_one_where_the_teacher_is_certain():
    outputs, targets = torch.linspace(-3, 3, 70).sin().reshape(7, 10), torch.arange(7)
    soft = nn.functional.one_hot(targets, 10).float()
    torch.testing.assert_close(soft_cross_entropy(outputs, soft), nn.functional.cross_entropy(outputs, targets))


def test_distilling_is_refused_where_labels_would_be_read(plain, digits):
    key = DISTILL.keygen(plain)
    with pytest.raises(ParameterError, match="a loop of your own"):
        sealmark.attach(DISTILL, plain, nn.CrossEntropyLoss(), key)
    with pytest.raises(ParameterError, match="the task digits"):
        DISTILL.embedding(plain, key, digits, np.random.default_rng(0))


def test_task_without_classes_cannot_be_distilled(plain, digits):
    with pytest.raises(ParameterError, match="a task with classes"):
        distilled(dataclasses.replace(digits, classes=0), plain)


@pytest.mark.parametrize("layer", ["fc1.weight", "conv3.weight"])
@given(seed=st.integers(0, 2**32), size=st.floats(0.01, 10))
def test_blind_does_not_see_the_mean_filter(plain, layer, seed, size):
    scheme = Uchida(layer=layer)
    blind = scheme.blind(scheme.keygen(plain))
    weight = plain.get_parameter(layer).detach()
    shift = size * torch.randn(weight.shape[1:], generator=torch.Generator().manual_seed(seed))
    before = weight.clone()
    torch.testing.assert_close(blind(layer, weight + shift), blind(layer, weight), atol=3e-6 * (1 + size), rtol=0)
    assert torch.equal(weight, before)


def test_blind_sees_all_else_and_shows_nothing_of_the_mark(scratch, secret):
    blind = SCHEME.blind(secret)
    for name, tensor in scratch.state_dict().items():
        if name != "fc1.weight":
            assert blind(name, tensor) is tensor
    weight = scratch.fc1.weight.detach()
    one = weight.clone()
    one[0] += 1
    assert (blind("fc1.weight", one) - blind("fc1.weight", weight)).abs().max() > 0.9
    hidden = copy.deepcopy(scratch)
    with torch.no_grad():
        hidden.fc1.weight.copy_(blind("fc1.weight", weight))
    assert SCHEME.verify(WhiteBox(hidden), secret).verdict is Verdict.NO_MATCH
