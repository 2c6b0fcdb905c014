"""What a hidden layer says of an input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, UnknownNameError
from sealmark.core.modes import chunks, evaluating


class Tap:
    """The latest output of a layer, as `tapped` fills it."""

    _output: object = None

    @property
    def output(self) -> Tensor:
        """With its gradient.

        Raises:
            ModelMismatchError: the layer did not run, or answered with something else than a tensor.
        """
        if not isinstance(self._output, Tensor):
            raise ModelMismatchError(
                "the layer gave no tensor", expected="one tensor", found=type(self._output).__name__
            )
        return self._output


@contextlib.contextmanager
def tapped(model: nn.Module, layer: str) -> Iterator[Tap]:
    """Listen to a layer: after each forward pass, ``tap.output`` is its output, with its gradient.

    Args:
        model: any.
        layer: name of one of its modules.

    Raises:
        UnknownNameError: no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with tapped(model, "0") as tap:
        ...     _ = model(torch.zeros(5, 2))
        >>> tuple(tap.output.shape)
        (5, 3)
    """
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise UnknownNameError("no such layer", expected=f"one of {sorted(modules)[1:]}", found=layer)
    tap = Tap()

    def listen(_: nn.Module, __: object, output: object) -> None:
        tap._output = output

    handle = modules[layer].register_forward_hook(listen)
    try:
        yield tap
    finally:
        handle.remove()


def activations(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """The layer's output for each input, in evaluation mode, without gradients: (N, ...) on the CPU.

    Raises:
        ModelMismatchError: the model has no such layer, or cannot take these inputs.
    """
    try:
        with evaluating(model) as device, tapped(model, layer) as tap:
            outputs = []
            for chunk in chunks(inputs):
                model(chunk.to(device))
                outputs.append(tap.output.to("cpu"))
            return torch.cat(outputs)
    except (UnknownNameError, RuntimeError) as error:
        raise ModelMismatchError("the suspect has another form", expected=f"a layer {layer}", found=error) from None
