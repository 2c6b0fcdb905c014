"""What coalitions make of their words: the strategies against which a code is measured.

Where all copies agree nobody can know the other symbol, and all strategies keep what they have (the marking
assumption of Boneh and Shaw, IEEE Trans. IT 44, 1998). Where they differ anything goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.float64]
Strategy = Callable[[NDArray[np.int64], int, np.random.Generator], Symbols]


def majority(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:
    """What most copies have; a coin decides a tie."""
    return np.sign(2 * ones - size + rng.uniform(-0.5, 0.5, len(ones)))


def minority(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:
    """What fewest copies have."""
    return _marked(ones, size, -majority(ones, size, rng))


def interleaving(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:
    """That of a copy drawn anew at each position."""
    return _signs(rng.uniform(size=len(ones)) < ones / size)


def all_ones(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:  # noqa: ARG001
    """A 1 wherever one is to be had."""
    return _signs(ones > 0)


def coin(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:
    """A fair coin where copies differ."""
    return _marked(ones, size, _signs(rng.uniform(size=len(ones)) < 0.5))


def average(ones: NDArray[np.int64], size: int, rng: np.random.Generator) -> Symbols:  # noqa: ARG001
    """The mean, which a soft reading sees."""
    return 2 * ones / size - 1


STRATEGIES: Mapping[str, Strategy] = {
    "majority": majority,
    "minority": minority,
    "interleaving": interleaving,
    "all ones": all_ones,
    "averaging": average,
    "random": coin,
}


def pool(words: NDArray[np.uint8], strategy: Strategy, rng: np.random.Generator) -> Symbols:
    """The symbols that a coalition's word shows: (c, L) of 0 and 1, to (L,) from -1 to +1.

    Example:
        >>> words = np.array([[0, 0, 1, 1], [0, 1, 0, 1]], np.uint8)
        >>> rng = np.random.default_rng(0)
        >>> pool(words, all_ones, rng).tolist(), pool(words, average, rng).tolist()
        ([-1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0])
    """
    return strategy(words.sum(0, dtype=np.int64), len(words), rng)


def _signs(bits: NDArray[np.bool_]) -> Symbols:
    return np.where(bits, 1.0, -1.0)


def _marked(ones: NDArray[np.int64], size: int, chosen: Symbols) -> Symbols:
    return np.where(ones == 0, -1.0, np.where(ones == size, 1.0, chosen))
