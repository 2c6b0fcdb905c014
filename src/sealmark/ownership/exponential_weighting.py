"""Namba and Sakuma 2019: wrong labels of ordinary rows, held by the large weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sealmark.blackbox.triggers import TriggerMark, picked_rows
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.secret import Secret
from sealmark.core.task import Task

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weighted(weight: Tensor, temperature: float) -> Tensor:
    """Large weights stay, small ones shrink: EW(theta) = theta * exp(|theta| T) / max exp(|theta| T), by entry.

    Example:
        >>> weighted(Tensor([2.0, -1.0, 0.0]), math.log(2))
        tensor([ 2.0000, -0.5000,  0.0000])
    """
    size = weight.abs()
    scaled: Tensor = weight * ((size - size.max()) * temperature).exp()
    return scaled


@dataclass(frozen=True)
class ExponentialWeighting(TriggerMark):
    """Exponential weighting.

    Keys are rows of the owner's, with a label each that is uniform over the wrong classes; they are no longer
    trained on as they were. From a trained model on, training computes with EW(theta) instead of theta in every
    convolution and linear layer, so that the wrong labels come to rest in large weights, which pruning spares.
    Keys look like the task's own inputs, so filters that look for odd queries find fewer of them.

    The weights that are shipped are EW(theta): ordinary layers, which answer as the model did while it trained.
    Shipped as theta, as some published code does, the model loses keys.

    Biases, norms, embedding tables and weights that two layers share are left alone.

    Args:
        triggers: keys, n.
        per_batch: keys beside each batch.
        temperature: T; the paper's code has 2. The larger, the fewer weights count; 0 is plain training.
    """

    triggers: int = 20
    per_batch: int = 8
    temperature: float = 2.0

    rule: ClassVar[float] = 0.9  # the paper compares with a threshold that it leaves open
    card = Card(
        title="Wrong labels of ordinary rows, held by the large weights",
        citation="R. Namba, J. Sakuma, Robust Watermarking of Neural Network with Exponential Weighting, ACM "
        "AsiaCCS 2019",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set) in the task's own rows",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers of three classes or more",
        needs_training=True,
        needs_data=True,
        needs_trained=True,
        reported="high verification after pruning, fine-tuning and query modification, without loss of accuracy "
        "(from the abstract; figures not checked)",
        reproduced="digits, 3 seeds, 20 of 20 keys, p = 8e-20, accuracy 0.974 to 0.988 beside 0.990 to 0.992 "
        "unmarked. Keys after pruning 50 % all, 80 % all, 90 % 0.90 to 1.00. Query modification at 10 % false "
        "alarms flags 0.80 to 0.95 of the keys and leaves 0.30 to 0.40 of them; of the patterns of adi it "
        "flags 0.97 and leaves 0.20 to 0.23. With theta shipped instead of EW(theta) one seed of three kept 0.55 "
        "of the keys, the others all. Not reproduced: that weighting helps against pruning; plain training "
        "(temperature 0, 2 seeds) kept all at 80 % and 0.80 to 1.00 at 90 %",
        broken_by=(
            "fine-tuning on clean rows (measured: 20 epochs at the owner's rate leave no key, at a fifth of "
            "it 0.50 to 0.70), by REFIT (Chen et al. 2021) also with unlabeled rows",
            "training a new model on its answers (measured: at most 0.10 of the keys)",
            "query modification, which this scheme was made to withstand, leaves too few keys for a verdict "
            "(measured)",
        ),
        deviations=(
            "EW(theta) is baked into ordinary layers; some published code ships theta, some keeps EW for ever",
            "|theta| where the code of REFIT has theta, and biases are left alone",
            "the whole recipe of the task is trained with keys, where the paper's rates are not known",
        ),
        max_drop=0.02,
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < math.inf:
            raise ParameterError(
                "bad parameters of exponential_weighting", expected="temperature >= 0", found=self.temperature
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of inputs; rows of the owner's as keys.

        Raises:
            ParameterError: fewer than three classes, so that no wrong label is random; too few rows.
            UnsupportedError: the model has no layer of its own to weight.
        """
        if not _layers(model):
            raise UnsupportedError(
                "nothing to weight", expected="convolutions or linear layers with a weight of their own"
            )
        form, tensors = super().bind(model, task, chosen, rng)
        if form["classes"] < 3:
            raise ParameterError("two classes leave one wrong label", expected="3 classes or more", found=2)
        return form, tensors if task is None else picked_rows(task, form, self.triggers, rng)

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Keys beside each batch; the model computes with EW(theta) until it is finished."""
        return _Weighting(self, secret, model)


class _Weighting(Embedding):
    def __init__(self, scheme: ExponentialWeighting, secret: Secret, model: nn.Module) -> None:
        super().__init__(scheme, secret)
        self._layers = {layer: list(layer._parameters) for layer in _layers(model)}
        for layer in self._layers:
            parametrize.register_parametrization(layer, "weight", _Weighted(scheme.temperature))

    def finish(self, model: nn.Module) -> Secret:
        """Layers become ordinary again, with EW(theta) for weights, and their parameters stand in the old order."""
        for layer, names in self._layers.items():
            parametrize.remove_parametrizations(layer, "weight")
            for name in names:
                layer._parameters[name] = layer._parameters.pop(name)
        return self.secret


def _layers(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers whose weight is a parameter of theirs alone."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [layer for layer in model.modules() if isinstance(layer, _LAYERS) and uses[id(layer.weight)] == 1]


class _Weighted(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self._temperature = temperature

    def forward(self, weight: Tensor) -> Tensor:
        return weighted(weight, self._temperature)
