from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.ambiguity.false_claim import FalseClaim
from sealmark.blackbox.crafting import logits_of
from sealmark.blackbox.points import sources
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.ownership.ipguard import Ipguard, _beyond, _loss
from sealmark.stats.populations import population_of

SCHEME = Ipguard()


@pytest.fixture(scope="module")
def secret(plain, digits, references):
    return SCHEME.enroll(plain, digits, references=references, rng=np.random.default_rng(1))


def attacked(model, task, name, **parameters):
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(task), rng=np.random.default_rng(3)).model


def verify(model, secret, **how):
    return SCHEME.verify(WhiteBox(model), secret, alpha=0.05, **how)


def rate(model, secret, **how):
    return verify(model, secret, **how).details["match_rate"]


def test_derived_models_answer_the_points_and_are_accused(descendants, secret):
    for name, model in descendants.items():
        evidence = verify(model, secret)
        assert evidence.verdict is Verdict.MATCH, name
        assert evidence.details["match_rate"] >= 0.8, name
        assert evidence.details["paper_claims"], name


def test_labels_alone_are_asked_once_a_point(plain, secret):
    closed = BlackBox(lambda x: plain(x).argmax(1))
    evidence = SCHEME.verify(closed, secret, alpha=0.05)
    assert evidence.details["match_rate"] == 1
    assert evidence.queries == closed.queries == evidence.details["points"] == 100


def test_every_independent_model_answers_fewer_points_than_every_derived_one(descendants, independents, secret):
    least = min(rate(model, secret) for model in descendants.values())
    most = max(rate(model, secret) for model in independents)
    assert most <= 0.5
    assert least - most >= 0.3


def test_independent_models_are_not_accused(independents, secret):
    found = [verify(model, secret) for model in independents]
    assert not any(evidence.details["paper_claims"] for evidence in found)
    assert sum(evidence.verdict is Verdict.MATCH for evidence in found) <= 1  # 1 in 21 is what the rank promises


@pytest.mark.parametrize("how", [("distill", {}), ("knockoff", {"answers": "label"})], ids=lambda how: how[0])
def test_extracted_models_are_no_nearer_than_independent_ones(how, plain, digits, secret):
    name, parameters = how
    evidence = verify(attacked(plain, digits, name, **parameters), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert not evidence.details["paper_claims"]


def test_points_of_another_owner_do_not_accuse_the_model(plain, independents, references, digits):
    other = SCHEME.enroll(independents[0], digits, references=references, rng=np.random.default_rng(2))
    assert verify(plain, other).verdict is Verdict.NO_MATCH
    assert rate(plain, other) <= 0.5 < rate(independents[0], other)


def test_margin_trades_robustness_for_uniqueness(plain, digits, references, descendants, independents):
    def rates(margin):
        scheme = Ipguard(margin=margin, points=50)
        secret = scheme.enroll(plain, digits, references=references[:2], rng=np.random.default_rng(1))
        models = (descendants["fine-tuned hard"], *independents)
        tuned, *others = (scheme.score(WhiteBox(m), secret).details["match_rate"] for m in models)
        return tuned, max(others)

    at_boundary, far_beyond = rates(0.0), rates(0.7)
    assert at_boundary[0] < 0.6  # fine-tuning moves the boundary past them
    assert far_beyond[0] > 0.9
    assert at_boundary[1] < 0.2 < 0.5 < far_beyond[1]  # every model agrees


def test_points_reach_the_margin_without_leaving_the_range(plain, digits):
    rows = sources(digits, plain, 40, np.random.default_rng(0))
    targets = (rows.targets + 3) % 10
    found, done = _beyond(plain, rows, targets, 2.0, 300, 0.005, (0.0, 1.0))
    assert done.all()
    assert found.min() >= 0
    assert found.max() <= 1
    logits = logits_of(plain, found)
    lead = logits.gather(1, targets[:, None]) - logits.gather(1, rows.targets[:, None])
    assert (lead >= 2).all()
    assert lead.median() < 3  # and stop there
    pair = logits.topk(2, 1).indices.sort(1).values
    assert torch.equal(pair, torch.stack([rows.targets, targets], 1).sort(1).values)  # no third class between


def test_points_without_time_to_reach_the_margin_are_not_kept(plain, digits):
    rows = sources(digits, plain, 10, np.random.default_rng(0))
    _, done = _beyond(plain, rows, (rows.targets + 1) % 10, 2.0, 1, 0.005, (0.0, 1.0))
    assert not done.any()
    with pytest.raises(MarkFailedError, match="too few points"):
        Ipguard(steps=1).enroll(plain, digits, references=[plain, plain], rng=np.random.default_rng(0))


def test_loss_is_the_papers():
    logits = torch.tensor([[1.0, 4.0, 0.0], [1.0, 2.0, 3.0]])
    first, second = torch.tensor([0, 0]), torch.tensor([1, 1])
    assert _loss(logits, first, second, 2.0).tolist() == [0.0, 1.0 + 2.0]
    two = logits[:, :2]
    assert _loss(two, first, second, 4.0).tolist() == [1.0, 3.0]  # two classes have no third between


def test_targets_follow_from_the_seed_and_are_never_the_rows_class(plain, digits, references):
    few = Ipguard(points=30)
    one, same, other = (
        few.enroll(plain, digits, references=references[:2], rng=np.random.default_rng(seed)) for seed in (4, 4, 5)
    )
    assert one == same
    assert not torch.equal(one.tensors["labels"], other.tensors["labels"])
    assert torch.bincount(one.tensors["labels"], minlength=10).max() <= 9  # no class is favored


def test_false_claim_wins_by_the_papers_rule_and_loses_before_a_judges_models(
    plain, independents, references, digits
):
    attack = FalseClaim(candidates=10)
    forged = attack.run(plain, SCHEME, Resources.of(digits), rng=np.random.default_rng(0)).secret
    judges = population_of(SCHEME, forged, [WhiteBox(model) for model in references])
    for innocent in independents[:3]:
        naive = verify(innocent, forged)
        assert naive.details["match_rate"] >= 0.9
        assert naive.details["paper_claims"]
        assert naive.verdict is Verdict.MATCH  # a law of the accuser's own is none
        assert verify(innocent, forged, population=judges).verdict is Verdict.NO_MATCH


def test_judges_models_still_accuse_a_thief(descendants, secret, references):
    judges = population_of(SCHEME, secret, [WhiteBox(model) for model in references])
    assert verify(descendants["fine-tuned"], secret, population=judges).verdict is Verdict.MATCH


def test_references_and_a_live_model_are_needed(plain, digits, references):
    with pytest.raises(ParameterError, match="unrelated models"):
        SCHEME.enroll(plain, digits, references=references[:1])
    with pytest.raises(ParameterError, match="classification task"):
        SCHEME.enroll(plain, None, references=references[:2])


def test_words_have_no_gradient_to_follow(toy):
    whole = Batch((toy.test.inputs * 10).long(), toy.test.targets)
    task = replace(toy, owner=whole, test=whole)
    model = nn.Sequential(_Halved(), toy.model(np.random.default_rng(0)))
    with pytest.raises(UnsupportedError, match="gradient"):
        SCHEME.enroll(model, task, references=[model, model], rng=np.random.default_rng(0))


class _Halved(nn.Module):
    def forward(self, inputs):
        return inputs / 2


@pytest.mark.parametrize("parameters", [{"points": 1}, {"margin": -0.1}, {"steps": 0}, {"step": 0.0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Ipguard(**parameters)
