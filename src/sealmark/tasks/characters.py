"""A small language model: the next character of scikit-learn's dataset descriptions."""

from __future__ import annotations

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn

from sealmark.core.task import Batch, Recipe, Task

_CONTEXT, _BLOCK, _STRIDE = 12, 200, 2
_SOURCES = ("iris", "wine", "breast_cancer", "digits", "diabetes", "linnerud")


class CharacterModel(nn.Module):
    """An embedding, a recurrent layer of gates, and a linear layer: 50,000 parameters.

    Inputs (N, 12) int64, characters by their number; outputs (N, K) logits of the next one.

    Args:
        kinds: K, different characters.
        width: of the recurrent layer.
    """

    def __init__(self, kinds: int, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(kinds, 32)
        self.recur = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, kinds)

    def forward(self, contexts: Tensor) -> Tensor:
        """Logits of the next character."""
        states, _ = self.recur(self.embed(contexts))
        logits: Tensor = self.head(states[:, -1])
        return logits


def text() -> str:
    """The descriptions, one after the other."""
    return "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in _SOURCES)


def task() -> Task:
    """Blocks of 200 characters are dealt out: three fifths to the owner, one each to the attacker and the test.

    Example:
        >>> characters = task()
        >>> tuple(characters.owner.inputs.shape[1:]), characters.owner.inputs.dtype
        ((12,), torch.int64)
    """
    letters = text()
    alphabet = sorted(set(letters))
    numbers = torch.tensor([alphabet.index(letter) for letter in letters])
    blocks = [numbers[start : start + _BLOCK] for start in range(0, len(numbers) - _BLOCK + 1, _BLOCK)]
    dealt = np.random.default_rng(0).permutation(len(blocks)) % 5
    parts = [_windows([b for b, hand in zip(blocks, dealt, strict=True) if hand in hands]) for hands in _HANDS]
    return Task(
        name="characters",
        make=lambda: CharacterModel(len(alphabet)),
        owner=parts[0],
        attacker=parts[1],
        test=parts[2],
        classes=len(alphabet),
        chance=0.22,  # the space
        recipe=Recipe(epochs=4, batch_size=64, rate=0.5, clip=1.0, weight_decay=0.0),
    )


_HANDS = ((0, 1, 2), (3,), (4,))


def _windows(blocks: list[Tensor]) -> Batch:
    rows = torch.cat([block.unfold(0, _CONTEXT + 1, _STRIDE) for block in blocks])
    return Batch(rows[:, :-1].contiguous(), rows[:, -1].contiguous())
