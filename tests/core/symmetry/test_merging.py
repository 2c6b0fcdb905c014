"""Duplicates are merged, and what nobody reads is dropped, down to the original's number."""

from __future__ import annotations

import torch

from sealmark.core.symmetry.merging import drop_dummies
from sealmark.core.symmetry.structure import Slot, Stretch, Units


def _units(start: int = 0) -> Units:
    maker, reader = Slot("w", 0, start=start), Slot("r", 1)
    stretch = Stretch(sources=(maker,), readers=(reader,), norms=(), signs=False)
    return Units("a", 2, (maker,), (), (reader,), ("relu",), (stretch,), ("a", "b"), resizable=True)


def _tensors(*rows: list[float], outgoing: list[float]) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(rows).double(), "r": torch.tensor([outgoing]).double()}


def test_a_split_unit_is_one_again() -> None:
    tensors = _tensors([1, 2], [3, -1], [2, 4], outgoing=[0.5, 1, 2])
    assert drop_dummies(tensors, _units(), 3) == 2
    assert tensors["w"].tolist() == [[1, 2], [3, -1]]
    assert tensors["r"].tolist() == [[4.5, 1]]


def test_a_unit_that_nobody_reads_goes() -> None:
    tensors = _tensors([1, 2], [3, -1], [5, 1], outgoing=[0.5, 1, 0])
    assert drop_dummies(tensors, _units(), 3) == 2
    assert tensors["r"].tolist() == [[0.5, 1]]


def test_units_that_do_something_stay() -> None:
    tensors = _tensors([1, 2], [3, -1], [5, 1], outgoing=[0.5, 1, 2])
    assert drop_dummies(tensors, _units(), 3) == 3


def test_no_more_go_than_there_are_too_many() -> None:
    tensors = _tensors([1, 2], [1, 2], [1, 2], outgoing=[1, 1, 1])
    assert drop_dummies(tensors, _units(), 3) == 2


def test_units_that_begin_inside_a_tensor_are_not_compared() -> None:
    tensors = _tensors([9, 9], [1, 2], [3, -1], [1, 2], outgoing=[0.5, 1, 2])
    assert drop_dummies(tensors, _units(start=1), 3) == 3
