"""What a hidden layer says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sealmark.core.activations import activations, tapped
from sealmark.core.errors import ModelMismatchError, UnknownNameError


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()


def test_activations_are_those_of_evaluation_mode_for_all_rows(model: nn.Module) -> None:
    inputs = torch.rand(1500, 4, generator=torch.Generator().manual_seed(0))
    found = activations(model, "1", inputs)
    torch.testing.assert_close(found, model[0](inputs).detach())
    assert not found.requires_grad
    assert model.training


def test_no_rows_have_no_activations(model: nn.Module) -> None:
    assert activations(model, "0", torch.zeros(0, 4)).shape == (0, 3)


def test_a_tap_passes_the_gradient_and_leaves_no_hook(model: nn.Module) -> None:
    with tapped(model, "0") as tap:
        model(torch.ones(2, 4))
        tap.output.sum().backward()
    assert model[0].weight.grad is not None
    assert not model[0]._forward_hooks


def test_a_layer_that_does_not_run_or_gives_no_tensor_is_a_mismatch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.memory = nn.Linear(2, 2), nn.LSTM(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.memory(x)[0]

    for layer, found in (("idle", "NoneType"), ("memory", "tuple")):
        with pytest.raises(ModelMismatchError, match=f"expected one tensor, found {found}"):
            activations(Odd(), layer, torch.zeros(3, 2))


@pytest.mark.parametrize("layer", ["", "nowhere"])
def test_an_unknown_layer_is_refused(model: nn.Module, layer: str) -> None:
    with pytest.raises(UnknownNameError, match=r"expected one of \['0', '1', '2'\]"), tapped(model, layer):
        pass


@pytest.mark.parametrize(("layer", "width"), [("nowhere", 4), ("0", 5)])
def test_a_suspect_that_cannot_be_asked_is_a_mismatch(model: nn.Module, layer: str, width: int) -> None:
    with pytest.raises(ModelMismatchError, match=f"a layer {layer}"):
        activations(model, layer, torch.zeros(2, width))
