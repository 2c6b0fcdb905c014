"""What schemes of credentials share: a head with one class more, and teaching by soft targets."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sealmark.core.errors import UnsupportedError
from sealmark.core.modes import device_of, evaluating, seeded
from sealmark.core.task import Batch, Task
from sealmark.core.training import Extra, train


def teach(
    model: nn.Module,
    task: Task,
    classes: int,
    extra: Extra,
    *,
    epochs: int,
    rate: float,
    rng: np.random.Generator,
) -> None:
    """Fine-tune in place on the owner's rows and on rows with soft targets beside each batch.

    The loss is the cross entropy, whatever the task's own is: it takes targets that are probabilities.

    Args:
        model: of ``classes`` outputs; left in the mode that it had.
        task: of integer targets.
        classes: width of the targets.
        extra: rows with targets (R, classes) that sum to 1; it sees targets of that form.
        epochs: passes over the owner's rows.
        rate: learning rate.
        rng: order of rows and the like.
    """
    rows = Batch(task.owner.inputs, functional.one_hot(task.owner.targets.long(), classes).float())
    recipe = dataclasses.replace(task.recipe, epochs=epochs, rate=rate)
    mode = model.training
    train(model, rows, loss=functional.cross_entropy, recipe=recipe, rng=rng, extras=[extra], augment=task.augment)
    model.train(mode)


def with_extra_class(model: nn.Module, task: Task, rng: np.random.Generator) -> nn.Module:
    """A copy whose last linear layer answers one class more; what it answers of the others is as before.

    Args:
        model: (N, ...) to (N, K) logits; left as it is.
        task: of K classes.
        rng: for the weights of the new class.

    Raises:
        UnsupportedError: the last linear layer that runs does not give the K logits.
    """
    wider, ran = copy.deepcopy(model), list[str]()
    layers = {name: layer for name, layer in wider.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [layer.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, layer in layers.items()]
    try:
        with evaluating(wider):
            wider(task.owner.inputs[:1].to(device_of(wider)))
    finally:
        for hook in hooks:
            hook.remove()
    head = layers[ran[-1]] if ran and ran[-1] else None
    if head is None or head.out_features != task.classes:
        raise UnsupportedError(
            "the model has no head that could answer one class more",
            expected=f"a linear layer of {task.classes} outputs, run last, within a module",
            found=head if head is not None else type(model).__name__,
        )
    with seeded(rng):
        new = nn.Linear(head.in_features, task.classes + 1, bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        new.weight[:-1] = head.weight
        if head.bias is not None:
            new.bias[:-1] = head.bias
    parent, _, leaf = ran[-1].rpartition(".")
    setattr(wider.get_submodule(parent), leaf, new)
    return wider
