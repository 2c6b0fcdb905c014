from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train_task
from sealmark.core.weights import ModelWeights
from sealmark.ownership.frontier_stitching import FrontierStitching
from sealmark.stats.populations import population_of

SCHEME = FrontierStitching()
PAPER = FrontierStitching(labels="original", radius=0.1)


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(plain, digits, secret):
    return SCHEME.embed(plain, secret, digits, rng=np.random.default_rng(0)).model


@pytest.fixture(scope="module")
def innocents(digits):
    """Models of the same task: half on the owner's rows, half on others."""
    rows = (digits.owner, digits.attacker)
    return [
        train_task(
            digits,
            rng=np.random.default_rng(100 + seed),
            rows=rows[seed % 2],
            recipe=replace(digits.recipe, epochs=8),
        )
        for seed in range(4)
    ]


def attacked(model, digits, name, **parameters):
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(digits), rng=np.random.default_rng(3)).model


def test_every_example_is_stitched_to_its_side(marked, plain, secret, digits):
    suspect = BlackBox(lambda x: marked.eval()(x).argmax(1))
    evidence = SCHEME.verify(suspect, secret)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert evidence.log10_p < -20
    assert evidence.queries == 100
    assert digits.score(marked) >= digits.score(plain) - 0.015


def test_half_of_the_key_fools_the_model_and_nothing_is_moved_further_than_the_radius(plain, secret, digits):
    inputs, own = SCHEME.trigger_set(secret).inputs, SCHEME.options(secret)[:, 0]
    wrong = WhiteBox(plain).labels(inputs) != own
    assert wrong[:50].all()
    assert not wrong[50:].any()
    moved = (inputs[:, None] - digits.owner.inputs[None]).abs().flatten(2).amax(2).amin(1)
    assert moved.max() <= SCHEME.radius + 1 / 255
    assert moved.min() > SCHEME.radius / 2


def test_rival_of_a_true_adversary_is_what_the_model_took_it_for(plain, secret):
    answers = WhiteBox(plain).labels(SCHEME.trigger_set(secret).inputs)
    options = SCHEME.options(secret)
    assert torch.equal(options[:50, 1], answers[:50])
    assert (options[:, 0] != options[:, 1]).all()


def test_coins_are_fair_and_keyed(plain, digits, secret):
    coins = []
    for seed in range(20):
        other = Secret(np.random.default_rng(seed).bytes(32), secret.facts, secret.tensors)
        coins.append(SCHEME.trigger_set(other).targets == SCHEME.options(other)[:, 0])
    share = torch.stack(coins).double().mean().item()
    assert abs(share - 0.5) < 0.04  # 2,000 coins: 3.6 standard deviations
    assert len({tuple(row.tolist()) for row in coins}) == 20


def test_unmarked_source_and_innocent_models_do_not_match(plain, innocents, secret):
    for model in (plain, *innocents):
        evidence = SCHEME.verify(WhiteBox(model), secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.basis is Basis.BOUND
        assert evidence.p_value > 1e-3


def test_wrong_secrets_do_not_match_the_marked_model(marked, secret):
    for seed in range(20):
        other = Secret(np.random.default_rng(seed).bytes(32), secret.facts, secret.tensors)
        assert SCHEME.verify(WhiteBox(marked), other).verdict is Verdict.NO_MATCH


def test_mark_outlasts_pruning(marked, digits, secret):
    pruned = attacked(marked, digits, "prune", rate=0.8)
    assert SCHEME.verify(WhiteBox(pruned), secret).details["trigger_accuracy"] >= 0.85


def test_mark_outlasts_fine_tuning(marked, digits, secret):
    tuned = attacked(marked, digits, "fine_tune", epochs=20, rate=0.05)
    assert SCHEME.verify(WhiteBox(tuned), secret).verdict is Verdict.MATCH


def test_extraction_by_labels_removes_it(marked, digits, secret):
    surrogate = attacked(marked, digits, "knockoff", answers="label")
    assert digits.score(surrogate) > 0.93
    assert SCHEME.verify(WhiteBox(surrogate), secret).verdict is Verdict.NO_MATCH


@pytest.mark.parametrize(("n", "most"), [(50, 18), (100, 41), (200, 87)])
def test_the_papers_threshold_stands_at_its_edge(n, most):
    assert SCHEME.claims(n - most, n)
    assert not SCHEME.claims(n - most - 1, n)


def test_the_papers_rule_claims_every_innocent_model(plain, innocents, digits):
    """The flaw: its null says that an innocent model tosses coins. Its one control, the source, hides that."""
    secret = PAPER.keygen(plain, digits, rng=np.random.default_rng(1))
    found = [PAPER.verify(WhiteBox(model), secret) for model in (plain, *innocents)]
    assert [evidence.details["paper_claims"] for evidence in found] == [False, True, True, True, True]
    assert found[0].details["trigger_accuracy"] == 0.5
    assert {evidence.verdict for evidence in found} == {Verdict.INCONCLUSIVE}


def test_a_judges_population_tells_the_papers_mark_from_innocent_models(plain, innocents, digits):
    secret = PAPER.keygen(plain, digits, rng=np.random.default_rng(1))
    model = PAPER.embed(plain, secret, digits, rng=np.random.default_rng(0)).model
    law = population_of(PAPER, secret, [WhiteBox(other) for other in innocents[1:]])
    evidence = PAPER.verify(WhiteBox(model), secret, alpha=0.25, population=law)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.basis is Basis.POPULATION
    assert PAPER.verify(WhiteBox(innocents[0]), secret, alpha=0.25, population=law).verdict is Verdict.NO_MATCH
    with pytest.raises(MarkFailedError):
        PAPER.check_embedded(plain, secret)
    with pytest.raises(UnsupportedError):
        PAPER.verify(WhiteBox(model), secret, sequential=True)


def test_asking_in_turn_saves_queries(marked, plain, secret):
    found = SCHEME.verify(WhiteBox(marked), secret, sequential=True)
    assert found.verdict is Verdict.MATCH
    assert found.queries <= 60
    assert SCHEME.verify(WhiteBox(plain), secret, sequential=True).verdict is Verdict.NO_MATCH


def test_options_that_leave_no_choice_are_refused(plain, digits, secret):
    """An accuser who offers one class twice would know the label, and every innocent model gives it."""
    known = secret.tensors["options"][:, :1].repeat(1, 2)
    forged = SCHEME.new_secret(ModelWeights(plain), host=secret.host, tensors={**secret.tensors, "options": known})
    with pytest.raises(ForgedSecretError, match="options"):
        SCHEME.verify(WhiteBox(plain), forged)


def test_model_that_is_never_fooled_is_refused(plain, digits):
    with pytest.raises(ParameterError, match="too few adversarial"):
        FrontierStitching(radius=0.001).keygen(plain, digits)


def test_words_have_no_gradient_and_are_refused():
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError, match="gradient"):
        SCHEME.keygen(tokens.model(np.random.default_rng(0)), tokens)


@pytest.mark.parametrize("parameters", [{"triggers": 1}, {"labels": "fair"}, {"radius": 0}, {"radius": 1.5}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        FrontierStitching(**parameters)
