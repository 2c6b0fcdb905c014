"""AdvParams: a few weights at the ends of their range ruin a model, and their bits bring it back."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.authorization import advparams
from sealmark.authorization.advparams import AdvParams, best_moves
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.lock import Locked
from sealmark.core.patching import Victim
from sealmark.core.task import Task
from sealmark.core.training import train_task
from sealmark.core.weights import rewrite_model, weights_of
from sealmark.evaluate.metrics import attacker_gain

LOCK = AdvParams()


@pytest.fixture(scope="module")
def locked(digits: Task, plain: nn.Module) -> Locked:
    return LOCK.lock(plain, digits, rng=np.random.default_rng(1))


def changed(one: nn.Module, other: nn.Module) -> dict[str, int]:
    a, b = weights_of(one), weights_of(other)
    counts = {name: int((a[name] != b[name]).sum()) for name in a}
    return {name: count for name, count in counts.items() if count}


def test_a_handful_of_weights_ruins_the_model(digits: Task, plain: nn.Module, locked: Locked) -> None:
    assert digits.score(plain) > 0.95
    assert digits.score(locked.model) <= 0.15
    assert 10 < sum(changed(locked.model, plain).values()) <= 60


def test_the_key_gives_back_every_bit(plain: nn.Module, locked: Locked) -> None:
    assert weights_of(LOCK.unlock(locked.model, locked.key)).digest() == weights_of(plain).digest()


def test_the_given_number_of_weights_is_changed(digits: Task, plain: nn.Module) -> None:
    made = AdvParams(25).lock(plain, digits, rng=np.random.default_rng(1))
    assert sum(changed(made.model, plain).values()) == 25
    assert digits.score(made.model) <= 0.15
    assert sum(changed(AdvParams(7).lock(plain, digits).model, plain).values()) == 7


def test_too_few_weights_do_not_lock(digits: Task, plain: nn.Module) -> None:
    made = AdvParams(5).lock(plain, digits, rng=np.random.default_rng(1))
    assert digits.score(made.model) > 0.9


def test_the_lock_goes_on_until_the_metric_says_so(
    digits: Task, plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where answers given to other rows cost nothing, as with pairs, the loss alone would stop after five."""
    monkeypatch.setattr(Victim, "useless", lambda victim, rows: 0.0)
    made = AdvParams().lock(plain, digits, rng=np.random.default_rng(1))
    assert digits.score(made.model) <= 0.15


def test_the_gradient_s_choice_locks_and_not_the_size_of_the_change(
    digits: Task, plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: as many places of the same layers, drawn at random, at the same ends of the range."""
    rng = np.random.default_rng(5)

    def anywhere(
        victim: Victim, weights: dict[str, Tensor], taken: object, slopes: dict[str, Tensor], count: int
    ) -> list[tuple[str, int, bool]]:
        names = list(weights)
        sizes = np.array([weights[name].numel() for name in names])
        picked = [names[i] for i in rng.choice(len(names), count, p=sizes / sizes.sum())]
        return [(name, int(rng.integers(weights[name].numel())), bool(rng.integers(2))) for name in picked]

    monkeypatch.setattr(advparams, "best_moves", anywhere)
    assert digits.score(AdvParams(25).lock(plain, digits, rng=np.random.default_rng(1)).model) >= 0.9


def test_no_weight_leaves_its_layer_s_range_and_none_sits_at_its_end(plain: nn.Module, locked: Locked) -> None:
    """A thief would look for weights that equal the extreme: there is one of these, as before."""
    material = LOCK.derive(locked.key)
    for name in locked.key.host["sizes"]:
        before, after = plain.get_parameter(name), locked.model.get_parameter(name).reshape(-1)
        low, high = before.aminmax()
        moved = after[material["places/" + name]]
        assert bool(((moved > low) & (moved < high)).all())
        assert bool((torch.minimum(moved - low, high - moved) <= 0.05 * (high - low)).all())


def test_the_best_moves_are_those_of_the_slow_way(toy: Task, rng: np.random.Generator) -> None:
    victim = Victim(train_task(toy, rng=rng), toy, rng)
    slopes = victim.gradients(victim.weights, victim.draw())
    taken = {"0.weight": [3, 7]}
    slow = []
    for name, slope in slopes.items():
        for place, (g, w) in enumerate(
            zip(slope.reshape(-1).tolist(), victim.weights[name].reshape(-1).tolist(), strict=True)
        ):
            end = float(victim.weights[name].max() if g > 0 else victim.weights[name].min())
            if place not in taken.get(name, []):
                slow.append((g * (end - w), name, place, g > 0))
    expected = [move[1:] for move in sorted(slow, reverse=True)[:6]]
    assert [tuple(move) for move in best_moves(victim, victim.weights, taken, slopes, 6)] == expected


def test_wrong_keys_and_half_a_key_open_nothing(digits: Task, locked: Locked) -> None:
    rng = np.random.default_rng(3)
    wrong = [digits.score(LOCK.unlock(locked.model, LOCK.wrong_key(locked.key, rng))) for _ in range(5)]
    assert float(np.mean(wrong)) <= 0.15
    halves = [LOCK.vary(LOCK.derive(locked.key), 0.5, rng) for _ in range(5)]
    opened = [digits.score(LOCK.open(copy.deepcopy(locked.model), half)) for half in halves]
    assert float(np.mean(opened)) < 0.6


def test_clipping_the_outermost_weights_does_not_unlock(digits: Task, locked: Locked) -> None:
    def clipped(name: str, tensor: Tensor) -> Tensor:
        ends = torch.quantile(tensor, torch.tensor([0.005, 0.995])) if tensor.dim() > 1 else None
        return tensor if ends is None else tensor.clamp(ends[0], ends[1])

    assert digits.score(rewrite_model(locked.model, clipped)) <= 0.2


def test_fine_tuning_on_a_tenth_of_the_data_breaks_it(digits: Task, plain: nn.Module, locked: Locked) -> None:
    """The known break: all but a few weights are as they were."""
    thief, attack = Resources.of(digits, 0.1), FineTune(epochs=60, rate=0.01)
    scratch = digits.score(FineTune(epochs=60, rate=0.05).scratch(thief, np.random.default_rng(3)))
    attacked = digits.score(attack.run(locked.model, thief, rng=np.random.default_rng(3)).model)
    gain = attacker_gain(attacked, scratch, digits.score(plain))
    assert gain is not None
    assert gain > 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_come_back_bit_for_bit_and_stay_in_range(
    toy: Task, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    model = train_task(toy, rng=rng).to(dtype)
    made = AdvParams(10).lock(model, toy, rng=rng)
    assert sum(changed(made.model, model).values()) == 10
    assert weights_of(AdvParams(10).unlock(made.model, made.key)).digest() == weights_of(model).digest()
    for name in ("0.weight", "2.weight"):
        before, after = model.get_parameter(name), made.model.get_parameter(name)
        assert before.min() <= after.min()
        assert after.max() <= before.max()


@pytest.mark.slow
def test_a_transformer_is_locked_too() -> None:
    task = registry.task("tokens")
    model = train_task(task, rng=np.random.default_rng(0)).eval()
    made = LOCK.lock(model, task, rng=np.random.default_rng(1))
    assert task.score(model) > 0.7
    assert task.score(made.model) <= 0.2
    assert weights_of(LOCK.unlock(made.model, made.key)).digest() == weights_of(model).digest()


def test_the_same_randomness_gives_the_same_lock(digits: Task, plain: nn.Module) -> None:
    one, two, other = (
        AdvParams(5).lock(plain, digits, rng=np.random.default_rng(seed)).model for seed in (4, 4, 5)
    )
    assert weights_of(one).digest() == weights_of(two).digest() != weights_of(other).digest()


def test_no_weight_is_moved_twice_and_the_search_ends_when_none_is_left(
    toy: Task, rng: np.random.Generator
) -> None:
    places = AdvParams(10**6).lock(train_task(toy, rng=rng), toy, rng=rng).key.tensors["places"]
    assert 20 < len(places) == len(places.unique())


def test_a_loss_that_stays_bounded_ends_the_search(toy: Task, rng: np.random.Generator) -> None:
    def bounded(answers: Tensor, targets: Tensor) -> Tensor:
        return -answers.softmax(-1).gather(1, targets[:, None]).mean()

    model = train_task(toy, rng=rng)
    made = LOCK.lock(model, dataclasses.replace(toy, loss=bounded), rng=rng)
    assert toy.score(made.model) < toy.score(model) - 0.2


def test_a_model_whose_answers_hang_on_no_weight_is_refused(toy: Task, rng: np.random.Generator) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :2] + 0 * self.net(inputs)

    with pytest.raises(UnsupportedError, match="no weight changes the loss"):
        LOCK.lock(Constant(), toy, rng=rng)


def test_bad_calls_are_refused(plain: nn.Module) -> None:
    with pytest.raises(ParameterError, match="bad count"):
        AdvParams(-1)
    with pytest.raises(ParameterError, match="shows on data"):
        LOCK.lock(plain)
