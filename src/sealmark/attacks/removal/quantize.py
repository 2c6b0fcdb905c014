"""Quantization: fewer bits a weight, written back in the model's own type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Quantize(Modification):
    """Round the weights to fewer bits; simulated, so the model keeps its types and runs anywhere.

    Integers are symmetric and apply to parameters of two or more dimensions:
    ``s = max|w| / (2**(bits - 1) - 1)`` and ``w <- s round(w / s)``, over a tensor or over each output
    channel (its first dimension). A cast applies to every floating-point parameter and buffer, as
    ``model.half()`` does. Eight bits are a formality; four or fewer test a mark.

    Args:
        scheme: ``tensor`` or ``channel`` for integers, ``bf16`` or ``fp16`` for a cast and back.
        bits: of the integers, 2 to 16; casts have their own.

    Raises:
        ParameterError: another scheme, or bits outside 2 to 16.

    Example:
        >>> Quantize(scheme="channel", bits=4)
        Quantize(scheme='channel', bits=4)
    """

    scheme: Literal["tensor", "channel", "bf16", "fp16"] = "tensor"
    bits: int = 8

    card = AttackCard(
        title="Quantization to integers or to half precision",
        citation="R. Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018",
        goal="remove a mark",
        knowledge="the weights",
        level=1,
        needs_data=False,
        parameters="scheme tensor, channel, bf16 or fp16; bits 2 to 8",
    )

    def __post_init__(self) -> None:
        if self.scheme not in ("tensor", "channel", *_CASTS) or not 2 <= self.bits <= 16:
            raise ParameterError(
                "bad parameters of quantize",
                expected="scheme tensor, channel, bf16 or fp16; bits 2 to 16",
                found=(self.scheme, self.bits),
            )

    def modify(
        self,
        copies: list[nn.Module],
        resources: Resources,
        rng: np.random.Generator,
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`."""
        model = copies[0]
        if self.scheme in _CASTS:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data.copy_(tensor.data.to(_CASTS[self.scheme]))
        else:
            for weight in model.parameters():
                if weight.dim() >= 2 and weight.is_floating_point():
                    weight.data.copy_(self._round(weight.data.double()))
        return model, 0

    def _round(self, weight: Tensor) -> Tensor:
        levels = 2 ** (self.bits - 1) - 1
        over = tuple(range(1 if self.scheme == "channel" else 0, weight.dim()))
        step = weight.abs().amax(over, keepdim=True) / levels if weight.numel() else weight
        return torch.where(step > 0, (weight / step).round() * step, 0.0)
