"""What many tests share: one thread, the digits, a plain model, a small task, a seeded generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from sealmark.core import registry
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task

torch.set_num_threads(1)
settings.register_profile("sealmark", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("sealmark")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def digits() -> Task:
    return registry.task("digits")


@pytest.fixture(scope="session")
def plain(digits: Task) -> nn.Module:
    """The digits model that its owner would train without sealmark; do not change it."""
    return train_task(digits, rng=np.random.default_rng(0)).eval()


@pytest.fixture(scope="session")
def toy() -> Task:
    """Is the first of four numbers positive? A net of 178 parameters learns it in milliseconds."""
    inputs = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))
    rows = Batch(inputs, (inputs[:, 0] > 0).long())
    return Task(
        name="toy",
        make=lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)),
        owner=rows.take(slice(0, 64)),
        attacker=rows.take(slice(64, 128)),
        test=rows.take(slice(128, None)),
        classes=2,
        chance=0.5,
        recipe=Recipe(epochs=10, batch_size=16, rate=0.1),
    )
