"""Input preprocessing: the service filters what it is asked, and hopes that triggers do not come through."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError

Kind = Literal["blur", "median", "jpeg", "noise", "quantize"]
_USUAL: dict[str, float] = {"blur": 0.6, "median": 3, "jpeg": 65, "noise": 0.05, "quantize": 10}
_ON_IMAGES = ("blur", "median", "jpeg")


@dataclass(frozen=True)
class Preprocess(Modification):
    """Serve the stolen model behind a filter on its inputs; the weights stay as they are.

    ============  ===============================================  ===========
    ``kind``      ``strength``                                     usual
    ============  ===============================================  ===========
    ``blur``      standard deviation of a Gaussian, in pixels      0.5 to 1
    ``median``    side of the window in pixels, odd                3
    ``jpeg``      quality, 1 to 95                                 45 to 95
    ``noise``     standard deviation, as a share of the range      0.01 to 0.1
    ``quantize``  levels over the range                            10 to 16
    ============  ===============================================  ===========

    The range of the inputs is that of the task's rows. Noise follows from the input and from a seed of the
    surrogate's own: the same question gets the same answer, so that asking again does not average it out.

    Args:
        kind: of filter; the first three are for images (N, C, H, W).
        strength: see above; 0 takes a usual one.

    Raises:
        ParameterError: another kind, or a strength that means nothing.

    Example:
        >>> Preprocess("noise", 0.1)
        Preprocess(kind='noise', strength=0.1)
    """

    kind: Kind = "blur"
    strength: float = 0.0

    card = AttackCard(
        title="Input preprocessing at serving time",
        citation="N. Lukas, E. Jiang, X. Li, F. Kerschbaum, SoK: How Robust is Image Classification Deep Neural "
        "Network Watermarking?, IEEE S&P 2022",
        goal="answer triggers otherwise, at a small cost in accuracy",
        knowledge="the model, to serve it; the range of its inputs",
        level=2,
        needs_data=False,
        changes_form=True,
        parameters="kind blur, median, jpeg, noise or quantize; strength in its unit, 0 for a usual one",
    )

    def __post_init__(self) -> None:
        if self.kind not in _USUAL or not _makes_sense(self.kind, self.strength or _USUAL[self.kind]):
            raise ParameterError(
                "bad parameters of preprocess",
                expected="blur above 0, median odd and at least 3, jpeg 1 to 95, noise above 0, quantize 2 or more",
                found=(self.kind, self.strength),
            )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            UnsupportedError: integer inputs, no images where the filter is for images, or no Pillow for JPEG.
        """
        rows = resources.task.attacker.inputs
        if not rows.is_floating_point() or (self.kind in _ON_IMAGES and rows.ndim != 4):
            raise UnsupportedError(
                f"{self.kind} does not fit these inputs",
                expected="images (N, C, H, W) of real numbers" if self.kind in _ON_IMAGES else "real numbers",
                found=f"{rows.dtype} of shape {tuple(rows.shape)}",
                advice="use query_modification" if rows.is_floating_point() else "use fine_tune or knockoff",
            )
        if self.kind == "jpeg":
            _pillow()
        limits = (rows.min().item(), rows.max().item())
        strength = self.strength or _USUAL[self.kind]
        return Filtered(copies[0], self.kind, strength, limits, rng.bytes(16)).eval(), 0


class Filtered(nn.Module):
    """A model behind a filter: inputs and outputs are the model's own.

    Args:
        model: answers what came through; its weights are found under ``model.``.
        kind: of filter; see `Preprocess`.
        strength: in the filter's unit.
        limits: least and largest value of an input.
        seed: of the noise.
    """

    def __init__(
        self, model: nn.Module, kind: Kind, strength: float, limits: tuple[float, float], seed: bytes
    ) -> None:
        super().__init__()
        self.model = model
        self.kind, self.strength, self.limits, self.seed = kind, strength, limits, seed

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's answer to filtered inputs."""
        answers: Tensor = self.model(self.filtered(inputs))
        return answers

    def filtered(self, inputs: Tensor) -> Tensor:
        """What the model gets to see: the shape, type and device of ``inputs``."""
        low, high = self.limits
        unit = (inputs - low) / (high - low)
        if self.kind == "blur":
            changed = _blurred(unit, self.strength)
        elif self.kind == "median":
            changed = _median(unit, int(self.strength))
        elif self.kind == "jpeg":
            changed = _through_jpeg(unit, int(self.strength))
        elif self.kind == "noise":
            changed = (unit + self.strength * _noise(inputs, self.seed)).clamp(0, 1)
        else:
            changed = (unit * (self.strength - 1)).round() / (self.strength - 1)
        return changed * (high - low) + low


def _makes_sense(kind: str, strength: float) -> bool:
    whole = math.isfinite(strength) and strength == int(strength)
    return {
        "blur": 0 < strength < 100,
        "median": whole and strength >= 3 and strength % 2 == 1,
        "jpeg": whole and 1 <= strength <= 95,
        "noise": 0 < strength < 100,
        "quantize": whole and strength >= 2,
    }[kind]


def _planes(images: Tensor, reach: int) -> Tensor:
    """(N, C, H, W) to (NC, 1, H + 2 reach, W + 2 reach); what lies outside repeats the edge."""
    return functional.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1).unsqueeze(1)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    reach = math.ceil(3 * deviation)
    line = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    bell = torch.exp(-(line**2) / (2 * deviation**2))
    bell = bell / bell.sum()
    across = functional.conv2d(_planes(images, reach), bell[None, None, None, :])
    return functional.conv2d(across, bell[None, None, :, None]).reshape(images.shape)


def _median(images: Tensor, window: int) -> Tensor:
    around = functional.unfold(_planes(images, window // 2), window)
    return around.median(1).values.reshape(images.shape)


def _noise(inputs: Tensor, seed: bytes) -> Tensor:
    """Standard normal, drawn for each row from the seed and the row's own bytes."""
    rows = inputs.detach().to("cpu", torch.float32).contiguous().numpy()
    drawn = np.empty(rows.shape, np.float32)
    for row, place in zip(rows, drawn, strict=True):
        digest = hashlib.sha256(seed + row.tobytes()).digest()
        place[...] = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(row.shape, np.float32)
    return torch.from_numpy(drawn).to(inputs)


def _through_jpeg(images: Tensor, quality: int) -> Tensor:
    """Written as JPEG and read back: three channels as colors, any other number each as grey."""
    image = _pillow()
    colors = images.shape[1] == 3
    pictures = images.permute(0, 2, 3, 1) if colors else images.flatten(0, 1)
    whole = (pictures.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous().numpy()
    read = []
    for picture in whole:
        with io.BytesIO() as file:
            image.fromarray(picture).save(file, "JPEG", quality=quality)
            read.append(np.asarray(image.open(file)))
    back = torch.from_numpy(np.stack(read)).to(images) / 255
    return back.permute(0, 3, 1, 2) if colors else back.reshape(images.shape)


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise UnsupportedError(
            "JPEG needs Pillow", expected="Pillow", advice="install sealmark[data], or use another kind"
        ) from None
    return Image
