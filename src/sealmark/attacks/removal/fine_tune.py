"""Fine-tuning: train the stolen model on, all of it or its head, and hope that the mark washes out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from sealmark.core.attack import Modification, Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.modes import device_of, evaluating, seeded
from sealmark.core.training import train, train_task


@dataclass(frozen=True)
class FineTune(Modification):
    """The fine-tuning family: FTAL, FTLL, RTAL and RTLL of Adi et al.

    ======  ===========  ==============
    name    ``layers``   ``reset_last``
    ======  ===========  ==============
    FTAL    all          False
    FTLL    last         False
    RTAL    all          True
    RTLL    last         True
    ======  ===========  ==============

    When the head alone is trained, the body stays in evaluation mode: else the running statistics of
    its normalization layers would change it all the same. The head is the last layer that runs, which
    need not be the last that was declared.

    Args:
        epochs: passes over the attacker's rows.
        rate: learning rate, decayed to 0 along half a cosine. The rate is the attack: sweep it from
            1e-4 to 1e-1 and report mark against accuracy, never one point.
        layers: ``all`` or ``last``.
        reset_last: start with a fresh head.

    Raises:
        ParameterError: other layers, or epochs or a rate that are not positive.

    Example:
        >>> FineTune(epochs=10, layers="last", reset_last=True).name
        'fine_tune'
    """

    epochs: int = 5
    rate: float = 0.01
    layers: Literal["all", "last"] = "all"
    reset_last: bool = False

    card = AttackCard(
        title="Fine-tuning, of all layers or of the last, with or without a fresh head",
        citation="Y. Uchida et al., ICMR 2017; Y. Adi, C. Baum, M. Cisse, B. Pinkas, J. Keshet, Turning Your "
        "Weakness Into a Strength, USENIX Security 2018",
        goal="remove a mark, or make a locked model work",
        knowledge="the weights and labeled rows of the task",
        level=1,
        needs_data=True,
        parameters="epochs 5 to 60, rate 1e-4 to 1e-1, layers all or last, reset_last",
    )

    def __post_init__(self) -> None:
        if self.layers not in ("all", "last") or self.epochs < 1 or not self.rate > 0:
            raise ParameterError(
                "bad parameters of fine_tune",
                expected="layers all or last, epochs >= 1, rate > 0",
                found=(self.layers, self.epochs, self.rate),
            )

    def modify(
        self, copies: list[nn.Module], resources: Resources, rng: np.random.Generator
    ) -> tuple[nn.Module, int]:
        """See `Modification.modify`.

        Raises:
            UnsupportedError: a head is asked for, and the model has none that can be told or reset.
            MarkFailedError: the training diverged.
        """
        model = copies[0].requires_grad_(True)
        whole = self.layers == "all"
        head = model if whole and not self.reset_last else head_of(model, resources.rows.inputs)
        if self.reset_last:
            with seeded(rng):
                head.reset_parameters()  # type: ignore[operator]  # head_of saw that it has one
        report = train(
            model if whole else _HeadAlone(model, head),
            resources.rows,
            loss=resources.task.loss,
            recipe=dataclasses.replace(resources.task.recipe, epochs=self.epochs, rate=self.rate),
            rng=rng,
            parameters=None if whole else list(head.parameters()),
        )
        return model.eval(), report.rows

    def scratch(self, resources: Resources, rng: np.random.Generator) -> nn.Module:
        """A fresh model, trained on the same rows for as many epochs, at the task's own rate."""
        recipe = dataclasses.replace(resources.task.recipe, epochs=self.epochs)
        return train_task(
            resources.task, rng=rng, rows=resources.rows, recipe=recipe, device=resources.device
        ).eval()


def head_of(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The last layer with a weight tensor that runs when ``model`` answers ``inputs`` (N, ...).

    Raises:
        UnsupportedError: no layer with a weight of two or more dimensions that can be reset runs.
    """
    ran: list[nn.Module] = []
    layers = [module for module in model.modules() if _is_layer(module)]
    hooks = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in layers]
    try:
        with evaluating(model):
            model(inputs[:1].to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise UnsupportedError(
            "the model has no head to fine-tune",
            expected="a linear or convolutional layer",
            found=type(model).__name__,
            advice="pass layers='all' and reset_last=False",
        )
    return ran[-1]


def _is_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2 and hasattr(module, "reset_parameters")


class _HeadAlone(nn.Module):
    """A model of which the head alone goes to training mode."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def train(self, mode: bool = True) -> _HeadAlone:
        super().train(False)
        self.head.train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        return outputs
