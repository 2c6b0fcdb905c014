from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from torch import nn

from sealmark.blackbox.crafting import logits_of
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, MarkFailedError, ModelMismatchError, ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Recipe
from sealmark.core.training import train_task
from sealmark.core.weights import weights_of
from sealmark.ownership.universal_perturbation import UniversalPerturbation, contrastive, encoded, universal
from sealmark.stats.populations import population_of

SCHEME = UniversalPerturbation()
ENCODER = UniversalPerturbation(encoder=True)
QUICK = Recipe(4, 64, 0.1, clip=1.0)  # answers as models of 15 epochs at 0.05 do


def trained(task, seeds, **how):
    return [train_task(task, rng=np.random.default_rng(seed), recipe=QUICK, **how).eval() for seed in seeds]


@pytest.fixture(scope="module")
def independents(digits):
    """Held out: none of them is a reference."""
    return [*trained(digits, range(100, 104)), *trained(digits, range(200, 203), rows=digits.attacker)]


@pytest.fixture(scope="module")
def secret(plain, digits, references):
    return SCHEME.enroll(plain, digits, references=references, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def learned(plain, digits, references):
    return ENCODER.enroll(plain, digits, references=references, rng=np.random.default_rng(1))


def attacked(model, task, name, **parameters):
    attack = registry.modification(name, **parameters)
    return attack.run(model, Resources.of(task), rng=np.random.default_rng(3)).model


def verify(model, secret, **how):
    return registry.scheme_of(secret).verify(WhiteBox(model), secret, alpha=0.05, **how)


def similarity(model, secret):
    return verify(model, secret).details["similarity"]


def test_derived_models_are_accused(descendants, secret):
    for name, model in descendants.items():
        evidence = verify(model, secret)
        assert evidence.verdict is Verdict.MATCH, name
        assert evidence.details["paper_claims"], name


def test_every_derived_model_is_nearer_than_every_independent_one(descendants, independents, secret):
    nearest = max(similarity(model, secret) for model in independents)
    assert min(similarity(model, secret) for model in descendants.values()) > nearest


def test_independent_models_are_not_accused(independents, secret):
    found = [verify(model, secret) for model in independents]
    assert sum(evidence.verdict is Verdict.MATCH for evidence in found) <= 1  # 1 in 21 is what the rank promises


def test_without_a_perturbation_derived_models_do_not_stand_out(plain, digits, references, descendants):
    flat = replace(SCHEME, radius=1e-6).enroll(plain, digits, references=references, rng=np.random.default_rng(1))
    assert verify(plain, flat).details["fooled"] == 0
    farthest = min(similarity(model, flat) for model in descendants.values())
    assert farthest < verify(plain, flat).details["nearest_reference"]


def test_one_perturbation_fools_the_model_where_random_signs_do_not(plain, digits):
    rows, form = digits.test.inputs, form_of(digits, "")
    moved = universal(plain, digits.owner.inputs, 0.25, 20, form, np.random.default_rng(0))
    signs = torch.from_numpy(np.random.default_rng(1).choice([-0.25, 0.25], moved.shape)).float()

    def fooled(change):
        answers = (logits_of(plain, (rows + by).clamp(0, 1)).argmax(1) for by in (0, change))
        return torch.ne(*answers).double().mean()

    assert moved.shape == (1, 1, 8, 8)
    assert moved.abs().max() <= 0.25
    assert fooled(moved) > 0.3 > 0.1 > fooled(signs)


def test_knockoff_by_labels_is_not_accused(plain, digits, secret):
    assert verify(attacked(plain, digits, "knockoff", answers="label"), secret).verdict is Verdict.NO_MATCH


def test_rows_of_another_owner_do_not_accuse_the_model(plain, independents, references, digits):
    other = SCHEME.enroll(independents[0], digits, references=references, rng=np.random.default_rng(2))
    assert verify(independents[0], other).verdict is Verdict.MATCH
    assert verify(plain, other).verdict is not Verdict.MATCH


def test_suspect_is_asked_every_row_as_it_is_and_perturbed(plain, digits, secret):
    rows, moved = unpack(secret.tensors["inputs"], secret.host).chunk(2)
    known = {row.numpy().tobytes() for row in unpack(pack(digits.test.inputs, secret.host), secret.host)}
    assert all(row.numpy().tobytes() in known for row in rows)
    assert (moved - rows).abs().max() <= 0.25 + 1 / 255
    closed = BlackBox(plain, returns="logits")
    assert SCHEME.verify(closed, secret, alpha=0.05).queries == closed.queries == 2 * len(rows) <= 400


def test_every_print_takes_one_row_of_every_cluster(secret):
    prints = secret.tensors["prints"]
    assert prints.shape == (20, 20)
    assert (prints.diff(dim=1) > 0).all()  # rows lie cluster by cluster
    assert prints[:, :-1].amax(0).lt(prints[:, 1:].amin(0)).all()
    assert len(torch.unique(prints, dim=0)) == 20


def test_papers_test_is_welchs(independents, secret):
    form, kept = secret.host, secret.tensors
    found = SCHEME.similarities(WhiteBox(independents[0]), kept, form).numpy()
    expected = ttest_ind(found, kept["references"].flatten(), equal_var=False, alternative="greater").pvalue
    assert verify(independents[0], secret).details["paper_p"] == pytest.approx(expected)


def test_encoder_tells_what_is_lightly_changed_from_independent_models(descendants, independents, learned):
    assert learned.tensors["first"].shape == (400, 64)
    nearest = max(similarity(model, learned) for model in independents)
    for name in ("itself", "fine-tuned", "pruned 0.5"):
        assert verify(descendants[name], learned).verdict is Verdict.MATCH
        assert similarity(descendants[name], learned) > nearest


def test_encoder_draws_independent_models_further_apart_than_prints_are(independents, secret, learned):
    farthest = [min(similarity(model, each) for model in independents) for each in (secret, learned)]
    assert farthest[1] < farthest[0] - 0.1


def test_enrolling_repeats_itself_and_leaves_the_model_and_torchs_generator_as_they_are(plain, digits, references):
    before, state = weights_of(plain).digest(), torch.random.get_rng_state()
    scheme = replace(ENCODER, shadows=2, epochs=1, passes=1)
    one, two, other = (
        scheme.enroll(plain, digits, references=references[:2], rng=np.random.default_rng(seed)).tensors
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["first"], other["first"])
    assert weights_of(plain).digest() == before
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_contrastive_loss_is_that_of_its_definition():
    layers = [torch.from_numpy(np.random.default_rng(i).normal(size=(4, 4))).float() for i in range(2)]
    points = encoded(torch.from_numpy(np.random.default_rng(5).normal(size=(6, 4))).float(), layers)
    origin = torch.tensor([0, 0, 0, 1, 1, 0])
    found = []
    for i, point in enumerate(points):
        scores = {j: float(torch.exp(point @ other / 0.1)) for j, other in enumerate(points) if j != i}
        mine = [j for j in scores if origin[j] == origin[i]]
        found.append(-np.mean([np.log(scores[j] / sum(scores.values())) for j in mine]))
    assert float(contrastive(points, origin)) == pytest.approx(np.mean(found), rel=1e-4)


def accusation(mine, task):
    """Rows that every model answers alike, and references that the accuser made up (Liu et al. 2024)."""
    secret = SCHEME.new_secret(weights_of(mine), host=form_of(task, SCHEME.name), rng=np.random.default_rng(9))
    sure = logits_of(mine, task.test.inputs).softmax(1).amax(1).argsort(descending=True)[:40]
    inputs = pack(task.test.inputs[torch.cat([sure, sure])], secret.host)
    answers = WhiteBox(mine).probabilities(unpack(inputs, secret.host))
    prints = torch.from_numpy(np.random.default_rng(9).integers(40, size=(20, 20)))
    made_up = torch.linspace(0.5, 0.9, 400, dtype=torch.float64).reshape(20, 20)
    return secret.with_learned({"inputs": inputs, "answers": answers, "prints": prints, "references": made_up})


def test_false_claim_wins_by_the_papers_test_and_loses_before_a_judges_models(
    plain, independents, references, digits
):
    forged = accusation(plain, digits)
    judges = population_of(SCHEME, forged, [WhiteBox(model) for model in references])
    found = [verify(innocent, forged, population=judges).verdict for innocent in independents]
    assert found.count(Verdict.MATCH) <= 1
    for innocent in independents:
        naive = verify(innocent, forged)
        assert naive.details["paper_claims"]
        assert naive.verdict is Verdict.MATCH  # references of the accuser's own are none


def test_judges_models_still_accuse_a_thief(descendants, secret, references):
    judges = population_of(SCHEME, secret, [WhiteBox(model) for model in references])
    assert verify(descendants["fine-tuned"], secret, population=judges).verdict is Verdict.MATCH


def test_suspects_of_another_form_are_refused(plain, secret):
    with pytest.raises(ModelMismatchError, match="another form"):
        SCHEME.verify(BlackBox(lambda x: plain(x).softmax(1)[:, :9], returns="probabilities"), secret)
    with pytest.raises(AccessError):
        SCHEME.verify(BlackBox(lambda x: plain(x).argmax(1)), secret)


def test_model_that_is_never_right_is_refused(digits, references):
    class Wrong(nn.Module):
        def forward(self, inputs):
            return inputs.flatten(1)[:, :10] * 0

    rows = digits.test.take(digits.test.targets != 0)
    with pytest.raises(MarkFailedError, match="too few rows"):
        SCHEME.enroll(Wrong(), replace(digits, test=rows), references=references[:2])


def test_references_a_task_and_a_gradient_are_needed(plain, digits, references):
    with pytest.raises(ParameterError, match="unrelated models"):
        SCHEME.enroll(plain, digits, references=references[:1])
    with pytest.raises(ParameterError, match="classification task"):
        SCHEME.enroll(plain, None, references=references[:2])
    with pytest.raises(UnsupportedError):
        SCHEME.enroll(plain, registry.task("tokens"), references=references[:2])


@pytest.mark.parametrize(
    "parameters",
    [
        {"points": 1},
        {"prints": 1},
        {"depth": 0},
        {"radius": 0.0},
        {"radius": 1.1},
        {"passes": 0},
        {"shadows": 1},
        {"epochs": 0},
        {"level": 0.0},
    ],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        UniversalPerturbation(**parameters)
