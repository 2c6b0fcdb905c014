"""REEF (Zhang et al. 2024): do two networks represent the same inputs alike?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sealmark.core.activations import activations
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Task
from sealmark.ownership._lineage import Lineage, Source
from sealmark.ownership._transformer import unbiased_cka


@dataclass(frozen=True)
class Reef(Lineage):
    """Linear CKA of one layer's activations on the same inputs; the original's are kept.

    Ours: noise inputs from a fixed generator, where the paper asks true or false statements: on inputs of
    the task, independent small nets agree too. The unbiased estimator: the biased one is near 1 for
    unrelated activations wider than the number of inputs. No standardization of single dimensions, which
    destroys the invariance to rotation. p by rank among unrelated models. Any net with a live model.

    Args:
        inputs: how many; the paper has 200.
        layer: name of a module; the last one with parameters before the output layer where empty.
    """

    inputs: int = 200
    layer: str = ""

    access = Access.MODULE
    card = Card(
        title="Activations compared on the same inputs",
        citation="J. Zhang, D. Liu, C. Qian, L. Zhang, Y. Liu, Y. Qiao, J. Shao, REEF: Representation Encoding "
        "Fingerprints for Large Language Models, arXiv 2410.14273",
        function=("ownership",),
        scenario="white-box",
        mechanism="representation fingerprint: unbiased CKA of activations",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="any network that can be run",
        needs_training=False,
        needs_data=False,
        reported="CKA of 0.9 and more for derived models, low for unrelated ones (from memory, not checked "
        "against the paper)",
        reproduced="small transformers, unrelated ones within 0.1: 0.72 after fine-tuning, 0.97 after pruning 50 "
        "%, 1 permuted; all-MiniLM-L6-v2: 0.59, 0.61, 1, untrained nets within 0.02; weights in a rotated basis "
        "0.01. Convolutional nets for digits: independent ones agree up to 0.65 (docs/results/lineage.md)",
        broken_by=(
            "independent models of the same task represent its inputs alike: without unrelated models of the same "
            "kind to compare with, it says nothing",
            "training a new model on its answers",
        ),
        grade="research",
        deviations=("noise inputs", "unbiased CKA, no standardization", "rank among unrelated models"),
    )

    def __post_init__(self) -> None:
        if self.inputs < 8:
            raise ParameterError("bad parameters of reef", expected="inputs >= 8", found=self.inputs)

    def record(self, model: Source, task: Task | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The noise, and what the layer says of it."""
        if task is None or not isinstance(model, nn.Module):
            raise ParameterError(
                "reef runs a live model on inputs of a task's form", expected="a module and a task"
            )
        layer = self.layer or _penultimate(model)
        noise = _noise(task.test.inputs, self.inputs)
        return {"layer": layer}, {"noise": noise, "features": _features(model, layer, noise)}

    def similarity(self, suspect: Suspect, host: Mapping[str, Any], kept: Mapping[str, Tensor]) -> float:
        """CKA, near 0 for unrelated activations, 1 for the same up to rotation and scale.

        Raises:
            AccessError: the suspect is no live model.
            ModelMismatchError: it has no such layer or takes other inputs.
        """
        suspect.require(Access.MODULE)
        model = suspect.model if isinstance(suspect, WhiteBox) else nn.Identity()
        return unbiased_cka(kept["features"], _features(model, host["layer"], kept["noise"]))


def _features(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    found = activations(model, layer, inputs).float()
    if found.ndim == 4:
        found = found.mean((2, 3))
    return found.mean(1) if found.ndim == 3 else found.flatten(1)


def _noise(inputs: Tensor, count: int) -> Tensor:
    """Uniform in the range of the task's inputs: the same for everyone, for nothing here is secret."""
    generator = torch.Generator().manual_seed(0)
    low, high = inputs.min(), inputs.max()
    if not inputs.is_floating_point():
        return torch.randint(int(low), int(high) + 1, (count, *inputs.shape[1:]), generator=generator)
    return low + (high - low) * torch.rand((count, *inputs.shape[1:]), generator=generator)


def _penultimate(model: nn.Module) -> str:
    leaves = [
        name
        for name, module in model.named_modules()
        if name and not [*module.children()] and [*module.parameters(recurse=False)]
    ]
    if len(leaves) < 2:
        raise ParameterError("no hidden layer", expected="a network of two layers or more", found=leaves)
    return str(leaves[-2])
