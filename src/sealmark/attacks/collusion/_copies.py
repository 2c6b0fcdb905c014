"""What the copies of several users have in common, and what is made of them weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError

_PART = 1 << 20

Rule = Callable[[Tensor], Tensor]
State = dict[str, Tensor]


def combined(copies: list[nn.Module], rule: Rule) -> nn.Module:
    """The first copy, changed in place: each weight follows from what all copies have there.

    Args:
        copies: of one model. Integers, such as counters, stay those of the first.
        rule: (C, n) float64, the same n weights of C copies, to (n,). Called with a part of a tensor at a time.

    Raises:
        ModelMismatchError: the copies are not of one model.
    """
    states = states_of(copies)
    return replaced(copies[0], {k: _combined([state[k] for state in states], rule) for k in weights_in(states[0])})


def states_of(copies: list[nn.Module]) -> list[State]:
    """Each copy's tensors, by name.

    Raises:
        ModelMismatchError: the copies are not of one model.
    """
    states = [copy.state_dict() for copy in copies]
    forms = [{k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} for state in states]
    for form in forms[1:]:
        if form != forms[0]:
            different = sorted({name for name, _ in form.items() ^ forms[0].items()})
            raise ModelMismatchError(
                "cannot combine copies of different models",
                expected="the same tensors in every copy",
                found=f"differences in {different[:5]}",
            )
    return states


def weights_in(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold real numbers."""
    return [name for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()]


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same model with some of its tensors overwritten, in place; tied ones stay tied."""
    model.load_state_dict(model.state_dict() | dict(tensors))
    return model


def _combined(tensors: list[Tensor], rule: Rule) -> Tensor:
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    flat, parts = result.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(flat), _PART):
        part = slice(start, start + _PART)
        flat[part] = rule(torch.stack([tensor[part].double() for tensor in parts])).to(flat.dtype)
    return result
