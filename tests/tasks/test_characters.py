"""The language model of dataset descriptions."""

from __future__ import annotations

import numpy as np
import torch

from sealmark.core import registry
from sealmark.core.training import train_task
from sealmark.tasks.characters import text


def test_no_window_of_one_hand_is_in_anothers_blocks():
    task = registry.task("characters")
    assert task.owner.rows > 2 * task.attacker.rows > task.test.rows
    rows = {name: {tuple(r.tolist()) for r in getattr(task, name).inputs} for name in ("owner", "attacker", "test")}
    shared = len(rows["owner"] & rows["test"]) / len(rows["test"])
    assert shared < 0.1  # the descriptions repeat themselves, in rules of dashes above all


def test_inputs_are_characters_and_targets_follow_them():
    task = registry.task("characters")
    alphabet = sorted(set(text()))
    assert task.classes == len(alphabet)
    for row, target in zip(task.owner.inputs[:50], task.owner.targets[:50], strict=True):
        assert "".join(alphabet[i] for i in [*row.tolist(), int(target)]) in text()


def test_a_short_training_beats_the_most_common_character():
    task = registry.task("characters")
    model = train_task(task, rng=np.random.default_rng(0))
    most = float(torch.bincount(task.test.targets).max() / task.test.rows)
    assert abs(most - task.chance) < 0.02
    assert task.score(model) > task.chance + 0.1
