import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.extraction.knockoff import Knockoff, answers_of, made_up, surrogate_of
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, BudgetError, FormatError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Recipe
from sealmark.core.training import train_task

ANSWERS = ["label", "probabilities"]


@pytest.fixture(scope="module", params=ANSWERS)
def stolen(request, digits, marked):
    attack = Knockoff(answers=request.param)
    return attack.run(marked.model, Resources.of(digits), rng=np.random.default_rng(0))


def service(model, returns="label", budget=None):
    opened = WhiteBox(model)
    predict = opened.labels if returns == "label" else opened.probabilities
    return BlackBox(predict, returns=returns, budget=budget)


def test_the_knockoff_is_good_and_the_mark_is_at_chance(digits, mark, marked, stolen):
    assert digits.score(stolen.model) >= 0.95
    assert marked.known(stolen.model) <= 0.3
    assert mark.verify(WhiteBox(stolen.model), marked.secret).verdict is Verdict.NO_MATCH


def test_every_row_his_own_or_made_up_is_asked_for_once(stolen):
    assert (stolen.cost.rows, stolen.cost.queries, stolen.cost.rows_seen) == (400, 800, 32_000)


def test_it_asks_a_black_box_and_nothing_else(digits, marked):
    asked = []

    def predict(inputs):
        assert not torch.is_grad_enabled() or not inputs.requires_grad
        asked.append(len(inputs))
        return WhiteBox(marked.model).labels(inputs)

    suspect = BlackBox(predict)
    surrogate, seen = Knockoff(answers="label").extract(suspect, Resources.of(digits), np.random.default_rng(0))
    assert sum(asked) == suspect.queries == 800
    assert seen == 32_000
    assert digits.score(surrogate) >= 0.95


def test_true_labels_are_not_looked_at(digits, marked, same):
    rows = Resources.of(digits, 0.25)
    lies = Resources(digits, Batch(rows.rows.inputs, torch.zeros_like(rows.rows.targets)))
    attack = Knockoff(epochs=1)
    one, other = (attack.run(marked.model, known, rng=np.random.default_rng(0)).model for known in (rows, lies))
    assert same(one, other)


@pytest.mark.parametrize("strategy", ["random", "adaptive"])
def test_a_budget_is_kept(digits, marked, strategy):
    attack = Knockoff(strategy=strategy, budget=90, epochs=1)
    assert attack.run(marked.model, Resources.of(digits), rng=np.random.default_rng(0)).cost.queries == 90


def test_the_adaptive_strategy_wastes_fewer_questions_on_noise(digits, marked):
    """Where two rows of three are noise, random choice spends two thirds on them."""
    noise = [self_made_share(digits, marked, strategy) for strategy in ("random", "adaptive")]
    assert noise[0] > 0.55
    assert noise[1] < noise[0] - 0.2


def self_made_share(digits, marked, strategy):
    own = {row.numpy().tobytes() for row in digits.attacker.inputs}
    asked = []

    def predict(inputs):
        asked.extend(row.numpy().tobytes() not in own for row in inputs)
        return WhiteBox(marked.model).probabilities(inputs)

    attack = Knockoff(epochs=1, random_rows=800, made="noise", strategy=strategy, budget=200)
    suspect = BlackBox(predict, returns="probabilities")
    attack.extract(suspect, Resources.of(digits), np.random.default_rng(0))
    return np.mean(asked)


def test_adaptive_without_a_budget_asks_for_everything(digits, marked):
    attack = Knockoff(strategy="adaptive", random_rows=20, epochs=1, answers="label")
    result = attack.run(marked.model, Resources.of(digits, 0.1), rng=np.random.default_rng(0))
    assert result.cost.queries == 60


@pytest.mark.parametrize("strategy", ["random", "adaptive"])
def test_the_same_seed_gives_the_same_knockoff(digits, marked, same, strategy):
    resources, attack = Resources.of(digits, 0.2), Knockoff(epochs=1, strategy=strategy, budget=60)
    one, again, other = (
        attack.run(marked.model, resources, rng=np.random.default_rng(seed)).model for seed in (0, 0, 1)
    )
    assert same(one, again)
    assert not same(one, other)


def test_blends_lie_between_two_rows_and_count_as_the_greater(digits):
    rows = digits.attacker.take(slice(0, 2))
    made = made_up(rows, 50, "blends", 10, np.random.default_rng(0))
    one, other = rows.inputs
    for row, target in zip(made.inputs, made.targets, strict=True):
        share = ((row - other) * (one - other)).sum() / (one - other).square().sum()
        assert torch.allclose(row, share * one + (1 - share) * other, atol=1e-6)
        nearer = 0 if share > 0.5 else 1
        assert target == rows.targets[nearer] or share in (0, 1)


def test_blends_of_words_take_each_word_from_one_of_two_rows():
    rows = registry.task("tokens").attacker.take(slice(0, 2))
    made = made_up(rows, 50, "blends", 10, np.random.default_rng(0))
    assert made.inputs.dtype == torch.int64
    assert ((made.inputs == rows.inputs[0]) | (made.inputs == rows.inputs[1])).all()
    assert len(torch.unique(made.inputs, dim=0)) > 10


@pytest.mark.parametrize("name", ["digits", "tokens"])
def test_noise_fills_the_range_of_the_rows_and_is_a_class_of_its_own(name):
    rows = registry.task(name).attacker
    made = made_up(rows, 300, "noise", 10, np.random.default_rng(0))
    assert made.inputs.dtype == rows.inputs.dtype
    assert made.inputs.shape == (300, *rows.inputs.shape[1:])
    assert made.inputs.min() >= rows.inputs.min()
    assert made.inputs.max() <= rows.inputs.max()
    assert made.inputs.double().std() > rows.inputs.max() / 5
    assert set(made.targets.tolist()) == {10}


@pytest.mark.parametrize("made", ["blends", "noise"])
def test_a_model_of_words_is_stolen_by_its_labels(words, made):
    owner = train_task(words, rng=np.random.default_rng(0))
    attack = Knockoff(answers="label", random_rows=50, made=made)
    result = attack.run(owner, Resources.of(words), rng=np.random.default_rng(1))
    assert result.cost.queries == 450
    assert words.score(result.model) > words.score(owner) - 0.12


@pytest.mark.parametrize("answers", ANSWERS)
def test_a_service_is_stolen_through_its_answers_alone(digits, plain, answers):
    suspect = service(plain, answers)
    surrogate = surrogate_of(suspect, digits, digits.attacker.inputs, answers=answers, rng=np.random.default_rng(0))
    assert digits.score(surrogate) >= 0.95
    assert suspect.queries == 400
    assert not surrogate.training


def test_a_service_that_answers_by_chance_gives_a_useless_surrogate(digits):
    drawn = torch.from_numpy(np.random.default_rng(0).integers(10, size=400))
    surrogate = surrogate_of(
        BlackBox(lambda inputs: drawn), digits, digits.attacker.inputs, rng=np.random.default_rng(0)
    )
    assert digits.score(surrogate) < 0.4


def test_a_student_and_a_recipe_of_ones_own_are_used(digits, plain):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    made = surrogate_of(
        service(plain), digits, digits.attacker.inputs, recipe=Recipe(epochs=0), rng=np.random.default_rng(0),
        student=student,
    )  # fmt: skip
    assert made is student


def test_more_is_not_asked_than_the_service_allows(digits, plain):
    with pytest.raises(BudgetError):
        surrogate_of(service(plain, budget=399), digits, digits.attacker.inputs, rng=np.random.default_rng(0))


def test_probabilities_of_a_service_of_labels_are_refused(digits, plain):
    with pytest.raises(AccessError):
        surrogate_of(
            service(plain), digits, digits.attacker.inputs, answers="probabilities", rng=np.random.default_rng(0)
        )


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_the_task_does_not_have_are_refused(digits, label):
    suspect = BlackBox(lambda inputs: torch.full((len(inputs),), label))
    with pytest.raises(FormatError, match="no labels of the task"):
        answers_of(suspect, digits, digits.test.inputs, "label")


def test_a_task_without_classes_is_refused(digits, plain):
    task = dataclasses.replace(digits, classes=0)
    with pytest.raises(ParameterError, match="with classes"):
        surrogate_of(service(plain), task, digits.attacker.inputs, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "parameters",
    [{"epochs": 0}, {"rate": -1}, {"answers": "logits"}, {"made": "up"}, {"strategy": "greedy"},
     {"random_rows": -1}, {"budget": -1}],
)  # fmt: skip
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of knockoff"):
        Knockoff(**parameters)
