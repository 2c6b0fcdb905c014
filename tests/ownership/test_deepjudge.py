from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import ttest_1samp
from torch import nn

from sealmark.blackbox.crafting import ascend, cross_entropy, logits_of
from sealmark.blackbox.inputs import form_of, pack
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, MarkFailedError, ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.weights import weights_of
from sealmark.ownership.deepjudge import Deepjudge, _active, divergence
from sealmark.stats.populations import population_of

SCHEME = Deepjudge(answers="probabilities")
OPEN = Deepjudge(answers="module", layer="fc1")


@pytest.fixture(scope="module")
def opened(plain, digits, references):
    return OPEN.enroll(plain, digits, references=references, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def secret(plain, digits, references):
    return SCHEME.enroll(plain, digits, references=references, rng=np.random.default_rng(1))


def attacked(model, task, name, **parameters):
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(task), rng=np.random.default_rng(3)).model


def verify(model, secret, **how):
    return registry.scheme_of(secret).verify(WhiteBox(model), secret, alpha=0.05, **how)


def distances(model, secret):
    return verify(model, secret).details["distances"]


def test_derived_models_behave_as_the_model_does_and_are_accused(descendants, secret):
    for name, model in descendants.items():
        evidence = verify(model, secret)
        assert evidence.verdict is Verdict.MATCH, name
        assert evidence.details["votes"] == {"RobD": "copy", "JSD": "copy"}, name
        assert evidence.details["paper_claims"], name


def test_every_derived_model_is_three_times_nearer_than_every_independent_one(descendants, independents, secret):
    for metric in ("RobD", "JSD"):
        farthest = max(distances(model, secret)[metric] for model in descendants.values())
        assert farthest < min(distances(model, secret)[metric] for model in independents) / 3, metric


def test_independent_models_are_not_accused(independents, secret):
    found = [verify(model, secret) for model in independents]
    assert not any("copy" in evidence.details["votes"].values() for evidence in found)
    assert not any(evidence.details["paper_claims"] for evidence in found)
    assert sum(evidence.verdict is Verdict.MATCH for evidence in found) <= 1  # 1 in 21 is what the rank promises


def test_model_itself_has_distance_zero(plain, secret, opened):
    assert set(distances(plain, secret).values()) == {0.0}
    assert max(distances(plain, opened).values()) < 1e-6


def test_knockoff_by_labels_is_no_copy_and_distilling_stays_apart_from_what_is_derived(
    plain, digits, descendants, secret
):
    labels = verify(attacked(plain, digits, "knockoff", answers="label"), secret)
    assert not labels.details["paper_claims"]
    soft = distances(attacked(plain, digits, "distill"), secret)
    farthest = {m: max(distances(model, secret)[m] for model in descendants.values()) for m in soft}
    assert all(soft[metric] > farthest[metric] for metric in soft)


def test_cases_of_another_owner_do_not_accuse_the_model(plain, independents, references, digits):
    other = SCHEME.enroll(independents[0], digits, references=references, rng=np.random.default_rng(2))
    assert verify(independents[0], other).verdict is Verdict.MATCH
    assert verify(plain, other).verdict is not Verdict.MATCH
    assert not verify(plain, other).details["paper_claims"]


def test_labels_alone_give_the_difference_of_accuracies(plain, independents, references, digits, secret):
    scheme = Deepjudge()
    by_labels = scheme.enroll(plain, digits, references=references, rng=np.random.default_rng(1))
    closed = BlackBox(lambda x: independents[0](x).argmax(1))
    evidence = scheme.verify(closed, by_labels, alpha=0.05)
    assert evidence.queries == closed.queries == 150
    found = evidence.details["distances"]
    assert found == {"RobD": distances(independents[0], secret)["RobD"]}
    with pytest.raises(AccessError):
        SCHEME.verify(closed, secret)


def test_radius_is_one_at_which_the_model_fails_and_others_do_not_all(secret):
    assert secret.tensors["rob"] <= 0.05
    assert secret.host["radius"] in (0.2, 0.25)
    assert secret.tensors["references"][:, 0].min() > 0.1  # what is left of their accuracy


def test_model_that_nothing_fools_is_refused(digits):
    class Constant(nn.Module):
        def forward(self, inputs):
            return inputs.flatten(1)[:, :10] * 0 + torch.eye(10)[0]

    with pytest.raises(MarkFailedError, match="no case fools"):
        SCHEME.enroll(Constant(), digits, references=[Constant(), Constant()])


def test_open_suspects_show_four_more_distances_that_tell_copies(descendants, independents, opened):
    for name, model in descendants.items():
        evidence = verify(model, opened)
        assert list(evidence.details["votes"]) == ["RobD", "JSD", "LOD", "LAD", "NOD", "NAD"]
        assert set(evidence.details["votes"].values()) == {"copy"}, name
        assert evidence.verdict is Verdict.MATCH, name
    for model in independents:
        assert "copy" not in verify(model, opened).details["votes"].values()


def test_permuted_units_hide_a_copy_until_it_is_aligned(plain, digits, opened):
    thief = attacked(plain, digits, "permute")
    votes = verify(thief, opened).details["votes"]
    assert votes["RobD"] == votes["JSD"] == "copy"
    assert "copy" not in (votes["LOD"], votes["LAD"])
    evidence = verify(thief, opened, original=plain)
    assert evidence.verdict is Verdict.MATCH
    assert set(evidence.details["votes"].values()) == {"copy"}


def test_open_suspects_are_needed_for_layers(plain, opened):
    with pytest.raises(AccessError):
        OPEN.verify(BlackBox(plain, returns="logits"), opened)


def test_suspects_of_another_form_are_refused(plain, secret, opened):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(BlackBox(lambda x: plain(x).softmax(1)[:, :9], returns="probabilities"), secret)
    narrow = nn.Sequential()
    narrow.fc1, narrow.fc2 = nn.Linear(64, 5), nn.Linear(5, 10)
    narrow.forward = lambda x: narrow.fc2(narrow.fc1(x.flatten(1)))
    with pytest.raises(ModelMismatchError, match="another form"):
        verify(narrow, opened)


def test_driven_cases_raise_their_unit(plain, digits, opened):
    outputs, units = opened.tensors["outputs"], opened.tensors["units"]
    assert len(torch.unique(units)) > 60  # of 128
    raised = outputs.gather(1, units[:, None])[:, 0]
    elsewhere = torch.stack([outputs[torch.arange(len(units)) != i, unit].mean() for i, unit in enumerate(units)])
    assert (raised > elsewhere).double().mean() > 0.9


def test_unknown_layer_is_named(plain, digits, references):
    with pytest.raises(UnknownNameError, match="fc1"):
        Deepjudge(answers="module", layer="nope").enroll(plain, digits, references=references[:2])


def test_vote_uses_the_lower_bound_of_a_one_sided_t_test(plain, secret):
    sample = secret.tensors["references"][:, 1].numpy()
    low = ttest_1samp(sample, 0, alternative="greater").confidence_interval(0.99).low
    assert verify(plain, secret).details["thresholds"]["JSD"] == pytest.approx(0.6 * low)


def test_statistic_is_minus_the_mean_standardized_distance(independents, secret):
    table = secret.tensors["references"].numpy()
    evidence = verify(independents[0], secret)
    found = np.array(list(evidence.details["distances"].values()))
    assert evidence.statistic == pytest.approx(-((found - table.mean(0)) / table.std(0, ddof=1)).mean())


def test_divergence_is_that_of_scipy():
    one, other = torch.softmax(torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0)).double(), -1)
    expected = jensenshannon(one.numpy(), other.numpy(), axis=1) ** 2
    assert np.allclose(divergence(one, other).numpy(), expected)


def test_units_are_active_above_half_of_the_span():
    assert _active(torch.tensor([[0.0, 0.4, 0.6, 1.0], [-1.0, 0.1, 1.0, 0.0]])).tolist() == [
        [False, False, True, True],
        [False, True, True, False],
    ]


def accusation(mine, accomplices, held_out, task):
    """Cases that fool every model, the best of many (Liu et al. 2024), and references that the accuser made up."""
    scheme = Deepjudge(cases=50)
    rows = task.test.take(slice(0, 300))
    moved = ascend([mine, *accomplices], rows.inputs, rows.targets, radius=0.3, steps=40, low=0.0, high=1.0)
    best = cross_entropy(logits_of(held_out, moved), rows.targets).argsort(descending=True)[:50]
    form = form_of(task, scheme.name) | {"radius": 0.3}
    secret = scheme.new_secret(weights_of(mine), host=form, rng=np.random.default_rng(9))
    cases, classes = pack(moved[best], form), rows.targets[best]
    rob = torch.tensor(0.0, dtype=torch.float64)
    made_up = torch.linspace(0.5, 0.7, 20, dtype=torch.float64)[:, None]
    return secret.with_learned({"inputs": cases, "classes": classes, "rob": rob, "references": made_up})


def test_false_claim_wins_by_the_papers_rule_and_loses_before_a_judges_models(
    plain, independents, references, digits
):
    *accomplices, held_out = independents[3:]
    forged = accusation(plain, accomplices, held_out, digits)
    judges = population_of(registry.scheme_of(forged), forged, [WhiteBox(model) for model in references])
    for innocent in independents[:3]:
        naive = verify(innocent, forged)
        assert naive.details["paper_claims"]
        assert naive.verdict is Verdict.MATCH  # references of the accuser's own are none
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
        {"cases": 1},
        {"answers": "gradients"},
        {"answers": "module"},
        {"layer": "fc1"},
        {"slack": 0.0},
        {"slack": 1.1},
        {"confidence": 0.4},
    ],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Deepjudge(**parameters)
