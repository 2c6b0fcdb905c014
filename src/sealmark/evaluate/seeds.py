"""Repeating a measurement from several seeds, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

_Found = TypeVar("_Found")


def over_seeds(measure: Callable[[int], _Found], seeds: Sequence[int], workers: int = 1) -> list[_Found]:
    """What ``measure`` finds from each seed, in their order.

    Args:
        measure: can be pickled, where there are several workers.
        seeds: one independent repetition each.
        workers: processes, one seed in each at a time.

    Example:
        >>> over_seeds(abs, [-1, 2])
        [1, 2]
    """
    if workers == 1:
        return [measure(seed) for seed in seeds]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [task.result() for task in [pool.submit(measure, seed) for seed in seeds]]
