"""The digits in words."""

from __future__ import annotations

import numpy as np
import torch

from sealmark.core import registry
from sealmark.core.symmetry.structure import units_of
from sealmark.core.training import train_task
from sealmark.tasks.tokens import sentences


def test_neighboring_pixels_are_one_word():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 0, 0], image[0, 0, 0, 1], image[0, 0, 7, 7] = 1, 0.5, 0.25
    words = sentences(image)
    assert words.shape == (1, 32)
    assert words[0, 0] == 16 * 17 + 8
    assert words[0, 31] == 4
    assert words[0, 1:31].sum() == 0


def test_the_transformer_learns_to_read():
    task = registry.task("tokens")
    model = train_task(task, rng=np.random.default_rng(0))
    assert task.score(model) > 0.5
    assert task.score(task.model(np.random.default_rng(0))) < 0.2


def test_its_residual_stream_and_hidden_units_are_found():
    layers = {units.layer for units in units_of(registry.task("tokens").model(np.random.default_rng(0)))}
    assert "embed_tokens" in layers
    assert "layers.0.up_proj" in layers
