from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.ambiguity.false_claim import FalseClaim
from sealmark.blackbox.crafting import logits_of
from sealmark.blackbox.inputs import form_of
from sealmark.blackbox.points import sources
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.core.weights import weights_of
from sealmark.ownership.afa import Afa, Ghost, _layers, _targets
from sealmark.stats.populations import population_of

SCHEME = Afa()


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
        assert evidence.details["match_rate"] >= 0.85, name
        assert evidence.details["paper_claims"], name


def test_labels_alone_are_asked_once_a_point(plain, secret):
    closed = BlackBox(lambda x: plain(x).argmax(1))
    evidence = SCHEME.verify(closed, secret, alpha=0.05)
    assert evidence.details["match_rate"] == 1
    assert evidence.queries == closed.queries == evidence.details["points"] == 50


def test_every_independent_model_answers_fewer_points_than_every_derived_one(descendants, independents, secret):
    least = min(rate(model, secret) for model in descendants.values())
    most = max(rate(model, secret) for model in independents)
    assert least - most >= 0.15


def test_independent_models_are_not_accused(independents, secret):
    found = [verify(model, secret) for model in independents]
    assert not any(evidence.details["paper_claims"] for evidence in found)
    assert sum(evidence.verdict is Verdict.MATCH for evidence in found) <= 1  # 1 in 21 is what the rank promises


@pytest.mark.parametrize("how", [("distill", {}), ("knockoff", {"answers": "label"})], ids=lambda how: how[0])
def test_extracted_models_stay_with_the_independent_ones(how, plain, digits, descendants, independents, secret):
    name, parameters = how
    evidence = verify(attacked(plain, digits, name, **parameters), secret)
    found = evidence.details["match_rate"]
    assert not evidence.details["paper_claims"]
    nearest, farthest = (
        max(rate(m, secret) for m in independents),
        min(rate(m, secret) for m in descendants.values()),
    )
    assert abs(found - nearest) < abs(farthest - found)


def test_points_of_another_owner_do_not_accuse_the_model(plain, independents, references, digits):
    other = SCHEME.enroll(independents[0], digits, references=references, rng=np.random.default_rng(2))
    assert verify(plain, other).verdict is Verdict.NO_MATCH
    assert rate(plain, other) <= 0.75 < rate(independents[0], other)


def crafted(scheme, model, task, seed=0):
    """The marks, and of all candidates the row, the imitated row and its class."""
    secret = scheme.new_secret(weights_of(model), host=form_of(task, "afa"), rng=np.random.default_rng(5))
    rows = sources(task, model, task.test.rows, np.random.default_rng(seed))
    imitated, targets = _targets(rows, 2 * scheme.points, 10, secret)
    marks = scheme.craft(model, task, secret, (), np.random.default_rng(seed))
    return marks, Batch(rows.inputs[: len(targets)], targets), imitated, rows.targets[: len(targets)]


def test_marks_imitate_the_logits_of_a_row_of_another_class(plain, digits):
    everything = Afa(points=20, agreement=0.0)
    marks, candidates, imitated, classes = crafted(everything, plain, digits)
    assert (candidates.targets != classes).all()
    assert torch.equal(logits_of(plain, imitated).argmax(1), candidates.targets)
    nearest = torch.cdist(marks.inputs.flatten(1), candidates.inputs.flatten(1), p=torch.inf)
    place = nearest.argmin(1)
    assert nearest.amin(1).max() <= 0.25 + 1e-6
    assert torch.equal(marks.targets, candidates.targets[place])
    wanted = logits_of(plain, imitated)[place]
    after = (logits_of(plain, marks.inputs) - wanted).norm(dim=1)
    before = (logits_of(plain, candidates.inputs)[place] - wanted).norm(dim=1)
    assert (after / before).median() < 0.4  # the target's label alone would leave 0.6


def test_more_than_half_of_the_candidates_become_marks_and_a_small_radius_makes_few(plain, digits):
    assert crafted(Afa(), plain, digits)[0].rows >= 50
    assert crafted(Afa(radius=0.1), plain, digits)[0].rows <= 10


def test_marks_outlast_fresh_ghosts_and_others_do_not(plain, digits):
    kept = crafted(Afa(points=40), plain, digits)[0]
    every = crafted(Afa(points=40, agreement=0.0), plain, digits)[0]
    ghost = Ghost(plain, 0.03, kept.inputs[:1], np.random.default_rng(77))

    def least(marks):
        return torch.stack([logits_of(ghost, marks.inputs).argmax(1) == marks.targets for _ in range(50)]).double()

    assert kept.rows < every.rows
    assert least(kept).mean(0).min() > 0.7 > least(every).mean(0).min()


def test_ghosts_differ_at_each_call_and_for_each_row_and_leave_the_model_as_it_is(plain, digits):
    rows = digits.test.inputs[:1].expand(3, -1, -1, -1)
    ghost = Ghost(plain, 0.1, rows[:1], np.random.default_rng(0))
    first, second = logits_of(ghost, rows), logits_of(ghost, rows)
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 6
    again = Ghost(plain, 0.1, rows[:1], np.random.default_rng(0))
    assert torch.equal(logits_of(again, rows), first)
    assert len(torch.unique(logits_of(plain, rows), dim=0)) == 1
    assert not any(module._forward_hooks for module in plain.modules())
    assert torch.equal(
        logits_of(Ghost(plain, 0.0, rows[:1], np.random.default_rng(0)), rows), logits_of(plain, rows)
    )


def test_ghosts_erode_every_layer_but_the_last_and_keep_running_statistics(plain, digits):
    names = {module: name for name, module in plain.named_modules()}
    eroded = [names[layer] for layer in Ghost(plain, 0.5, digits.test.inputs[:1], np.random.default_rng(0))._layers]
    assert eroded == ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "fc1"]
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    rows = digits.test.inputs[:400]
    ghost = Ghost(plain, 0.5, rows[:1], np.random.default_rng(0))
    logits_of(ghost, rows)
    assert all(torch.equal(buffer, before[name]) for name, buffer in plain.named_buffers())
    seen: list[torch.Tensor] = []
    handle = plain.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits_of(ghost, rows)
    handle.remove()
    assert 0.45 < (seen[0] == 0).double().mean() < 0.55


def test_layers_that_answer_with_no_tensor_or_run_again_are_told_apart():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.both, self.memory = nn.Linear(2, 2), nn.Linear(2, 2), nn.LSTM(2, 2)

        def forward(self, inputs):
            return self.both(self.head(self.memory(self.both(inputs))[0]))

    odd = Odd()
    assert _layers(odd, torch.zeros(1, 2)) == [odd.head, odd.both]


def test_class_without_rows_is_not_imitated():
    rows = Batch(torch.arange(40.0)[:, None], torch.arange(40) % 2 * 2)  # classes 0 and 2 of 3
    secret = SCHEME.new_secret(weights_of(nn.Linear(1, 3)), rng=np.random.default_rng(0))
    _, targets = _targets(rows, 40, 3, secret)
    assert torch.equal(targets, 2 - rows.targets)


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


@pytest.mark.parametrize(
    "parameters",
    [
        {"points": 1},
        {"radius": 0.0},
        {"step": 0.0},
        {"steps": 0},
        {"ghosts": -1},
        {"dropout": 1.0},
        {"agreement": 1.1},
    ],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Afa(**parameters)
