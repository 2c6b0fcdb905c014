from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.core.training import train_task
from sealmark.core.weights import save_model, weights_of
from sealmark.ownership.dataset_inference import DatasetInference, _welch
from sealmark.stats.calibration import super_uniformity

SCHEME = DatasetInference()
REGRESSED = DatasetInference(evidence=50, fitted=50, relabelings=9_999)


@pytest.fixture(scope="module")
def noisy():
    return registry.task("noisy_digits")


def trained(task, seed, rows=None):
    return train_task(task, rng=np.random.default_rng(seed), rows=rows).eval()


@pytest.fixture(scope="module")
def model(noisy):
    return trained(noisy, 0)


@pytest.fixture(scope="module")
def innocent(noisy):
    """Of two other parties, who have as many rows of the same kind."""
    return [trained(noisy, 7, noisy.attacker.take(rows)) for rows in (slice(0, 200), slice(200, None))]


@pytest.fixture(scope="module")
def secret(model, noisy):
    return SCHEME.enroll(model, noisy, rng=np.random.default_rng(1))


def p_value(suspect, secret, scheme=SCHEME):
    return scheme.verify(WhiteBox(suspect), secret).p_value


def test_model_is_recognized_by_its_labels_as_surely_as_the_law_can_say(model, secret):
    suspect = BlackBox(lambda x: model.eval()(x).argmax(1))
    evidence = SCHEME.verify(suspect, secret, alpha=1e-4)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.p_value == pytest.approx(1e-5)
    assert evidence.basis is Basis.PERMUTATION
    assert evidence.queries == suspect.queries > 200
    assert SCHEME.verify(suspect, secret).verdict is Verdict.INCONCLUSIVE  # 1e-6 is beyond this law


@pytest.mark.parametrize(
    ("attack", "parameters"), [("fine_tune", {"epochs": 20, "rate": 0.05}), ("prune", {"rate": 0.5})]
)
def test_what_is_left_after_a_removal_attack_is_recognized(attack, parameters, model, secret, noisy):
    attack = registry.modification(attack, **parameters)
    surrogate = attack.run(model, Resources.of(noisy), rng=np.random.default_rng(3)).model
    assert p_value(surrogate, secret) < 1e-3


def test_extraction_on_the_owners_inputs_is_recognized(model, secret, noisy):
    answers = WhiteBox(model).probabilities(noisy.owner.inputs)
    assert p_value(trained(noisy, 4, Batch(noisy.owner.inputs, answers)), secret) < 1e-2


def test_innocent_models_are_not(innocent, secret):
    assert min(p_value(other, secret) for other in innocent) > 0.05


def test_somebody_else_who_trained_on_the_same_rows_is_flagged(secret, noisy):
    assert p_value(trained(noisy, 9), secret) < 1e-3


def test_clean_digits_leave_no_gap_to_see(plain, digits):
    secret = SCHEME.enroll(plain, digits, rng=np.random.default_rng(1))
    assert p_value(plain, secret) > 1e-3


def test_law_holds_on_an_innocent_model_however_the_rows_were_divided(innocent, noisy):
    """The model knows nothing of the division, so it may be drawn anew: p-values must not be too small."""
    scheme = DatasetInference(evidence=20, draws=1, steps=5, noise=0.15, relabelings=199)
    pool, found = noisy.owner.join(noisy.test), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(pool.rows))
        task = replace(noisy, owner=pool.take(order[:200]), test=pool.take(order[200:]))
        found.append(p_value(innocent[0], scheme.enroll(innocent[0], task, rng=rng), scheme))
    assert super_uniformity(found) > 1e-3
    assert min(found) < 0.2  # so small ones do occur


def test_exact_law_is_near_welchs_where_his_assumptions_hold(innocent, secret):
    evidence = SCHEME.verify(WhiteBox(innocent[0]), secret)
    assert evidence.p_value == pytest.approx(evidence.details["welch_p"], abs=0.02)


def test_welch_agrees_with_scipy_and_survives_what_never_varies():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.3, 1, 20), rng.normal(0, 3, 30)
    expected = ttest_ind(one, other, equal_var=False, alternative="greater").pvalue
    assert _welch(one, other) == pytest.approx(expected)
    assert _welch(np.ones(5), np.ones(5)) == 1


def test_suspect_that_answers_one_class_alone_is_no_evidence(secret):
    evidence = SCHEME.verify(BlackBox(lambda x: torch.zeros(len(x))), secret)
    assert evidence.verdict is Verdict.INCONCLUSIVE
    assert evidence.p_value > 1e-3


def test_divisions_are_of_equal_halves_and_differ(secret):
    (first, *rest) = SCHEME._divisions(secret)
    assert {part.sum(1).min() for part in (first, *rest)} == {part.sum(1).max() for part in (first, *rest)} == {100}
    assert abs(first.mean(0) - 0.5).max() < 0.03
    assert len(np.unique(first[:500], axis=0)) == 500
    assert sum(len(part) for part in (first, *rest)) == 99_999


def test_everything_of_one_row_stands_in_one_row(secret):
    """The authors' notebook reshapes its features so that each row mixes those of many images."""
    packed = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    packed[:, 0, 0, 0] = torch.tensor([0, 80, 160, 240]).byte()  # tells the rows apart
    rows = Batch(packed, torch.tensor([0, 1, 2, 3]))

    low, span = secret.host["low"], secret.host["high"] - secret.host["low"]

    def answer(x):
        """Row 0 is wrong at once, the others never: by the first pixel, which noise moves by less than a row."""
        start = low + span * torch.tensor([0, 80, 160, 240]) / 255
        nearest = (x[:, 0, 0, :1] - start).abs().argmin(1)
        return torch.where(nearest == 0, 9, nearest)

    scheme = DatasetInference(noise=1e-4)
    made = scheme.new_secret(weights_of(torch.nn.Linear(1, 1)), host=secret.host, rng=np.random.default_rng(0))
    far = scheme.walks(BlackBox(answer), rows, made)
    assert far.shape == (4, 30)
    assert torch.equal(far, torch.tensor([0.0, 21.0, 21.0, 21.0])[:, None].expand(4, 30))


def test_paper_mode_recognizes_the_model_and_no_other(model, innocent, noisy):
    secret = REGRESSED.enroll(model, noisy, rng=np.random.default_rng(1))
    evidence = REGRESSED.verify(WhiteBox(model), secret)
    assert evidence.p_value < 1e-3
    assert evidence.details["paper_claims"]
    for other in innocent:
        found = REGRESSED.verify(WhiteBox(other), secret)
        assert found.p_value > 0.05
        assert not found.details["paper_claims"]


def test_weights_alone_suffice_without_a_regressor(model, noisy, tmp_path):
    save_model(model, tmp_path / "model.safetensors")
    secret = SCHEME.enroll(tmp_path / "model.safetensors", noisy, rng=np.random.default_rng(1))
    assert secret.tensors["inputs"].shape == (200, 1, 8, 8)
    with pytest.raises(ParameterError, match="live model"):
        REGRESSED.enroll(tmp_path / "model.safetensors", noisy)


def test_too_few_rows_are_refused(model, noisy):
    with pytest.raises(ParameterError, match="rows of both kinds"):
        DatasetInference(evidence=201).enroll(model, noisy)


def test_words_take_no_noise(model):
    with pytest.raises(UnsupportedError):
        SCHEME.enroll(model, registry.task("tokens"))


@pytest.mark.parametrize(
    "parameters", [{"evidence": 1}, {"fitted": 1}, {"draws": 0}, {"noise": 0.0}, {"relabelings": 0}, {"steps": 0}]
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        DatasetInference(**parameters)
