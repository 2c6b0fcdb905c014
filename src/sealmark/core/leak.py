"""A leak in the form of its original: its tensors' names, order and form, and the order of its neurons.

Reads the leak against the original alone; see `sealmark.core.naming` why no p-value suffers by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, UnsupportedError
from sealmark.core.lock import WeightLock
from sealmark.core.naming import Place, places
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.symmetry.alignment import align
from sealmark.core.symmetry.structure import units_of
from sealmark.core.weights import MappedWeights, TensorInfo, Weights, weights_of

Note = dict[str, Any]


class Named(Suspect):
    """Named tensors, without an architecture."""

    access = Access.WEIGHTS

    def __init__(self, weights: Weights) -> None:
        self._named = weights


class Recovered(Weights):
    """A leak's tensors under the original's names and in its shapes; what it lacks is missing here too.

    Args:
        suspect: the leak's.
        found: where each is; see `places`.
        shapes: of the original's tensors.
    """

    def __init__(self, suspect: Weights, found: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._suspect, self._found = suspect, found
        self.info = {
            name: TensorInfo(shapes[name], suspect.info[place.source].dtype) for name, place in found.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            raise self._missing(name)
        place = self._found[name]
        return place.read(self._suspect[place.source], self.info[name].shape)


class Filled(Weights):
    """A leak's tensors, and the original's own where it has none.

    Args:
        suspect: under the original's names.
        original: all of them.
    """

    def __init__(self, suspect: Weights, original: Weights) -> None:
        self._suspect, self._original = suspect, original
        self.info = {name: suspect.info.get(name, info) for name, info in original.info.items()}

    def __getitem__(self, name: str) -> Tensor:
        return (self._suspect if name in self._suspect else self._original)[name]


def recover(suspect: Suspect, original: nn.Module | Weights) -> tuple[Note, Suspect]:
    """The leak as the original would be read, and what was undone.

    Tensors are found under other names, in another order, flattened or transposed, and with rows or columns
    added; missing ones are left out. With a live original hidden units are put back into its order, scale
    and sign; what is missing then has no say.

    Args:
        suspect: shows its weights; is not changed.
        original: the owner's.

    Returns:
        What was undone, as plain JSON, empty where nothing was; and a suspect to read.

    Raises:
        AccessError: the suspect shows no weights.
    """
    leak, own = suspect.weights, weights_of(original)
    found = places(leak, own)
    note = _note(found, leak, own)
    if note:
        suspect = Named(Recovered(leak, found, {name: own.info[name].shape for name in found}))
    told: Note = {"form": note} if note else {}
    if not isinstance(original, nn.Module):
        return told, suspect
    try:
        undone, suspect = _aligned(leak, found, original)
    except (ModelMismatchError, UnsupportedError) as error:
        undone = {"impossible": str(error)}
    return {**told, "alignment": undone}, suspect


def relocked(
    suspect: Suspect, original: nn.Module | Weights, lock: WeightLock, key: Secret
) -> tuple[Note, Suspect]:
    """A leak of an unlocked copy, locked again: what was marked as locked can be read then.

    Its form is recovered first, against the original as the key opens it. Nothing is written: tensors are
    locked when they are read.

    Args:
        suspect: shows its weights; is not changed.
        original: the owner's, locked and unmarked.
        lock: of the key.
        key: that the original was locked with.

    Raises:
        AccessError: the suspect shows no weights.
        ParameterError: the key belongs to another scheme.
        ModelMismatchError: the key does not open the original.
    """
    lock.check_secret(key)
    material, own = lock.derive(key), weights_of(original)
    opened: nn.Module | Weights
    if isinstance(original, nn.Module):
        opened = lock.unlock(original, key)
    else:
        opened = MappedWeights(own, lock.unlocker(material))
    if lock.opens_exactly(key) and weights_of(opened).digest() != key.facts["model"]:
        raise ModelMismatchError(
            "this key does not open the original",
            expected=f"a model locked with the key {key.commitment[:12]}",
            found=f"digest {own.digest()[:16]}",
            advice="name the key that the original was locked with",
        )
    note, suspect = recover(suspect, opened)
    locker = lock.locker(material)

    def again(name: str, tensor: Tensor) -> Tensor:
        # locks look at dtype and shape; a leak may have been stored with fewer bits
        return locker(name, tensor.to(own.info[name].dtype)).to(tensor.dtype) if name in own else tensor

    return note, Named(MappedWeights(suspect.weights, again))


def _aligned(leak: Weights, found: Mapping[str, Place], original: nn.Module) -> tuple[Note, Suspect]:
    """See `align`; added units are for it to judge, and other added rows are cut off before."""
    own = weights_of(original)
    free = {(slot.tensor, slot.axis) for units in units_of(original) for slot in units.slots}

    def shape(name: str, place: Place) -> tuple[int, ...]:
        here = own.info[name].shape
        there = leak.info[place.source].shape if place.grown else here
        pairs = zip(here, there, strict=True)
        return tuple(max(pair) if (name, axis) in free else pair[0] for axis, pair in enumerate(pairs))

    shapes = {name: shape(name, place) for name, place in found.items()}
    missing = [name for name, info in own.info.items() if info.is_float and info.count and name not in found]
    result = align(Filled(Recovered(leak, found, shapes), own), original, blind=missing)
    if not missing:
        return result.note, WhiteBox(result.model(original))
    kept = {name: Place(name) for name in found}
    return result.note, Named(Recovered(result.weights, kept, {name: own.info[name].shape for name in found}))


def _note(found: Mapping[str, Place], leak: Weights, own: Weights) -> Note:
    """What had to be undone to find the tensors, and which are missing; empty where all is as it was."""
    told: Note = {
        "renamed": sum(name != place.source for name, place in found.items()),
        "transposed": sum(place.turned for place in found.values()),
        "reshaped": sum(
            not place.turned and not place.grown and leak.info[place.source].shape != own.info[name].shape
            for name, place in found.items()
        ),
        "grown": sum(place.grown for place in found.values()),
        "missing": sorted(
            name for name, info in own.info.items() if info.is_float and info.count and name not in found
        ),
    }
    return {what: many for what, many in told.items() if many}
