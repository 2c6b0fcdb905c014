import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sealmark.attacks.extraction.distill import Distill, probabilities_of
from sealmark.core.attack import Resources
from sealmark.core.errors import AccessError, FormatError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch
from sealmark.core.training import train_task


@pytest.fixture(scope="module")
def stolen(digits, marked):
    return Distill().run(marked.model, Resources.of(digits), rng=np.random.default_rng(0))


def test_the_student_is_as_good_as_its_teacher(digits, marked, stolen):
    assert digits.score(stolen.model) >= 0.95
    assert digits.score(stolen.model) >= digits.score(marked.model) - 0.02


def test_the_mark_is_there_before_and_at_chance_after(mark, marked, stolen):
    assert marked.known(marked.model) == 1
    assert marked.known(stolen.model) <= 0.3
    verdicts = [mark.verify(WhiteBox(model), marked.secret).verdict for model in (marked.model, stolen.model)]
    assert verdicts == [Verdict.MATCH, Verdict.NO_MATCH]


def test_the_student_learns_what_the_teacher_believes_not_what_is_true(digits):
    """A teacher that is wrong on purpose has wrong students; one who asks for true labels is not fooled."""
    liar = Liar(digits.model(np.random.default_rng(0)))
    resources = Resources.of(digits)
    fooled, honest = (
        Distill(epochs=20, alpha=alpha).run(liar, resources, rng=np.random.default_rng(0)).model
        for alpha in (1.0, 0.0)
    )
    assert digits.score(fooled) < 0.2
    assert digits.score(honest) > 0.9


class Liar(nn.Module):
    """Always sure of class 3."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return functional.one_hot(torch.full((len(images),), 3), 10).float() * 10


def test_the_cost_counts_one_query_a_row(stolen):
    cost = stolen.cost
    assert (cost.rows, cost.rows_seen, cost.copies, cost.queries) == (400, 16_000, 1, 400)


def test_modify_is_extraction_from_the_one_copy(digits, marked, same):
    resources, attack = Resources.of(digits, 0.2), Distill(epochs=1)
    made, rows = attack.modify([marked.model], resources, np.random.default_rng(0))
    assert rows == 80
    assert same(made, attack.run(marked.model, resources, rng=np.random.default_rng(0)).model)


def test_the_loss_is_the_papers(digits):
    outputs, teacher = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([1, 2, 3, 4, 5])
    heat, alpha = 4.0, 0.3
    p, q = (teacher / heat).softmax(-1), (outputs / heat).softmax(-1)
    expected = alpha * heat**2 * (p * (p / q).log()).sum() / 5
    expected += (1 - alpha) * -outputs.log_softmax(-1)[range(5), labels].mean()
    loss = Distill(temperature=heat, alpha=alpha)._loss(digits)
    told = torch.cat([teacher.softmax(-1), labels[:, None]], 1)
    assert loss(outputs, told).item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_probability_of_zero_does_no_harm(digits):
    told = torch.cat([torch.eye(10), torch.arange(10.0)[:, None]], 1)
    assert torch.isfinite(Distill(temperature=4.0)._loss(digits)(torch.zeros(10, 10), told))


def test_the_same_seed_gives_the_same_student(digits, marked, same):
    resources, attack = Resources.of(digits, 0.2), Distill(epochs=1)
    one, again, other = (
        attack.run(marked.model, resources, rng=np.random.default_rng(seed)).model for seed in (0, 0, 1)
    )
    assert same(one, again)
    assert not same(one, other)


def test_the_teacher_is_left_as_it_is(digits, marked, same):
    before = {name: tensor.clone() for name, tensor in marked.model.state_dict().items()}
    Distill(epochs=1).run(marked.model, Resources.of(digits, 0.2), rng=np.random.default_rng(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in marked.model.state_dict().items())


def test_scratch_learns_the_true_labels_of_the_same_rows(digits, same):
    resources = Resources.of(digits, 0.25)
    scratch = Distill(epochs=30).scratch(resources, np.random.default_rng(0))
    assert 0.85 < digits.score(scratch) < 0.97
    wrong = Resources(digits, Batch(resources.rows.inputs, (resources.rows.targets + 1) % 10))
    assert digits.score(Distill(epochs=30).scratch(wrong, np.random.default_rng(0))) < 0.1


def test_a_rate_of_zero_takes_the_tasks_own(digits):
    assert Distill(epochs=7).recipe(digits) == dataclasses.replace(digits.recipe, epochs=7)
    assert Distill(rate=0.2).recipe(digits).rate == 0.2


def test_another_architecture_is_another_make(digits, marked):
    small = dataclasses.replace(
        digits, make=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    student = Distill().run(marked.model, Resources.of(small), rng=np.random.default_rng(0)).model
    assert digits.score(student) > 0.9
    assert marked.known(student) <= 0.4


def test_words_can_be_distilled(words):
    teacher = train_task(words, rng=np.random.default_rng(0))
    student = Distill().run(teacher, Resources.of(words), rng=np.random.default_rng(1)).model
    assert words.score(teacher) > 0.7
    assert words.score(student) > words.score(teacher) - 0.1


def test_a_task_is_augmented_while_the_student_learns(digits, marked, same):
    seen = []

    def augment(batch, rng):
        seen.append(batch.rows)
        return batch

    task = dataclasses.replace(digits, augment=augment)
    Distill(epochs=1).run(marked.model, Resources.of(task, 0.25), rng=np.random.default_rng(0))
    assert sum(seen) == 100


def test_a_service_of_labels_alone_is_refused(digits):
    suspect = BlackBox(lambda inputs: torch.zeros(len(inputs)))
    with pytest.raises(AccessError):
        Distill().extract(suspect, Resources.of(digits), np.random.default_rng(0))


def served(answer):
    return BlackBox(lambda inputs: answer, returns="probabilities")


def test_probabilities_are_taken_as_they_are(digits):
    answer = torch.full((4, 10), 0.1)
    assert torch.equal(probabilities_of(served(answer), digits, digits.test.inputs[:4]), answer)


@pytest.mark.parametrize(
    "answer",
    [
        torch.full((4, 9), 1 / 9),
        torch.full((4, 10), -1.0),
        torch.full((4, 10), 7.0),
        torch.full((4, 10), torch.nan),
    ],
    ids=["nine classes", "negative", "logits", "NaN"],
)
def test_answers_that_are_no_probabilities_are_refused(digits, answer):
    with pytest.raises(FormatError, match=r"not (probabilities|finite)"):
        probabilities_of(served(answer), digits, digits.test.inputs[:4])


def test_a_task_without_classes_is_refused(digits, marked):
    with pytest.raises(ParameterError, match="with classes"):
        Distill().run(
            marked.model, Resources.of(dataclasses.replace(digits, classes=0)), rng=np.random.default_rng(0)
        )


@pytest.mark.parametrize(
    "parameters",
    [{"epochs": 0}, {"rate": -0.1}, {"rate": float("nan")}, {"temperature": 0}, {"temperature": float("nan")},
     {"temperature": float("inf")}, {"alpha": -0.1}, {"alpha": 1.1}],
)  # fmt: skip
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of distill"):
        Distill(**parameters)
