"""Knockoff nets: rows that anybody can get, another's answers to them, and a network of one's own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sealmark.attacks.extraction.distill import check_classes, probabilities_of
from sealmark.core.attack import Answers, Extraction, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import FormatError, ParameterError
from sealmark.core.modes import chunks, evaluating
from sealmark.core.suspect import Suspect
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train

_ROUND = 16  # queries of the adaptive strategy between two steps of its student
_WINDOW = 25  # rewards that the baseline averages


@dataclass(frozen=True)
class Knockoff(Extraction):
    """Functionality stealing by queries alone: no weights, no gradients, no true labels.

    The transfer set is the attacker's rows and ``random_rows`` more that he makes up. ``random`` asks for
    rows in random order, until the budget is spent. ``adaptive`` lets a gradient bandit choose the class of
    the next row by how sure, how varied and how surprising the answers were; classes are those of the
    attacker's own labels, and made-up noise is one more. It differs from ``random`` only where the budget
    is smaller than the transfer set. In both, the knockoff is then trained from a random start on all that
    was answered.

    Made-up noise is a bad choice against a mark made of abstract images: answers to it, as probabilities,
    carry a part of the mark over (on digits, 41 % of adi's triggers; blends left 12 %).

    Ours: the bandit asks in rounds of 16 rather than row by row, as services are asked, and chooses among
    classes without the paper's hierarchy above them.

    Args:
        epochs: passes over the rows that were answered.
        rate: learning rate; 0 takes the task's own.
        answers: what the service tells, ``label`` or ``probabilities``.
        random_rows: rows to make up beside his own.
        made: how; ``blends`` of two rows of his, or ``noise``, uniform in their range.
        strategy: ``random`` or ``adaptive``.
        budget: largest number of queries; 0 asks for the whole transfer set.

    Raises:
        ParameterError: other answers, ways or strategies, negative counts, or no epochs.

    Example:
        >>> Knockoff(answers="label", random_rows=200).returns
        'label'
    """

    answers: Answers = "probabilities"
    random_rows: int = 400
    made: Literal["blends", "noise"] = "blends"
    strategy: Literal["random", "adaptive"] = "random"
    budget: int = 0

    card = AttackCard(
        title="Knockoff nets: extraction by queries",
        citation="T. Orekondy, B. Schiele, M. Fritz, Knockoff Nets: Stealing Functionality of Black-Box Models, "
        "CVPR 2019",
        goal="a model of one's own, without the mark",
        knowledge="the service's labels or probabilities on rows of his own and on made-up ones",
        level=1,
        needs_data=True,
        parameters="epochs 20 to 60, rate 0 for the task's own, answers label or probabilities, random_rows, "
        "made blends or noise, strategy random or adaptive, budget of queries",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {
            "answers": ("label", "probabilities"),
            "made": ("blends", "noise"),
            "strategy": ("random", "adaptive"),
        }
        wrong = {name: getattr(self, name) for name, known in allowed.items() if getattr(self, name) not in known}
        if wrong or self.random_rows < 0 or self.budget < 0:
            raise ParameterError(
                "bad parameters of knockoff",
                expected=f"{allowed}, random_rows >= 0, budget >= 0",
                found=wrong or (self.random_rows, self.budget),
            )

    @property
    def returns(self) -> Answers:
        """See `Extraction.returns`."""
        return self.answers

    def extract(self, suspect: Suspect, resources: Resources, rng: np.random.Generator) -> tuple[nn.Module, int]:
        """See `Extraction.extract`.

        Raises:
            AccessError: the suspect does not tell what ``answers`` says.
            BudgetError: its own budget is smaller than the attack's.
            FormatError: it answers nonsense.
            MarkFailedError: the training diverged.
        """
        task, recipe = resources.task, self.recipe(resources.task)
        check_classes(task)
        pool = resources.rows
        if self.random_rows:
            pool = pool.join(made_up(pool, self.random_rows, self.made, task.classes, rng))
        count = min(self.budget or pool.rows, pool.rows)
        student = task.model(rng).to(resources.device)
        if self.strategy == "adaptive":
            # a first student, which only helps to choose
            answered = _ask_adaptively(
                suspect, task, pool, count, answers=self.answers, student=student, recipe=recipe, rng=rng
            )
            student = task.model(rng).to(resources.device)
        else:
            inputs = pool.inputs[torch.from_numpy(rng.permutation(pool.rows)[:count])]
            answered = Batch(inputs, answers_of(suspect, task, inputs, self.answers))
        return student, _imitate(student, answered, task, recipe, rng)


def surrogate_of(
    suspect: Suspect,
    task: Task,
    inputs: Tensor,
    *,
    answers: Answers = "label",
    recipe: Recipe | None = None,
    rng: np.random.Generator,
    student: nn.Module | None = None,
) -> nn.Module:
    """Steal a model, wherever it is: ask ``suspect`` for its answers to ``inputs`` and train on them.

    Args:
        suspect: anything that answers; ``suspect.queries`` tells what it took.
        task: tells the architecture, the number of classes, and how to train.
        inputs: (N, ...), of any type that the model takes.
        answers: what to ask for, ``label`` or ``probabilities``.
        recipe: of training; the task's own by default.
        rng: start and order of rows.
        student: trained in place instead of a fresh model of the task, on its device.

    Returns:
        The surrogate, in evaluation mode.

    Raises:
        AccessError: the suspect does not tell what ``answers`` says.
        BudgetError: its budget does not suffice.
        FormatError: it answers nonsense.
        ParameterError: no rows, or the task has no classes.
    """
    check_classes(task)
    answered = Batch(inputs, answers_of(suspect, task, inputs, answers))
    model = task.model(rng) if student is None else student
    _imitate(model, answered, task, recipe or task.recipe, rng)
    return model


def answers_of(suspect: Suspect, task: Task, inputs: Tensor, answers: Answers) -> Tensor:
    """What the suspect tells of ``inputs`` (N, ...): labels (N,) int64 or probabilities (N, K).

    Raises:
        AccessError: it does not tell that.
        FormatError: the labels, or the numbers, are none of the task's.
    """
    if answers == "probabilities":
        return probabilities_of(suspect, task, inputs)
    labels = torch.cat([suspect.labels(chunk) for chunk in chunks(inputs)])
    if not bool(((labels >= 0) & (labels < task.classes)).all()):
        raise FormatError(
            "the answers are no labels of the task",
            expected=f"0 to {task.classes - 1}",
            found=f"{labels.min().item()} to {labels.max().item()}",
        )
    return labels


def made_up(rows: Batch, count: int, way: str, classes: int, rng: np.random.Generator) -> Batch:
    """Rows that nobody collected, each with the class that a bandit shall count it to.

    Args:
        rows: what the attacker has: (N, ...), real numbers or integers such as words.
        count: how many to make.
        way: ``blends``: part of one row, the lesser part of another; of integers, place by place.
            ``noise``: uniform between the least and the largest value in ``rows``.
        classes: K; noise counts as class K.
        rng: chooses.

    Returns:
        (count, ...) of the type of ``rows``, and (count,) int64.
    """
    inputs, real = rows.inputs, rows.inputs.is_floating_point()
    shape = (count, *inputs.shape[1:])
    if way == "noise":
        low, high = inputs.min().item(), inputs.max().item()
        drawn = rng.uniform(low, high, shape) if real else rng.integers(int(low), int(high) + 1, shape)
        return Batch(torch.from_numpy(drawn).to(inputs), torch.full((count,), classes))
    one, other = (torch.from_numpy(rng.integers(rows.rows, size=count)) for _ in range(2))
    share = torch.from_numpy(rng.uniform(0.5, 1, count)).reshape(-1, *[1] * (inputs.ndim - 1))
    if real:
        share = share.to(inputs)
        return Batch(share * inputs[one] + (1 - share) * inputs[other], rows.targets[one])
    kept = torch.from_numpy(rng.random(shape)) < share
    return Batch(torch.where(kept, inputs[one], inputs[other]), rows.targets[one])


def _imitate(student: nn.Module, answered: Batch, task: Task, recipe: Recipe, rng: np.random.Generator) -> int:
    """Train on answers, whether labels or probabilities; the number of rows seen."""
    report = train(student, answered, loss=functional.cross_entropy, recipe=recipe, rng=rng, augment=task.augment)
    student.eval()
    return report.rows


def _ask_adaptively(
    suspect: Suspect,
    task: Task,
    pool: Batch,
    count: int,
    *,
    answers: Answers,
    student: nn.Module,
    recipe: Recipe,
    rng: np.random.Generator,
) -> Batch:
    """The rows that a bandit chose, and the answers to them; ``student`` learns along."""
    kinds = sorted(set(pool.targets.tolist()))
    left = [rng.permutation(np.flatnonzero(pool.targets.numpy() == kind)).tolist() for kind in kinds]
    bandit = _Bandit(len(kinds), task.classes)
    once = replace(recipe, epochs=1, batch_size=_ROUND)
    chosen: list[Batch] = []
    for start in range(0, count, _ROUND):
        actions = []
        rows = []
        for _ in range(min(_ROUND, count - start)):
            policy = bandit.policy * np.array([bool(rest) for rest in left])
            actions.append(int(rng.choice(len(kinds), p=policy / policy.sum())))
            rows.append(left[actions[-1]].pop())
        inputs = pool.inputs[torch.tensor(rows)]
        told = answers_of(suspect, task, inputs, answers)
        with evaluating(student) as device:
            own = torch.softmax(student(inputs.to(device)).cpu().double(), -1).numpy()
        full = functional.one_hot(told, task.classes) if told.ndim == 1 else told
        for action, answer, guess in zip(actions, full.double().numpy(), own, strict=True):
            bandit.learn(action, answer, guess)
        chosen.append(Batch(inputs, told))
        _imitate(student, chosen[-1], task, once, rng)
    return Batch(torch.cat([part.inputs for part in chosen]), torch.cat([part.targets for part in chosen]))


class _Bandit:
    """A gradient bandit: preferences move by how much a reward beats the latest ones.

    The reward is the mean of three: certainty (how far the first class is ahead of the second), diversity
    (how far the answer lies above the mean answer), and loss (cross entropy of the student), as a share of
    the largest so far. The step for an action is 1 over how often it was taken.
    """

    def __init__(self, actions: int, classes: int) -> None:
        self._preference, self._taken = np.zeros(actions), np.zeros(actions)
        self._mean_answer, self._asked = np.zeros(classes), 0
        self._largest_loss = 1e-9
        self._latest: deque[float] = deque(maxlen=_WINDOW)

    @property
    def policy(self) -> NDArray[np.float64]:
        """The probability of each action."""
        weights = np.exp(self._preference - self._preference.max())
        policy: NDArray[np.float64] = weights / weights.sum()
        return policy

    def learn(self, action: int, answer: NDArray[Any], guess: NDArray[Any]) -> None:
        """Take note of an answer and of what the student would have said: (K,) and (K,)."""
        self._asked += 1
        self._mean_answer += (answer - self._mean_answer) / self._asked
        second, first = np.sort(answer)[-2:]
        diversity = np.maximum(answer - self._mean_answer, 0).sum()
        loss = -(answer * np.log(guess + 1e-12)).sum()
        self._largest_loss = max(self._largest_loss, loss)
        reward = float(first - second + diversity + loss / self._largest_loss) / 3
        gain = reward - (sum(self._latest) / len(self._latest) if self._latest else reward)
        self._latest.append(reward)
        self._taken[action] += 1
        direction = -self.policy
        direction[action] += 1
        self._preference += gain * direction / self._taken[action]
