"""What passport schemes share: passports, what a layer makes of one, and the signature in the signs of that."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.embedding import Embedding
from sealmark.core.errors import (
    ForgedSecretError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
    UnsupportedError,
)
from sealmark.core.evidence import Score
from sealmark.core.hosts import read_host
from sealmark.core.modes import evaluating
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.symmetry.structure import normalized_layers
from sealmark.core.task import Batch, Loss, Task
from sealmark.core.weights import TensorInfo, TensorMap, rewrite_model
from sealmark.stats.nulls import score_of_bits

_CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
_IMAGES = 20  # behind a shuffled passport, as in the paper's code
_SHRINK = 1e-5  # of the squared gammas, as in the paper's code

Affine = dict[str, tuple[Tensor, Tensor]]  # name of a norm: its gamma and beta, (channels,) each


@dataclass(frozen=True)
class Place:
    """A passport layer, as a secret notes it.

    Attributes:
        layer: name of the convolution or linear layer.
        norm: name of the normalization that reads it alone.
        weight: shape of its weight, output channels first.
        inputs: shape of one of its inputs, which is that of a passport.
        geometry: stride, padding, dilation and groups of a convolution; empty for a linear layer.
    """

    layer: str
    norm: str
    weight: tuple[int, ...]
    inputs: tuple[int, ...]
    geometry: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, layer: str, norm: str, inputs: tuple[int, ...]) -> Place:
        """As a live model has it."""
        weight = tuple(model.get_parameter(f"{layer}.weight").shape)
        return cls(layer, norm, weight, inputs, _geometry(model.get_submodule(layer)))

    @classmethod
    def read(cls, fact: Mapping[str, Any]) -> Place:
        """From the JSON in a secret.

        Raises:
            ForgedSecretError: nothing that this scheme wrote.
        """
        try:
            return cls(fact["layer"], fact["norm"], tuple(fact["weight"]), tuple(fact["inputs"]), fact["geometry"])
        except (KeyError, TypeError) as error:
            raise _unreadable(error) from None

    def direction(self, passport: Tensor) -> Tensor:
        """D with the shape of the weight W: the layer's mean answer to the passport is <W_c, D_c> in channel c.

        The layer is linear in its weight, so D is the gradient of that answer, at any W.

        Args:
            passport: of shape ``inputs``.

        Raises:
            ForgedSecretError: shapes and geometry do not go together.
        """

        def total(weight: Tensor) -> Tensor:
            if not self.geometry:
                return functional.linear(passport.double(), weight).reshape(-1, len(weight)).mean(0).sum()
            convolve = list(_CONVOLUTIONS.values())[len(self.weight) - 3]
            return convolve(passport.double()[None], weight, **self.geometry)[0].flatten(1).mean(1).sum()

        try:
            direction: Tensor = torch.func.grad(total)(torch.zeros(self.weight, dtype=torch.float64))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise _unreadable(error) from None
        return direction.float()

    def directions(self, passports: Mapping[str, Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """What gamma and beta are projections on, by the passports ``LAYER/gamma`` and ``LAYER/beta``."""
        gamma, beta = (self.direction(passports[f"{self.layer}/{part}"].cpu()) for part in ("gamma", "beta"))
        return gamma.to(device), beta.to(device)


@dataclass(frozen=True)
class PassportMark(Watermark):
    """Base of the schemes in which a secret passport, sent through a layer, gives the norm's gamma and beta.

    gamma_c is the mean over positions of (W * k_gamma)_c without the layer's bias; its sign carries a bit
    of the signature (Fan, Ng, Chan 2019, eq. 4). The bits are keyed, so that on any suspect made without
    the secret exactly Bin(channels, 1/2) of the signs agree, whatever the passports.
    """

    layers: tuple[str, ...] = ()
    passports: Literal["random", "shuffle"] = "random"
    strength: float = 0.1
    margin: float = 0.1

    access = Access.WEIGHTS
    carries_payload = True

    def __post_init__(self) -> None:
        if self.passports not in ("random", "shuffle") or self.strength <= 0 or self.margin <= 0:
            raise ParameterError(
                f"bad parameters of {self.name}",
                expected="passports random or shuffle, strength > 0, margin > 0",
                found=(self.passports, self.strength, self.margin),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the passport layers; hold what images look like there, where passports are made of that."""
        if task is None:
            raise ParameterError(
                f"{self.name} needs a task", expected="rows that show the size of every layer's input"
            )
        pairs = self._choose(model)
        seen = _inputs(model, [layer for layer, _ in pairs], task.owner.inputs[:_IMAGES])
        places = [asdict(Place.of(model, layer, norm, tuple(seen[layer].shape[1:]))) for layer, norm in pairs]
        images = {f"images/{layer}": inputs for layer, inputs in seen.items()}
        return {"places": places}, images if self.passports == "shuffle" else {}

    def _choose(self, model: nn.Module) -> list[tuple[str, str]]:
        pairs = {layer: norm for layer, norm in normalized_layers(model) if _fits(model, layer, norm)}
        unknown = sorted(set(self.layers) - set(pairs))
        if unknown:
            raise UnknownNameError("no such passport layer", expected=f"some of {list(pairs)}", found=unknown)
        if not pairs:
            raise UnsupportedError(
                "the model has no place for a passport",
                expected="a convolution or linear layer that a normalization with gamma and beta reads alone",
            )
        # the last ones, as the paper has it; the first sees raw inputs through few weights
        chosen = self.layers or (list(pairs)[1:] or list(pairs))[-3:]
        return [(layer, norm) for layer, norm in pairs.items() if layer in chosen]

    def places(self, secret: Secret) -> tuple[Place, ...]:
        """The passport layers, in forward order."""
        return secret.memo("places", lambda: tuple(Place.read(fact) for fact in secret.host["places"]))

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Passports ``LAYER/gamma`` and ``LAYER/beta`` for every layer."""

        def draw() -> dict[str, Tensor]:
            return {
                f"{place.layer}/{part}": self._passport(secret, place, part)
                for place in self.places(secret)
                for part in ("gamma", "beta")
            }

        return secret.memo("passports", draw)

    def signature(self, secret: Secret, device: torch.device | str = "cpu") -> Tensor:
        """What the signs of all gammas should be: (T,) of -1 and 1."""

        def draw() -> Tensor:
            bits = payload_bits(secret, sum(place.weight[0] for place in self.places(secret)))
            return torch.from_numpy(2.0 * bits - 1).float().to(device)

        return secret.memo(("signature", str(device)), draw)

    def _passport(self, secret: Secret, place: Place, part: str) -> Tensor:
        stream = secret.stream(f"{part} of {place.layer}")
        if self.passports == "random":
            values = 2 * stream.uniform(math.prod(place.inputs)) - 1
            return torch.from_numpy(values).float().reshape(place.inputs)
        images = secret.tensors.get(f"images/{place.layer}")
        if images is None or images.ndim < 2 or not images.numel():
            raise _unreadable(f"no images at {place.layer}")
        channels = images.shape[1]
        picks = torch.from_numpy(stream.integers(channels, channels))
        return images[torch.arange(channels) % len(images), picks]

    def directions(self, secret: Secret, device: torch.device | str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
        """For every norm, what its gamma and its beta are projections on; see `Place.direction`."""

        def make() -> dict[str, tuple[Tensor, Tensor]]:
            passports = self.derive(secret)
            return {place.norm: place.directions(passports, device) for place in self.places(secret)}

        return secret.memo(("directions", str(device)), make)

    def answers(self, model: nn.Module, secret: Secret) -> Affine:
        """What the layers of a live model make of the passports, with gradient.

        Raises:
            ModelMismatchError: the model lacks a passport layer, or has it in another form.
        """
        found: Affine = {}
        for place in self.places(secret):
            weight = weight_of(model, place)
            gamma, beta = self.directions(secret, weight.device)[place.norm]
            found[place.norm] = (answer(weight, gamma), answer(weight, beta))
        return found

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """The sign loss: ``strength * sum_c max(0, margin - gamma_c b_c) + 1e-5 |gamma|^2``."""
        gammas = torch.cat([gamma for gamma, _ in self.answers(model, secret).values()])
        signature = self.signature(secret, gammas.device)
        return self.strength * (self.margin - gammas * signature).relu().sum() + _SHRINK * gammas.square().sum()

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Agreeing signs against Bin(channels, 1/2), two-sided."""
        read, signature = self._read(suspect, secret), self.signature(secret).numpy() > 0
        matches = int((read == signature).sum())
        return score_of_bits(matches, len(read))

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        return payload_bytes(secret, self._read(suspect, secret))

    def _read(self, suspect: Suspect, secret: Secret) -> NDArray[np.uint8]:
        signs = []
        for place in self.places(secret):
            fits = functools.partial(_has_shape, tuple(place.weight))
            weight = read_host(suspect, f"{place.layer}.weight", fits, f"shape {place.weight}")
            signs.append(answer(weight, self.directions(secret)[place.norm][0]) >= 0)
        return torch.cat(signs).numpy().astype(np.uint8)

    def blind(self, secret: Secret) -> TensorMap:
        """Each passport layer without its answer to the passport of gamma; each of their norms with gamma 1."""
        gammas = {f"{p.layer}.weight": self.directions(secret)[p.norm][0] for p in self.places(secret)}
        norms = {f"{place.norm}.weight" for place in self.places(secret)}

        def hide(name: str, tensor: Tensor) -> Tensor:
            if name in norms:  # where the signs may stand once more
                return torch.ones_like(tensor)
            if name not in gammas:
                return tensor
            direction = gammas[name].to(tensor)
            length = direction.flatten(1).square().sum(1)
            share = answer(tensor, direction) / length.clamp_min(torch.finfo(tensor.dtype).tiny)
            return tensor - share.reshape(-1, *[1] * (tensor.ndim - 1)) * direction

        return hide

    @abstractmethod
    def private(self, model: nn.Module, secret: Secret) -> nn.Module:
        """A copy of a model or suspect that works by the passports, for measuring what they are worth in it.

        Raises:
            ModelMismatchError: the model lacks a passport layer, or has it in another form.
        """


def answer(weight: Tensor, direction: Tensor) -> Tensor:
    """<W_c, D_c> for each output channel: (o, ...) and (o, ...) to (o,)."""
    return (weight * direction).flatten(1).sum(1)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with some of its tensors replaced."""
    return rewrite_model(model, lambda name, tensor: tensors.get(name, tensor).detach().to(tensor))


class TwoBranches(Embedding):
    """Each batch goes through the model once more, by the passports; both branches share all weights.

    The loss gains the private branch's own and the sign loss.

    Args:
        scheme: which one.
        model: about to be trained.
        secret: of its `keygen`.
        task: tells the loss; the cross entropy in the user's own loop.
    """

    def __init__(self, scheme: PassportMark, model: nn.Module, secret: Secret, task: Task | None) -> None:
        super().__init__(scheme, secret)
        self.mark, self._private = scheme, _Bare(model)
        self._loss: Loss = task.loss if task else functional.cross_entropy
        self._beside: Batch | None = None
        scheme.answers(model, secret)  # a model of another form is refused before it is trained

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What the private branch has instead of the model's own, by name; buffers are updated in place."""
        return named(self.mark.answers(model, self.secret))

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The scheme's, kept for the private branch."""
        self._beside = super().extra(batch, rng)
        return self._beside

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """The private branch's loss and the sign loss."""
        rows = batch if self._beside is None else batch.join(self._beside)
        tensors = {f"model.{name}": tensor for name, tensor in self.tensors(model).items()}
        answers = torch.func.functional_call(self._private, tensors, (rows.inputs,))
        return self._loss(answers, rows.targets) + super().term(model, batch)


class _Bare(nn.Module):
    """A model called without its own hooks, which belong to the public branch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        return self.model.forward(inputs)


def named(affine: Affine) -> dict[str, Tensor]:
    """Gammas and betas by the names of the tensors that they stand for."""
    gammas = {f"{norm}.weight": gamma for norm, (gamma, _) in affine.items()}
    return gammas | {f"{norm}.bias": beta for norm, (_, beta) in affine.items()}


def _unreadable(found: object) -> ForgedSecretError:
    return ForgedSecretError("the secret's passport layers cannot be read", expected="those of bind", found=found)


def keepers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that keep running statistics, which two branches cannot share."""
    return {name: m for name, m in model.named_modules() if getattr(m, "running_mean", None) is not None}


def _fits(model: nn.Module, layer: str, norm: str) -> bool:
    module, affine = model.get_submodule(layer), model.get_submodule(norm)
    if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):  # transposed ones have their outputs elsewhere
        return False
    parts = (getattr(affine, "weight", None), getattr(affine, "bias", None))
    width = model.get_parameter(f"{layer}.weight").shape[:1]
    return all(part is not None and part.shape == width for part in parts)


def _has_shape(shape: tuple[int, ...], info: TensorInfo) -> bool:
    return bool(info.shape == shape)


def _geometry(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {}
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in geometry.items()}


def _inputs(model: nn.Module, layers: list[str], rows: Tensor) -> dict[str, Tensor]:
    """What each layer gets to see of the rows."""
    names, seen = {model.get_submodule(layer): layer for layer in layers}, {}

    def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[names[module]] = inputs[0].to("cpu", torch.float32)

    with ExitStack() as stack, evaluating(model) as device:
        for module in names:
            stack.callback(module.register_forward_pre_hook(listen).remove)
        model(rows.to(device))
    return seen


def weight_of(model: nn.Module, place: Place) -> Tensor:
    """The weight of a passport layer in a live model.

    Raises:
        ModelMismatchError: the model lacks it, or has it in another form.
    """
    modules = dict(model.named_modules())
    weight = getattr(modules.get(place.layer), "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != place.weight or place.norm not in modules:
        raise ModelMismatchError(
            "the model has another form",
            expected=f"{place.layer}.weight of shape {place.weight}, then {place.norm}",
            found=None if weight is None else tuple(weight.shape),
        )
    return weight
