"""Tasks and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.errors import ParameterError
from sealmark.core.task import Batch, Recipe, Task, accuracy

ROWS = Batch(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2]))


def test_taking_rows_keeps_inputs_and_targets_together() -> None:
    taken = ROWS.take(torch.tensor([2, 0]))
    assert taken.inputs.tolist() == [[4, 5], [0, 1]]
    assert taken.targets.tolist() == [2, 0]
    assert ROWS.take(slice(1, None)).rows == 2


def test_joining_puts_the_other_rows_behind_in_this_batchs_types() -> None:
    joined = ROWS.join(Batch(torch.ones(1, 2, dtype=torch.float64), torch.tensor([7], dtype=torch.int32)))
    assert joined.targets.tolist() == [0, 1, 2, 7]
    assert (joined.inputs.dtype, joined.targets.dtype) == (torch.float32, torch.int64)
    assert joined.rows == 4


def test_joining_nothing_gives_the_batch_itself() -> None:
    assert ROWS.join(ROWS.take(slice(0, 0))) is ROWS


def test_a_batch_moves_whole() -> None:
    moved = ROWS.to("meta")
    assert moved.inputs.device.type == moved.targets.device.type == "meta"


@pytest.mark.parametrize(("targets", "expected"), [([0, 1], 1.0), ([1, 0], 0.0), ([0, 0], 0.5)])
def test_accuracy_is_the_share_of_rows_whose_largest_output_is_the_target(
    targets: list[int], expected: float
) -> None:
    assert accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor(targets)) == expected


@pytest.mark.parametrize("fields", [{"epochs": -1}, {"batch_size": 0}, {"rate": -1e-9}])
def test_a_recipe_that_means_nothing_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match="bad recipe"):
        Recipe(**fields)  # type: ignore[arg-type]


def test_an_untrained_model_follows_from_the_generator(toy: Task) -> None:
    first, again, other = (toy.model(np.random.default_rng(seed)) for seed in (0, 0, 1))
    for one, same, different in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


def test_making_a_model_leaves_torchs_generator_alone(toy: Task, rng: np.random.Generator) -> None:
    before = torch.get_rng_state()
    toy.model(rng)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_task_judges_on_its_test_rows_unless_told_otherwise(toy: Task) -> None:
    oracle = nn.Linear(4, 2)
    with torch.no_grad():
        oracle.weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        oracle.bias.zero_()
    assert toy.score(oracle) == 1
    inverted = Batch(toy.test.inputs, 1 - toy.test.targets)
    assert toy.score(oracle, inverted) == 0


def test_judging_leaves_the_model_in_its_mode(toy: Task, rng: np.random.Generator) -> None:
    model = toy.model(rng).train()
    toy.score(model)
    assert model.training


def test_the_splits_of_the_digits_are_disjoint_and_complete(digits: Task) -> None:
    splits = (digits.owner, digits.attacker, digits.test)
    assert sum(split.rows for split in splits) == 1797
    rows = [{row.numpy().tobytes() for row in split.inputs} for split in splits]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]


def test_a_trained_model_knows_the_digits_and_an_untrained_one_does_not(
    digits: Task, plain: nn.Module, rng: np.random.Generator
) -> None:
    assert digits.score(plain) > 0.95
    assert digits.score(digits.model(rng)) < 0.3
