"""The steps of the main job, as the demo and the figures both take them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Cost, Modification, Resources
from sealmark.core.errors import ArtifactError, PolicyError, SealmarkError
from sealmark.core.evidence import Evidence
from sealmark.core.lock import Lock
from sealmark.core.modes import device_of
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, BlackBox, Suspect, WhiteBox
from sealmark.core.task import Recipe, Task
from sealmark.core.weights import ModelWeights, weights_of
from sealmark.evaluate.metrics import attacker_gain

Marks = Mapping[str, tuple[Watermark, Secret]]

USEFUL_MARGIN = 0.05  # how far above chance a locked model may stay


def generator(seed: int, label: str) -> np.random.Generator:
    """The randomness of one step: another step, added or left out, does not change it.

    Example:
        >>> generator(0, "plain").bytes(4) == generator(0, "plain").bytes(4)
        True
    """
    return np.random.default_rng([seed, *label.encode()])


def owner_recipe(task: Task, epochs: int = 30) -> Recipe:
    """The task's recipe, long enough for several marks at once."""
    return dataclasses.replace(task.recipe, epochs=epochs)


def new_marks(schemes: Sequence[str], model: nn.Module, task: Task, seed: int, owner: str = "") -> Marks:
    """A fresh secret for each watermark, by the scheme's name."""
    marks = {}
    for name in schemes:
        scheme = cast("Watermark", registry.scheme(name))
        secret = scheme.keygen(model, task, owner=owner, rng=generator(seed, f"secret {name}"))
        marks[name] = (scheme, secret)
    return marks


def view(needed: Access, model: nn.Module) -> Suspect:
    """No more of the model than a scheme needs: its labels alone where those suffice."""
    if needed == Access.LABELS:
        return BlackBox(WhiteBox(model).labels, returns="label")
    return WhiteBox(model)


def verify(marks: Marks, model: nn.Module) -> dict[str, Evidence]:
    """Ask each watermark whether ``model`` carries it."""
    return {name: scheme.verify(view(scheme.access, model), secret) for name, (scheme, secret) in marks.items()}


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    return weights_of(one).digest() == weights_of(other).digest()


@dataclass(frozen=True)
class LockFigures:
    """What a lock does to a model that was handed out.

    Attributes:
        authorized: the metric with the right key.
        no_key: the metric as shipped; None where the lock refuses.
        wrong_keys: the metric with each wrong key; empty where all are refused.
        refused: how many wrong keys were refused.
        exact: whether the right key gives the same bits back.
    """

    authorized: float
    no_key: float | None
    wrong_keys: tuple[float, ...]
    refused: int
    exact: bool


def lock_figures(lock: Lock, model: nn.Module, task: Task, seed: int, wrong: int = 5) -> LockFigures:
    """Lock ``model`` and use it with the right key, with none, and with ``wrong`` other keys."""
    locked = lock.lock(model, task, rng=generator(seed, f"key {lock.name}"))
    opened = lock.unlock(locked.model, locked.key)
    wrong_keys, refused = [], 0
    for index in range(wrong):
        key = lock.lock(model, task, rng=generator(seed, f"wrong key {lock.name} {index}")).key
        score = _score_or_refusal(lambda key=key: lock.unlock(locked.model, key), task)  # type: ignore[misc]
        if score is None:
            refused += 1
        else:
            wrong_keys.append(score)
    return LockFigures(
        authorized=task.score(opened),
        no_key=_score_or_refusal(lambda: locked.model, task),
        wrong_keys=tuple(wrong_keys),
        refused=refused,
        exact=same_bits(opened, model),
    )


def _score_or_refusal(make: Callable[[], nn.Module], task: Task) -> float | None:
    try:
        return task.score(make())
    except PolicyError:
        return None


@dataclass(frozen=True)
class AttackFigures:
    """What an attack left, what it cost, and what it was worth.

    Attributes:
        model: the surrogate.
        accuracy: its metric.
        scratch: the metric of what the same attacker trains from a random start.
        gain: (accuracy - scratch) / (plain - scratch); None where plain is no better than scratch.
        cost: see `Cost`.
    """

    model: nn.Module
    accuracy: float
    scratch: float
    gain: float | None
    cost: Cost


def attack_figures(
    attack: Modification,
    target: nn.Module | Sequence[nn.Module],
    task: Task,
    plain: float,
    seed: int,
    *,
    share: float = 1.0,
) -> AttackFigures:
    """Run an attack, and the same attacker from a random start.

    Args:
        attack: which.
        target: a model, or the copies of several users.
        task: tells the attacker's rows and the metric.
        plain: the metric of the unprotected model.
        seed: of the attacker.
        share: of the task's attacker rows that he has.
    """
    first = target if isinstance(target, nn.Module) else target[0]
    resources = Resources.of(task, share, device=device_of(first))
    result = attack.run(target, resources, rng=generator(seed, f"attack {attack}"))
    scratch = task.score(attack.scratch(resources, generator(seed, f"scratch {attack}")))
    accuracy = task.score(result.model)
    return AttackFigures(result.model, accuracy, scratch, attacker_gain(accuracy, scratch, plain), result.cost)


def flip_bit(model: nn.Module, rng: np.random.Generator) -> tuple[nn.Module, str]:
    """A copy of ``model`` with one random bit of its floating-point tensors flipped, and in which tensor."""
    changed = copy.deepcopy(model)
    weights = ModelWeights(changed)
    names = [name for name in weights if weights.info[name].is_float]
    sizes = np.array([weights.info[name].count for name in names], np.float64)
    name = names[int(rng.choice(len(names), p=sizes / sizes.sum()))]
    data = weights[name].view(-1).view(torch.uint8)  # shares the model's memory
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return changed, name


def refuses(action: Callable[[], object], *kinds: type[SealmarkError]) -> bool:
    """Whether ``action`` is refused with one of these errors."""
    try:
        action()
    except kinds:
        return True
    return False


@dataclass(frozen=True)
class SealedFigures:
    """What authenticated encryption does to a weight file.

    Attributes:
        exact: whether the right key gives the same bytes of every tensor back.
        keys: how many other keys were tried.
        keys_refused: how many of them were refused, with nothing written.
        flips: how many copies with one flipped bit were tried.
        flips_refused: how many of them were refused, with nothing written.
        overhead: bytes that the sealed file is longer.
    """

    exact: bool
    keys: int
    keys_refused: int
    flips: int
    flips_refused: int
    overhead: int


def sealed_figures(
    lock: Lock, source: Path, sealed: Path, seed: int, *, keys: int = 3, flips: int = 20
) -> tuple[SealedFigures, Secret]:
    """Lock the file ``source`` to ``sealed``, and try to open it rightly and wrongly; the key is returned."""
    key = lock.lock_file(source, sealed, rng=generator(seed, "key file"))
    scrap, output = sealed.with_suffix(".scrap"), sealed.with_suffix(".opened")

    def refused(path: Path, opener: Secret) -> bool:
        with_nothing_left = refuses(lambda: lock.unlock_file(path, output, opener), ArtifactError, PolicyError)
        return with_nothing_left and not output.exists()

    try:
        keys_refused = 0
        for index in range(keys):
            other = lock.lock_file(source, scrap, rng=generator(seed, f"other key {index}"))
            keys_refused += refused(sealed, other)
        data, rng, flips_refused = sealed.read_bytes(), generator(seed, "flips"), 0
        for _ in range(flips):
            damaged = bytearray(data)
            damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            scrap.write_bytes(damaged)
            flips_refused += refused(scrap, key)
        lock.unlock_file(sealed, output, key)
        exact = weights_of(output).digest() == weights_of(source).digest()
    finally:
        scrap.unlink(missing_ok=True)
        output.unlink(missing_ok=True)
    overhead = len(data) - source.stat().st_size
    return SealedFigures(exact, keys, keys_refused, flips, flips_refused, overhead), key
