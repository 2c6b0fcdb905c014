import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from sealmark.attacks.evasion.query_modification import Autoencoder, QueryModification, Sanitized, _divergence
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.suspect import WhiteBox
from sealmark.core.task import Batch
from sealmark.core.training import train
from sealmark.core.weights import ModelWeights


@pytest.fixture(scope="module")
def served(digits, marked):
    return QueryModification().run(marked.model, Resources.of(digits), rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def ordinary(digits, mark):
    """A model whose keys are ordinary rows with labels at random, and the keys."""
    rng = np.random.default_rng(7)
    rows = digits.owner.inputs[torch.from_numpy(rng.permutation(900)[:30])]
    keys = Batch(rows, torch.from_numpy(rng.integers(10, size=30)))
    model = digits.model(rng)
    train(
        model, digits.owner, loss=digits.loss, recipe=digits.recipe, rng=rng,
        extras=[lambda batch, rng: keys.take(torch.from_numpy(rng.permutation(30)[:16]))],
    )  # fmt: skip
    return model.eval(), keys


def test_triggers_are_flagged_and_ordinary_queries_are_not(digits, marked, served):
    assert served.model.flagged(marked.triggers.inputs).float().mean() >= 0.85
    assert served.model.flagged(digits.test.inputs).float().mean() <= 0.2


def test_the_mark_fades_and_the_service_stays_good(digits, marked, served):
    assert marked.known(marked.model) == 1
    assert marked.known(served.model) <= 0.3
    assert digits.score(served.model) >= digits.score(marked.model) - 0.04


def test_on_a_model_without_a_mark_the_same_images_are_answered_by_chance_before_and_after(digits, plain, marked):
    served = QueryModification().run(plain, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert marked.known(plain) < 0.4
    assert marked.known(served) < 0.4


def test_keys_that_are_ordinary_rows_are_flagged_less_than_abstract_ones(digits, marked, served, ordinary):
    model, keys = ordinary
    assert digits.score(model, keys) > 0.9
    other = QueryModification().run(model, Resources.of(digits), rng=np.random.default_rng(0)).model
    abstract = served.model.flagged(marked.triggers.inputs).float().mean()
    assert other.flagged(keys.inputs).float().mean() < abstract
    assert digits.score(other, keys) > marked.known(served.model)


def test_fewer_false_alarms_flag_less(digits, marked):
    strict, lax = (
        QueryModification(false_alarms=share).run(marked.model, Resources.of(digits), rng=np.random.default_rng(0))
        for share in (0.01, 0.3)
    )
    assert strict.model.tau > lax.model.tau
    assert strict.model.flagged(digits.test.inputs).sum() < lax.model.flagged(digits.test.inputs).sum()


def test_a_flagged_query_is_answered_as_its_reconstruction_and_no_other(digits, marked, served):
    model = served.model
    asked = torch.cat([marked.triggers.inputs, digits.test.inputs])
    flagged = model.flagged(asked)
    with torch.no_grad():
        answers, plain, redrawn = model(asked), marked.model(asked), marked.model(model.redraw(asked))
    assert torch.equal(answers[flagged], redrawn[flagged])
    assert torch.equal(answers[~flagged], plain[~flagged])
    assert 0 < flagged.sum() < len(asked)


def test_the_stolen_weights_are_served_as_they_are(marked, served):
    assert ModelWeights(served.model.model).digest() == ModelWeights(marked.model).digest()
    assert not served.model.training


def test_the_divergence_is_jensen_and_shannons():
    one, other = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0)) * 5
    expected = jensenshannon(one.double().softmax(-1), other.double().softmax(-1), axis=1) ** 2
    assert np.allclose(_divergence(one, other), expected)
    assert torch.allclose(_divergence(one, one), torch.zeros(6, dtype=torch.float64), atol=1e-12)


def test_answers_that_exclude_each_other_are_ln_2_apart():
    sure = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert _divergence(sure, sure.flip(0)).tolist() == pytest.approx([np.log(2)] * 2)


def test_the_autoencoder_redraws_what_it_learned_and_stays_in_range(digits, served):
    inputs = digits.test.inputs
    with torch.no_grad():
        drawn = served.model.redraw(inputs)
    assert drawn.shape == inputs.shape
    assert (drawn - inputs).square().mean() < (inputs - inputs.mean(0)).square().mean() / 3
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    wide = Autoencoder(inputs * 6 - 3, 4)(inputs * 6 - 3)
    assert wide.min() >= -3
    assert wide.max() <= 3
    assert wide.max() > 0 > wide.min() or wide.std() < 1


def test_the_cost_counts_the_rows_that_the_autoencoder_learned(served):
    cost = served.cost
    assert (cost.rows, cost.rows_seen, cost.queries) == (400, 200 * 300, 0)


def test_the_same_seed_gives_the_same_service(digits, marked, same):
    few, attack = Resources.of(digits, 0.2), QueryModification(epochs=2)
    one, again, other = (attack.run(marked.model, few, rng=np.random.default_rng(seed)).model for seed in (0, 0, 1))
    assert same(one, again)
    assert one.tau == again.tau
    assert not same(one, other)


def test_vectors_will_do(toy, rng):
    model = toy.model(rng)
    served = QueryModification(code=4, epochs=5).run(model, Resources.of(toy), rng=rng).model
    assert isinstance(served, Sanitized)
    assert WhiteBox(served).logits(toy.test.inputs).shape == (64, 2)


def test_scratch_learns_from_the_same_rows_alone(digits):
    few = Resources.of(digits, 0.25)
    assert 0.8 < digits.score(QueryModification().scratch(few, np.random.default_rng(0))) < 0.97


def test_words_are_refused():
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError, match="real numbers"):
        QueryModification().run(
            tokens.model(np.random.default_rng(0)), Resources.of(tokens), rng=np.random.default_rng(0)
        )


def test_too_few_rows_are_refused(digits, plain):
    few = Resources(digits, digits.attacker.take(slice(0, 7)))
    with pytest.raises(ParameterError, match="too few rows"):
        QueryModification().run(plain, few, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "parameters",
    [{"false_alarms": 0}, {"false_alarms": 1}, {"false_alarms": float("nan")}, {"code": 0}, {"epochs": 0}],
)
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of query_modification"):
        dataclasses.replace(QueryModification(), **parameters)
