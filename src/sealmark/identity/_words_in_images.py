"""A small U-Net that writes words of bits into images, and a net that reads them: the nets of SSAT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.errors import ForgedSecretError
from sealmark.core.modes import chunks

_CELLS = 8  # a side: words are written and read at no finer a grain
_WIDTH, _FEATURES, _HIDDEN = 16, 32, 128
_Net = TypeVar("_Net", "Encoder", "Decoder")


class Encoder(nn.Module):
    """Writes words into images: a U-Net on the images and a plane that is a linear image of the word.

    The plane is also added to what the last layer says: a word that has to find its way through the U-Net
    first is never read, and encoder and decoder collapse.

    Args:
        shape: (C, H, W) of one image.
        bits: B.
    """

    low: Tensor
    high: Tensor
    reach: Tensor
    shape: Tensor

    def __init__(self, shape: Sequence[int], bits: int) -> None:
        super().__init__()
        channels, self.cells = shape[0], _cells(shape)
        self.plane = nn.Linear(bits, math.prod(self.cells))
        self.first = nn.Conv2d(channels + 1, _WIDTH, 3, padding=1)
        self.down = nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, padding=1)
        self.up = nn.Conv2d(3 * _WIDTH, _WIDTH, 3, padding=1)
        self.last = nn.Conv2d(_WIDTH + channels + 1, channels, 3, padding=1)
        for name in ("low", "high", "reach"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("shape", torch.tensor(list(shape)))

    def start(self, low: float, high: float, strength: float) -> None:
        """Note the inputs' range and e; planes of different words start far apart."""
        nn.init.orthogonal_(self.plane.weight)
        for buffer, value in ((self.low, low), (self.high, high), (self.reach, strength * (high - low))):
            buffer.fill_(value)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Images (N, C, H, W) with words (N, B) of 0 and 1 in them, within the inputs' range."""
        size = images.shape[-2:]
        coarse = self.plane(2 * words - 1).reshape(-1, 1, *self.cells)
        plane = functional.interpolate(coarse, size)
        shown = torch.cat([(images - self.low) / (self.high - self.low), plane], 1)
        outer = self.first(shown).relu()
        inner = self.down(functional.max_pool2d(outer, 2)).relu()
        merged = self.up(torch.cat([functional.interpolate(inner, size), outer], 1)).relu()
        pattern = (self.last(torch.cat([merged, shown], 1)) + plane).tanh()
        sent: Tensor = (images + self.reach * pattern).clamp(self.low, self.high)
        return sent


class Decoder(nn.Module):
    """Reads words from images: a convolution and two linear layers, and a linear one past them.

    Args:
        shape: (C, H, W) of one image.
        bits: B.
    """

    def __init__(self, shape: Sequence[int], bits: int) -> None:
        super().__init__()
        self.cells = _cells(shape)
        self.features = nn.Conv2d(shape[0], _FEATURES, 3, padding=1)
        self.hidden = nn.Linear(_FEATURES * math.prod(self.cells), _HIDDEN)
        self.outer = nn.Linear(_HIDDEN, bits)
        self.direct = nn.Linear(shape[0] * math.prod(self.cells), bits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the bits, (N, B)."""
        features, pixels = self._coarse(self.features(images).relu()), self._coarse(images)
        logits: Tensor = self.outer(self.hidden(features.flatten(1)).relu()) + self.direct(pixels.flatten(1))
        return logits

    def _coarse(self, planes: Tensor) -> Tensor:
        fine = planes.shape[-2:] == self.cells  # nothing to average, which would be slow
        return planes if fine else functional.adaptive_avg_pool2d(planes, self.cells)


def encoder_of(tensors: Mapping[str, Tensor]) -> Encoder:
    """The encoder in a credential or a secret.

    Raises:
        ForgedSecretError: there is none.
    """
    shape, plane = tensors.get("encoder/shape", torch.empty(0)), tensors.get("encoder/plane.weight")
    if shape.numel() != 3 or plane is None or plane.ndim != 2:
        raise ForgedSecretError("no encoder in it", expected="what enroll returned", found=sorted(tensors))
    return _loaded(Encoder, shape.tolist(), plane.shape[1], "encoder", tensors)


def decoder_of(tensors: Mapping[str, Tensor], shape: Sequence[int], bits: int) -> Decoder:
    """The decoder in a secret, of words of ``bits`` in images of that shape.

    Raises:
        ForgedSecretError: there is none.
    """
    return _loaded(Decoder, shape, bits, "decoder", tensors)


def tensors_of(encoder: Encoder, decoder: Decoder) -> dict[str, Tensor]:
    """What `encoder_of` and `decoder_of` read."""
    parts = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    return {f"{name}/{key}": part for name, state in parts.items() for key, part in state.items()}


def written(encoder: Encoder, images: Tensor, word: Tensor) -> Tensor:
    """Images (N, C, H, W) with one word (B,) in all of them, without gradients; they stay on their device."""
    with torch.no_grad():
        parts = [encoder(part.float().cpu(), word.float().expand(len(part), -1)) for part in chunks(images)]
    return torch.cat(parts).to(images)


def random_words(count: int, bits: int, rng: np.random.Generator) -> Tensor:
    """(N, B) float32 of 0 and 1."""
    return torch.from_numpy(rng.integers(0, 2, (count, bits))).float()


def _cells(shape: Sequence[int]) -> tuple[int, int]:
    return min(shape[1], _CELLS), min(shape[2], _CELLS)


def _loaded(kind: type[_Net], shape: Sequence[int], bits: int, name: str, tensors: Mapping[str, Tensor]) -> _Net:
    """A net of that form with these tensors, on the CPU; no parameter is drawn for it."""
    with torch.device("meta"):
        net = kind(shape, bits)
    state = {key.removeprefix(f"{name}/"): part for key, part in tensors.items() if key.startswith(f"{name}/")}
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError:
        raise ForgedSecretError(
            f"no {name} of this form in it", expected="what enroll returned", found=sorted(state)
        ) from None
    return net.requires_grad_(False)
