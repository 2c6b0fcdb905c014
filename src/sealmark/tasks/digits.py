"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, ten classes, no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sealmark.core.task import Batch, Recipe, Task

_OWNER, _ATTACKER = 900, 400


class DigitsNet(nn.Module):
    """Three convolutions with batch normalization, two linear layers: 155,000 parameters.

    The net of the method cards. Inputs (N, 1, 8, 8) in [0, 1], outputs (N, 10) logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(1024, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        x = self.norm1(self.conv1(images)).relu()
        x = nn.functional.max_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        x = self.norm3(self.conv3(x)).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


def task() -> Task:
    """The digits task: 900 rows of the owner's, 400 of the attacker's, 497 for judging.

    The split is one fixed shuffle, so that every seed of everything else sees the same rows.

    Example:
        >>> digits = task()
        >>> tuple(digits.owner.inputs.shape), digits.test.rows
        ((900, 1, 8, 8), 497)
    """
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = Batch(
        torch.from_numpy(images).float().reshape(-1, 1, 8, 8).div(16)[order],
        torch.from_numpy(labels).long()[order],
    )
    return Task(
        name="digits",
        make=DigitsNet,
        owner=rows.take(slice(0, _OWNER)),
        attacker=rows.take(slice(_OWNER, _OWNER + _ATTACKER)),
        test=rows.take(slice(_OWNER + _ATTACKER, None)),
        classes=10,
        chance=0.1,
        recipe=Recipe(epochs=15, batch_size=64, rate=0.05, clip=1.0),
    )
