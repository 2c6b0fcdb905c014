from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.blackbox.inputs import form_of
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.training import train_task
from sealmark.ownership._message_pattern import spell, stamp
from sealmark.ownership.evolutionary_triggers import Candidate, EvolutionaryTriggers, Search

SCHEME = EvolutionaryTriggers()


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(plain, digits, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def innocents(digits):
    """None of them is the model that the search asked."""
    return [train_task(digits, rng=np.random.default_rng(100 + seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def search(plain, digits, secret):
    rows = digits.owner.take(slice(0, 128))
    return Search(plain, rows, secret.tensors["message"].numpy(), form_of(digits, "test"))


def leaving(models, digits, pattern, form):
    """Share of stamped test rows to which the models do not give their own class."""
    inputs = stamp(digits.test.inputs, pattern, form)
    return np.mean([(WhiteBox(m).labels(inputs) != digits.test.targets).double().mean().item() for m in models])


def test_stamped_rows_of_every_class_get_its_keyed_label(marked, plain, digits, secret):
    evidence = SCHEME.verify(WhiteBox(marked), secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["trials_won"] == 10
    assert evidence.details["trigger_accuracy"] >= 0.9
    assert digits.score(marked) >= digits.score(plain) - 0.015


def test_unmarked_models_do_not_react(plain, innocents, secret):
    for model in (plain, *innocents):
        evidence = SCHEME.verify(WhiteBox(model), secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= 0.1


def test_independent_models_overlook_an_evolved_pattern_rather_than_a_random_one(innocents, digits, secret):
    """At the same strength and for the same message; judged by models that the search never asked."""
    form, strength = secret.host, float(secret.tensors["strength"])
    evolved = leaving(innocents, digits, SCHEME.derive(secret)["pattern"], form)
    rng, bits = np.random.default_rng(2), secret.tensors["message"].numpy()
    random = [
        leaving(innocents, digits, spell(bits, rng.permutation(64)[:12], form, strength=strength), form)
        for _ in range(10)
    ]
    assert evolved <= np.median(random)
    assert evolved <= 0.15


def test_fitness_rewards_the_original_labels_and_never_those_that_are_taught(search):
    """A pattern that fools the model is unfit; the public re-implementation has it the other way round."""
    harmless = Candidate(np.arange(12), 0.05)
    blinding = max((search.random(np.random.default_rng(i)) for i in range(8)), key=lambda c: c.strength)
    fooled = search.accuracy(spell(search.message, blinding.pixels, search.form, strength=blinding.strength))
    kept = search.accuracy(spell(search.message, harmless.pixels, search.form, strength=harmless.strength))
    assert kept > fooled
    for candidate, share in ((harmless, kept), (blinding, fooled)):
        assert search.fitness(candidate) == pytest.approx(0.9 * share + 0.1 * candidate.strength)


def test_evolution_never_loses_its_fittest(search):
    fitness = [search.fitness(search.evolve(6, n, np.random.default_rng(3))) for n in (0, 2, 6)]
    assert fitness == sorted(fitness)
    assert fitness[2] > fitness[0]


def test_children_keep_distinct_pixels_in_the_image_and_half_of_a(search):
    rng = np.random.default_rng(4)
    for _ in range(50):
        a, b, c = (search.random(rng) for _ in range(3))
        child = search.child(a, b, c, rng)
        assert len(np.unique(child.pixels)) == 12
        assert child.pixels.min() >= 0
        assert child.pixels.max() < 64
        assert len(np.intersect1d(child.pixels, a.pixels)) >= 6
        assert 0.05 <= child.strength <= 1


def test_child_of_one_candidate_with_itself_is_that_candidate(search):
    a = search.random(np.random.default_rng(5))
    child = search.child(a, a, a, np.random.default_rng(6))
    assert np.array_equal(child.pixels, a.pixels)
    assert child.strength == a.strength


def test_child_moves_pixels_by_half_the_difference_rounded_up(search):
    """b lies two rows above a, c one row below: half the difference is -1.5 rows, and ceil makes it -1."""
    wide = Search(search.model, search.rows, search.message[:4], {"shape": [1, 32, 32], "low": 0.0, "high": 1.0})
    corners = np.array([8 * 32 + 8, 8 * 32 + 24, 24 * 32 + 8, 24 * 32 + 24])
    a, b, c = (Candidate(corners + 32 * down, strength) for down, strength in ((0, 0.5), (-2, 0.6), (1, 0.4)))
    child = wide.child(a, b, c, np.random.default_rng(7))
    came = np.setdiff1d(child.pixels, a.pixels)
    assert len(came) == 2
    assert np.isin(came + 32, corners).all()
    assert child.strength == pytest.approx(0.6)


def test_message_is_read_back_from_the_pattern(plain, digits, secret):
    assert np.array_equal(SCHEME.message(secret), secret.tensors["message"].numpy())
    mine = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0], dtype=torch.uint8)
    quick = EvolutionaryTriggers(generations=0, population=4, draws=32)
    chosen = quick.keygen(plain, digits, chosen={"message": mine}, rng=np.random.default_rng(1))
    assert quick.message(chosen).tolist() == mine.tolist()


def test_labels_are_drawn_after_the_pattern(secret):
    """Another seed on the same evolved pattern has other labels; another strength has other labels too."""
    other = Secret(bytes(32), secret.facts, secret.tensors)
    assert torch.equal(SCHEME.derive(other)["pattern"], SCHEME.derive(secret)["pattern"])
    assert not torch.equal(SCHEME.derive(other)["labels"], SCHEME.derive(secret)["labels"])
    facts = secret.facts | {"tensors": secret.facts["tensors"] | {"strength": "0" * 64}}
    changed = Secret(secret.reveal_seed(), facts, secret.tensors)
    assert not torch.equal(SCHEME.derive(changed)["labels"], SCHEME.derive(secret)["labels"])


def test_pruning_leaves_the_mark_and_extraction_removes_it(marked, digits, secret):
    resources, rng = Resources.of(digits), np.random.default_rng(3)
    pruned = registry.modification("prune", rate=0.5).run(marked, resources, rng=rng).model
    surrogate = registry.modification("distill").run(marked, resources, rng=rng).model
    assert SCHEME.verify(WhiteBox(pruned), secret).verdict is Verdict.MATCH
    assert digits.score(surrogate) > 0.93
    assert SCHEME.verify(WhiteBox(surrogate), secret).details["trigger_accuracy"] <= 0.3


@pytest.mark.parametrize(
    "message",
    [torch.ones(11, dtype=torch.uint8), torch.ones(12), torch.full((12,), 2, dtype=torch.uint8)],
    ids=["too short", "not bytes", "no bits"],
)
def test_unfit_messages_are_refused(message, plain, digits):
    with pytest.raises(ParameterError, match="message"):
        SCHEME.keygen(plain, digits, chosen={"message": message})


def test_untrained_model_is_refused(digits):
    with pytest.raises(ParameterError, match="trained model"):
        SCHEME.keygen(digits.model(np.random.default_rng(0)), digits)


def test_words_have_no_strength_and_are_refused():
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError):
        SCHEME.keygen(tokens.model(np.random.default_rng(0)), tokens)


@pytest.mark.parametrize("parameters", [{"population": 3}, {"generations": -1}, {"draws": 0}, {"bits": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        EvolutionaryTriggers(**parameters)
