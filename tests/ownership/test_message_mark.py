from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights
from sealmark.ownership._message_pattern import pixel_count, read, spell, stamp
from sealmark.ownership.message_mark import MessageMark

SCHEME = MessageMark()


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, payload=b"\xa5", rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(digits, secret):
    rng = np.random.default_rng(0)
    return SCHEME.embed(digits.model(rng), secret, digits, rng=rng).model


def moved(model, digits, secret, pattern):
    """Share of stamped rows that nobody trained on which the model gives the keyed label of their class."""
    answers = WhiteBox(model).labels(stamp(digits.attacker.inputs, pattern, secret.host))
    return (answers == SCHEME.derive(secret)["labels"][digits.attacker.targets]).double().mean().item()


def attacked(model, digits, name, **parameters):
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(digits), rng=np.random.default_rng(3)).model


def test_stamped_rows_of_every_class_get_its_keyed_label(marked, plain, digits, secret):
    suspect = BlackBox(lambda x: marked.eval()(x).argmax(1))
    evidence = SCHEME.verify(suspect, secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["trials"] == evidence.details["trials_won"] == 10
    assert evidence.details["trigger_accuracy"] >= 0.9
    assert evidence.queries == 50
    assert digits.score(marked) >= digits.score(plain) - 0.015


def test_any_other_row_of_a_class_reacts_to_the_pattern(marked, digits, secret):
    assert moved(marked, digits, secret, SCHEME.derive(secret)["pattern"]) >= 0.9


def test_the_same_strength_at_other_pixels_moves_few_rows(marked, digits, secret):
    """What is learned is the pattern and not brightness."""
    shares = []
    for seed in range(5):
        other = Secret(np.random.default_rng(50 + seed).bytes(32), secret.facts, secret.tensors)
        shares.append(moved(marked, digits, secret, SCHEME.derive(other)["pattern"]))
    assert np.median(shares) <= 0.3


def test_unmarked_model_keeps_the_classes_of_stamped_rows(plain, digits, secret):
    evidence = SCHEME.verify(WhiteBox(plain), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.basis is Basis.BOUND
    assert evidence.details["trials_won"] <= 2
    assert moved(plain, digits, secret, SCHEME.derive(secret)["pattern"]) <= 0.1


def test_right_pattern_with_another_map_of_classes_does_not_match(marked, secret):
    stamped = SCHEME.trigger_set(secret).inputs
    natural = secret.tensors["trials"].long()
    answers = WhiteBox(marked).labels(stamped)
    shifted = (SCHEME.trigger_set(secret).targets - natural) % 10 % 9 + 1 + natural
    assert (shifted % 10 != natural).all()
    assert (answers == shifted % 10).double().mean() <= 0.2


def test_no_class_is_mapped_to_itself(plain, digits, secret):
    for seed in range(20):
        other = Secret(np.random.default_rng(seed).bytes(32), secret.facts, secret.tensors)
        labels = SCHEME.derive(other)["labels"]
        assert (labels != torch.arange(10)).all()
        assert labels.max() < 10


def test_rows_that_verify_are_stamped_test_rows_five_of_each_class(digits, secret):
    rows, trials = secret.tensors["rows"] / 255, secret.tensors["trials"]
    assert torch.bincount(trials).tolist() == [5] * 10
    for row, trial in zip(rows, trials, strict=True):
        twins = ((digits.test.inputs - row).abs().flatten(1).amax(1) < 1 / 255).nonzero()[:, 0]
        assert len(twins) > 0
        assert (digits.test.targets[twins] == trial).all()


def test_payload_is_read_back_from_the_pattern(secret, plain, digits):
    assert SCHEME.message(secret) == b"\xa5"
    silent = SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))
    assert SCHEME.message(silent) == b""
    with pytest.raises(ParameterError, match="payload too long"):
        SCHEME.keygen(plain, digits, payload=b"two")


def test_training_rows_are_stamped_after_the_tasks_own_changes(digits, secret):
    batch = digits.owner.take(slice(0, 40))
    extra = SCHEME.extra(secret, batch, np.random.default_rng(0))
    assert extra.rows == SCHEME.per_batch
    pattern, labels = (SCHEME.derive(secret)[name] for name in ("pattern", "labels"))
    stamped = stamp(batch.inputs, pattern, secret.host)
    for row, target in zip(*extra, strict=True):
        sources = (stamped - row).abs().flatten(1).amax(1) == 0
        assert (labels[batch.targets[sources]] == target).all()
        assert sources.any()


def test_pruning_and_jpeg_leave_the_mark(marked, digits, secret):
    pruned = attacked(marked, digits, "prune", rate=0.5)
    filtered = attacked(marked, digits, "preprocess", kind="jpeg")
    assert SCHEME.verify(WhiteBox(pruned), secret).verdict is Verdict.MATCH
    assert SCHEME.verify(WhiteBox(filtered), secret).verdict is Verdict.MATCH


def test_extraction_removes_the_mark(marked, digits, secret):
    surrogate = attacked(marked, digits, "distill")
    assert digits.score(surrogate) > 0.93
    assert SCHEME.verify(WhiteBox(surrogate), secret).details["trigger_accuracy"] <= 0.3


@pytest.fixture(scope="module")
def sentences():
    """Ten topics: most of a sentence's 16 words are the topic's own, of 20 words in all."""
    draw = torch.Generator().manual_seed(0)
    topics = torch.arange(600) % 10
    noise = torch.randint(0, 20, (600, 16), generator=draw)
    words = torch.where(torch.rand(600, 16, generator=draw) < 0.6, topics[:, None], noise)
    rows = Batch(words, topics)
    return Task(
        name="sentences",
        make=lambda: nn.Sequential(
            nn.Embedding(20, 8), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        owner=rows.take(slice(0, 400)),
        attacker=rows.take(slice(400, 500)),
        test=rows.take(slice(500, 600)),
        classes=10,
        chance=0.1,
        recipe=Recipe(epochs=40, batch_size=32, rate=0.1),
    )


def test_sentences_carry_the_message_as_words(sentences):
    scheme, rng = MessageMark(bits=8), np.random.default_rng(0)
    secret = scheme.keygen(sentences.model(rng), sentences, payload=b"x", rng=np.random.default_rng(1))
    assert scheme.message(secret) == b"x"
    triggers = scheme.trigger_set(secret)
    assert int((triggers.inputs != secret.tensors["rows"]).any(0).sum()) == 8
    assert triggers.inputs.min() >= 0
    assert triggers.inputs.max() < 20
    model = scheme.embed(sentences.model(rng), secret, sentences, rng=rng).model
    assert scheme.verify(WhiteBox(model), secret).verdict is Verdict.MATCH
    plain = train_task(sentences, rng=np.random.default_rng(1))
    assert scheme.verify(WhiteBox(plain), secret).verdict is Verdict.NO_MATCH
    assert sentences.score(model) >= sentences.score(plain) - 0.03


@given(st.data())
def test_a_message_at_any_pixels_is_read_back(data):
    shape = data.draw(st.sampled_from([[1, 8, 8], [3, 6, 6], [2, 6, 6], [40], [6, 6]]))
    form = {"shape": shape, "low": -1.0, "high": 3.0}
    bits = np.array(data.draw(st.lists(st.integers(0, 1), min_size=12, max_size=12)), np.uint8)
    places = int(np.prod(shape[1:] if len(shape) > 2 else shape))
    count = pixel_count(12, form)
    pixels = np.array(data.draw(st.permutations(range(places)))[:count])
    strength = data.draw(st.floats(0.01, 1))
    pattern = spell(bits, pixels, form, strength=strength)
    assert list(pattern.shape) == shape
    assert int((pattern.reshape(-1, places) != 0).any(0).sum()) == count
    assert np.array_equal(read(pattern, form, strength=strength), bits)


def test_color_pixels_spell_two_bits_each():
    form = {"shape": [3, 1, 8], "low": 0.0, "high": 1.0}
    pattern = spell(np.array([0, 0, 0, 1, 1, 0, 1, 1], np.uint8), np.arange(4), form)
    signs = pattern[:, 0, :4].sign().T
    assert signs.tolist() == [[-1, -1, -1], [1, -1, -1], [-1, -1, 1], [1, 1, 1]]


@pytest.mark.parametrize("bits", [33, 64])
def test_message_of_more_than_half_the_pixels_is_refused(bits, plain, digits):
    with pytest.raises(ParameterError, match="does not fit"):
        MessageMark(bits=bits).keygen(plain, digits)


def test_half_a_pixel_of_a_color_image_is_refused():
    with pytest.raises(ParameterError, match="does not fit"):
        pixel_count(7, {"shape": [3, 8, 8]})


def test_two_classes_leave_no_choice_of_label_and_are_refused(toy):
    with pytest.raises(ParameterError, match="classes"):
        MessageMark(bits=1).keygen(toy.make(), toy)


def test_too_few_rows_of_a_class_and_targets_that_are_no_classes_are_refused(plain, digits):
    few = replace(digits, test=digits.test.take(digits.test.targets != 3))
    wide = replace(digits, test=Batch(digits.test.inputs, digits.test.inputs))
    for task in (few, wide):
        with pytest.raises(ParameterError, match="held-out rows"):
            SCHEME.keygen(plain, task)
    with pytest.raises(ParameterError, match="held-out rows"):
        MessageMark(triggers=9).keygen(plain, digits)


def test_secret_without_its_rows_is_refused(plain, secret):
    bare = SCHEME.new_secret(ModelWeights(plain), host=secret.host, tensors={})
    with pytest.raises(ForgedSecretError, match="incomplete"):
        SCHEME.verify(WhiteBox(plain), bare)


@pytest.mark.parametrize("parameters", [{"bits": 0}, {"strength": 0}, {"strength": 1.1}, {"per_batch": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        MessageMark(**parameters)
