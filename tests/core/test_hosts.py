"""Layers that carry a mark: chosen, and found again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sealmark.core.errors import AccessError, ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.hosts import (
    choose_host,
    filter_length,
    mean_filter,
    read_host,
    read_mean_filter,
    without_mean_filter,
)
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.weights import TensorInfo


def _room(info: TensorInfo) -> int:
    return info.count


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Embedding(2, 2))


def test_the_roomiest_weight_is_chosen_and_the_last_of_several(model: nn.Module) -> None:
    assert choose_host(model, "", room=_room, need=32) == ("2.weight", TensorInfo((4, 8), torch.float32))


def test_a_named_weight_is_taken(model: nn.Module) -> None:
    assert choose_host(model, "0.weight", room=_room, need=1)[0] == "0.weight"


@pytest.mark.parametrize("name", ["1.weight", "0.bias", "nowhere"])
def test_what_is_no_weight_tensor_is_refused_by_name(model: nn.Module, name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"expected one of \['0.weight', '2.weight', '3.weight'\]"):
        choose_host(model, name, room=_room, need=1)


def test_a_small_host_says_what_it_holds(model: nn.Module) -> None:
    with pytest.raises(ParameterError, match=r"3\.weight is too small a host: expected at most 4 rows, found 5"):
        choose_host(model, "3.weight", room=_room, need=5, unit="rows")


def test_a_model_without_weights_has_no_host() -> None:
    with pytest.raises(UnknownNameError):
        choose_host(nn.ReLU(), "", room=_room, need=1)


def test_the_host_is_read_in_float32(model: nn.Module) -> None:
    expected = model[0].weight.detach().clone()
    read = read_host(WhiteBox(model.half()), "0.weight", lambda info: info.shape == (8, 4), "8 x 4 weights")
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["0.weight", "9.weight"])
def test_a_suspect_of_another_form_is_a_mismatch(model: nn.Module, name: str) -> None:
    with pytest.raises(ModelMismatchError, match=f"{name} with 5 columns"):
        read_host(WhiteBox(model), name, lambda info: info.shape[1] == 5, "5 columns")


def test_integers_are_no_host() -> None:
    counts = nn.Module()
    counts.register_buffer("count", torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ModelMismatchError):
        read_host(WhiteBox(counts), "count", lambda info: True, "weights")


def test_a_black_box_shows_no_host() -> None:
    with pytest.raises(AccessError):
        read_host(BlackBox(lambda x: torch.zeros(len(x))), "0.weight", lambda info: True, "weights")


def test_the_mean_filter_is_blind_to_the_order_of_outputs_and_can_be_taken_out(model: nn.Module) -> None:
    weight = model[0].weight.detach()
    read = read_mean_filter(WhiteBox(model), "0.weight", 4)
    torch.testing.assert_close(read, weight.mean(0))
    torch.testing.assert_close(read, mean_filter(weight.flip(0)))
    blind = without_mean_filter("0.weight")
    torch.testing.assert_close(mean_filter(blind("0.weight", weight)), torch.zeros(4), atol=1e-6, rtol=0)
    assert blind("2.weight", weight) is weight
    assert filter_length(TensorInfo((8, 3, 5, 5), torch.float32)) == 75
    with pytest.raises(ModelMismatchError, match=r"0\.weight with 5 inputs a filter"):
        read_mean_filter(WhiteBox(model), "0.weight", 5)
