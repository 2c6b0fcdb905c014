"""Properties of locks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import nn

from sealmark.core.errors import ArtifactError, ParameterError, PolicyError, UnsupportedError, WrongKeyError
from sealmark.core.lock import Lock
from sealmark.core.secret import Secret
from sealmark.core.weights import ModelWeights, save_model, weights_of
from sealmark.testing.bench import Bench, same_bits, state_bytes
from sealmark.testing.general import refuses

_MARGIN = 0.05


def check_unlocked_is_exact(scheme: Lock, bench: Bench) -> None:
    """The right key gives back every bit, or, of a lock that trains, as good a model; twice the same."""
    model, key = bench.locked(scheme)
    one, two = (scheme.unlock(model, key) for _ in range(2))
    assert same_bits(one, two)
    if scheme.card.needs_training:
        drop = bench.accuracy(bench.plain) - bench.accuracy(one)
        assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}"
    else:
        assert same_bits(one, bench.plain)


def check_locked_is_useless(scheme: Lock, bench: Bench) -> None:
    """Without a key the model is near chance, or refuses to run."""
    model, _ = bench.locked(scheme)
    _assert_useless(bench.accuracy(model), bench)
    assert bench.accuracy(bench.plain) > 0.9, "the control fails: the plain model is useless too"


def check_wrong_keys_are_useless(scheme: Lock, bench: Bench) -> None:
    """Fresh keys and a key with one flipped bit give a useless model or a refusal, never a crash."""
    _, key = bench.locked(scheme)
    near = bytearray(key.reveal_seed())
    near[0] ^= 1
    seeds = [np.random.default_rng(1000 + seed).bytes(32) for seed in range(7)]
    for other in [Secret(seed, key.facts, key.tensors) for seed in [*seeds, bytes(near)]]:
        _assert_useless(_accuracy_with(scheme, other, bench), bench)


def check_artifact_holds_no_key(scheme: Lock, bench: Bench) -> None:
    """No eight bytes in a row of the key's seed are in what is shipped."""
    model, key = bench.locked(scheme)
    shipped, seed = state_bytes(model), key.reveal_seed()
    assert not any(seed[i : i + 8] in shipped for i in range(len(seed) - 7))


def check_foreign_key_is_refused(scheme: Lock, bench: Bench) -> None:
    """A key of another scheme is an error, not a useless model."""
    model, key = bench.locked(scheme)
    foreign = Secret(key.reveal_seed(), key.facts | {"scheme": "another"}, key.tensors)
    assert refuses(ParameterError, lambda: scheme.unlock(model, foreign))


def check_file_form(scheme: Lock, bench: Bench) -> None:
    """Locking and unlocking a file gives the original's bits; a wrong key is refused, nothing written.

    A lock that trains refuses to lock a file, and unlocks one as it unlocks the live model.
    """
    if scheme.card.needs_training:
        _check_trained_file(scheme, bench)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, locked, opened = (folder / stem for stem in ("plain.safetensors", "locked", "opened.safetensors"))
        save_file(dict(ModelWeights(bench.plain)), plain)
        key = scheme.lock_file(plain, locked)
        assert locked.read_bytes() != plain.read_bytes()
        scheme.unlock_file(locked, opened, key)
        assert opened.read_bytes() == plain.read_bytes()
        opened.unlink()
        other = scheme.lock_file(plain, folder / "other")
        assert refuses(WrongKeyError, lambda: scheme.unlock_file(locked, opened, other))
        assert not opened.exists()
        assert not list(folder.glob(".*")), "a temporary file was left behind"


def _check_trained_file(scheme: Lock, bench: Bench) -> None:
    model, key = bench.locked(scheme)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder / "locked")
        assert refuses(UnsupportedError, lambda: scheme.lock_file(folder / "locked", folder / "new"))
        scheme.unlock_file(folder / "locked", folder / "opened", key)
        assert weights_of(folder / "opened").digest() == weights_of(scheme.unlock(model, key)).digest()
        (folder / "opened").unlink()
        other = Secret(np.random.default_rng(77).bytes(32), key.facts, key.tensors)
        assert refuses(WrongKeyError, lambda: scheme.unlock_file(folder / "locked", folder / "opened", other))
        assert sorted(path.name for path in folder.iterdir()) == ["locked"]


def _accuracy_with(scheme: Lock, key: Secret, bench: Bench) -> float:
    model, _ = bench.locked(scheme)
    try:
        opened: nn.Module = scheme.unlock(model, key)
    except (PolicyError, ArtifactError):
        assert scheme.card.refuses_wrong_key, "a refusal that the card does not announce"
        return bench.task.chance
    assert not scheme.card.refuses_wrong_key, "the card announces a refusal"
    return bench.accuracy(opened)


def _assert_useless(accuracy: float, bench: Bench) -> None:
    assert abs(accuracy - bench.task.chance) <= _MARGIN, f"accuracy {accuracy:.3f} is not near chance"
