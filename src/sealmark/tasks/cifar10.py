"""CIFAR-10 with a ResNet-9 of 413,000 parameters; the data lies outside the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.task import Batch, Recipe, Task
from sealmark.tasks._stored import stored_images

_OWNER = 45_000
_PAD = 4


def _block(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=False),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    """Eight convolutions in two residual pairs, and a linear layer.

    Inputs (N, 3, 32, 32), outputs (N, 10) logits.

    Args:
        width: channels of the first convolution; the last has eight times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem, self.block1 = _block(3, w), _block(w, 2 * w, pool=True)
        self.res1 = nn.Sequential(_block(2 * w, 2 * w), _block(2 * w, 2 * w))
        self.block2, self.block3 = _block(2 * w, 4 * w, pool=True), _block(4 * w, 8 * w, pool=True)
        self.res2 = nn.Sequential(_block(8 * w, 8 * w), _block(8 * w, 8 * w))
        self.fc = nn.Linear(8 * w, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        x = self.block1(self.stem(images))
        x = x + self.res1(x)
        x = self.block3(self.block2(x))
        x = x + self.res2(x)
        logits: Tensor = self.fc(x.amax((2, 3)))
        return logits


def augment(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each image shifted by up to four pixels and mirrored at random; what moves in is black."""
    images, count = batch.inputs, batch.rows
    size = images.shape[-1]
    padded = nn.functional.pad(images, (_PAD,) * 4)
    shifts = torch.from_numpy(rng.integers(0, 2 * _PAD + 1, (2, count, 1))).to(images.device)
    line = torch.arange(size, device=images.device)
    rows, columns = shifts[0] + line, shifts[1] + line
    mirrored = torch.from_numpy(rng.random(count) < 0.5).to(images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    which = torch.arange(count, device=images.device)
    moved = padded.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return Batch(moved.permute(0, 3, 1, 2), batch.targets)


def task() -> Task:
    """The CIFAR-10 task: 45,000 rows of the owner's, 5,000 of the attacker's, the 10,000 test rows.

    Pixels are in -1 .. 1. The recipe is 8 epochs in mixed precision.

    Raises:
        ParameterError: ``SEALMARK_DATA`` names no folder with the data.
    """
    splits = {name: stored_images("cifar10", name) for name in ("train", "test")}
    train, test = (Batch(images.float().div(127.5).sub(1), labels) for images, labels in splits.values())
    order = torch.randperm(train.rows, generator=torch.Generator().manual_seed(0))
    return Task(
        name="cifar10",
        make=ResNet9,
        owner=train.take(order[:_OWNER]),
        attacker=train.take(order[_OWNER:]),
        test=test,
        classes=10,
        chance=0.1,
        recipe=Recipe(epochs=8, batch_size=128, rate=0.1, weight_decay=1e-3, clip=1.0, bfloat16=True),
        augment=augment,
    )
