"""Locks that damage a few chosen weights: the key is where they are and what stood there."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.lock import LoadLock, Locked, Material, log2_choices
from sealmark.core.modes import device_of
from sealmark.core.secret import Secret, draw_seed, tensor_digest
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap, rewrite_model, weights_of

_PLACES, _VALUES = "places/", "values/"
_ALL_PLACES = "places"


class PatchLock(LoadLock):
    """A lock that overwrites chosen weights: write `choose`.

    The key's material has, for each tensor, ``places/NAME``, (n,) int64 into the flat tensor, and
    ``values/NAME``, the (n,) original values bit for bit: a difference that is added and taken away again
    is not exact. The key itself holds the places of all tensors in one, as int32 where that is enough.
    Facts are public and so are the digests in them: a few places in a small tensor, with a digest of
    their own, would be found by trying all, one tensor after the other.
    """

    @abstractmethod
    def choose(
        self, model: nn.Module, task: Task | None, rng: np.random.Generator
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What to overwrite: by name of a tensor, (n,) distinct places in it and the (n,) new values.

        Args:
            model: the lock's own copy.
            task: data to judge damage by.
            rng: for whatever is drawn.

        Raises:
            ParameterError: no task, where data is needed.
            UnsupportedError: this lock would do nothing to such a model.
        """

    def kept(self, tensor: Tensor, places: Tensor) -> Tensor:
        """What the key holds of a tensor for these places: (n,) values, or (1,) where it is one for all."""
        return tensor.reshape(-1)[places.to(tensor.device)]

    def lock(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Locked:
        """See `Lock.lock`."""
        chosen = self.choose(copy.deepcopy(model), task, rng or np.random.default_rng())
        weights = weights_of(model)
        damage: dict[str, Tensor] = {}
        originals: dict[str, Tensor] = {}
        for name, (places, values) in chosen.items():
            damage |= {_PLACES + name: places, _VALUES + name: values}
            originals |= {_PLACES + name: places, _VALUES + name: self.kept(weights[name], places)}
        sizes = {name: weights.info[name].count for name in chosen}
        key = self.new_secret(
            weights, host={"sizes": sizes}, tensors=_packed(originals, sizes), owner=owner, rng=rng
        )
        return Locked(rewrite_model(model, self.unlocker(damage)), key)

    def derive(self, key: Secret) -> Material:
        """The places and the values, tensor by tensor.

        Raises:
            ForgedSecretError: they do not fit one another.
        """
        sizes = _in_order(key.host["sizes"])
        ends = torch.tensor([*sizes.values()], dtype=torch.int64).cumsum(0)
        places = key.tensors[_ALL_PLACES].long()
        counts = torch.bincount(torch.bucketize(places, ends, right=True), minlength=len(sizes)).tolist()
        held = [len(key.tensors[_VALUES + name]) for name in sizes]
        if bool((places < 0).any()) or not _fit(counts, held):
            raise ForgedSecretError("places and values do not belong together", expected=counts, found=held)
        parts: dict[str, Tensor] = {}
        for (name, size), end, mine in zip(sizes.items(), ends, torch.split(places, counts), strict=True):
            parts[_PLACES + name] = mine - (end - size)
            parts[_VALUES + name] = key.tensors[_VALUES + name].expand(len(mine))
        return parts

    def unlocker(self, material: Material) -> TensorMap:
        """Values to their places."""

        def put(name: str, tensor: Tensor) -> Tensor:
            if _PLACES + name not in material:
                return tensor
            flat = tensor.reshape(-1)
            places = material[_PLACES + name].to(flat.device)
            return flat.index_put((places,), material[_VALUES + name].to(flat)).reshape(tensor.shape)

        return put

    def wrong_key(self, key: Secret, rng: np.random.Generator) -> Secret:
        """As many places, drawn anew, and values of the same scale for them."""
        material, drawn = self.derive(key), {}
        for name, size in key.host["sizes"].items():
            values = material[_VALUES + name]
            drawn[_PLACES + name] = torch.from_numpy(rng.choice(size, len(values), replace=False))
            scale = float(values.double().square().mean().sqrt())
            drawn[_VALUES + name] = torch.from_numpy(scale * rng.standard_normal(len(values))).to(values.dtype)
        return self.rekeyed(key, draw_seed(rng), drawn)

    def rekeyed(self, key: Secret, seed: bytes, material: Material, **host: Any) -> Secret:
        """A key for the same model with other material, another seed and more facts in its host."""
        tensors = _packed(material, key.host["sizes"])
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        facts = key.facts | {"tensors": digests, "host": key.host | host}
        return Secret(seed, facts, tensors, created=key.created)

    def vary(self, material: Material, share: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """A near key lacks this share of the places, wherever they are."""
        names = [name.removeprefix(_PLACES) for name in material if name.startswith(_PLACES)]
        total = sum(len(material[_PLACES + name]) for name in names)
        lost = np.zeros(total, bool)
        lost[rng.choice(total, max(1, round(share * total)) if share > 0 else 0, replace=False)] = True
        parts: dict[str, Tensor] = {}
        start = 0
        for name in names:
            end = start + len(material[_PLACES + name])
            kept = torch.from_numpy(~lost[start:end])
            parts |= {prefix + name: material[prefix + name][kept] for prefix in (_PLACES, _VALUES)}
            start = end
        return parts

    def key_bits(self, key: Secret, reach: float = 0.0) -> float:
        """log2 of the ways to choose the places; what stood there is not counted.

        Args:
            key: tells how many there are.
            reach: the share of the places that may be lacking; see `NeuralLock.key_bits`.
        """
        bits, material = 0.0, self.derive(key)
        for name, size in key.host["sizes"].items():
            places = len(material[_PLACES + name])
            needed = places - round(reach * places)
            bits += log2_choices(size, needed) - log2_choices(places, needed)
        return bits


class Victim:
    """A model whose weak places a lock looks for, and the owner's rows to see them by.

    Attributes:
        weights: what may be damaged, by name: parameters of two or more dimensions that hold different finite
            values; as float32 where the model is of half precision.

    Args:
        model: the lock's own copy; it goes to evaluation mode, and from half to single precision.
        task: its owner's rows and its loss are used, and nothing else.
        rng: which rows.
        batch: rows at a time.

    Raises:
        ParameterError: no task, or one without rows.
        UnsupportedError: the model has no such weights.
    """

    def __init__(self, model: nn.Module, task: Task | None, rng: np.random.Generator, *, batch: int = 128) -> None:
        if task is None or task.owner.rows == 0:
            raise ParameterError(
                "which weights matter shows on data", expected="a task with the owner's rows", found=None
            )
        if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
            model = model.float()
        self.model = model.eval().requires_grad_(False)
        stored = weights_of(model)
        self.weights = {
            name: tensor.detach()
            for name, tensor in model.named_parameters()
            if name in stored and tensor.is_floating_point() and tensor.dim() >= 2 and _differ(tensor)
        }
        if not self.weights:
            raise UnsupportedError(
                "no weights to damage", expected="a parameter of two or more dimensions", found=type(model).__name__
            )
        self._task, self._rng, self._batch = task, rng, batch
        self._dtype = next(iter(self.weights.values())).dtype

    def draw(self) -> Batch:
        """Some of the owner's rows, where the model is."""
        owner = self._task.owner
        rows = self._rng.choice(owner.rows, min(self._batch, owner.rows), replace=False)
        return owner.take(torch.from_numpy(rows)).to(device_of(self.model))

    def loss(self, changed: Mapping[str, Tensor], rows: Batch) -> Tensor:
        """The task's loss with these tensors in place of the model's own; differentiable in them."""
        return self._task.loss(self._answers(changed, rows), rows.targets)

    def useless(self, rows: Batch) -> float:
        """The loss of the model's own answers when each is given to another row."""
        with torch.no_grad():
            answers = self._answers({}, rows)
            return float(self._task.loss(answers.roll(1, 0), rows.targets))

    def serves(self, changed: Mapping[str, Tensor], rows: Batch) -> bool:
        """Whether the task's metric tells the model from one that gives every row the same answer."""
        with torch.no_grad():
            answers = self._answers(changed, rows)
            same = self._answers({}, rows).mean(0, keepdim=True).expand_as(answers)
        targets = rows.targets.cpu()
        return self._task.metric(answers.cpu(), targets) > self._task.metric(same.cpu(), targets)

    def gradients(self, changed: Mapping[str, Tensor], rows: Batch) -> dict[str, Tensor]:
        """Of the loss, by name of a weight tensor; 0 where the answers do not depend on it."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in changed.items()}
        slopes = torch.autograd.grad(self.loss(leaves, rows), [*leaves.values()], materialize_grads=True)
        return {name: slope.nan_to_num(0.0) for name, slope in zip(leaves, slopes, strict=True)}

    def _answers(self, changed: Mapping[str, Tensor], rows: Batch) -> Tensor:
        inputs = rows.inputs.to(self._dtype) if rows.inputs.is_floating_point() else rows.inputs
        answers: Tensor = functional_call(self.model, dict(changed), (inputs,))
        return answers


def _packed(material: Material, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """What a key stores of its material."""
    total, start, places = sum(sizes.values()), 0, []
    for name, size in _in_order(sizes).items():
        places.append(material[_PLACES + name].long().cpu() + start)
        start += size
    narrow = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
    values = {_VALUES + name: material[_VALUES + name] for name in sizes}
    return {_ALL_PLACES: torch.cat(places).to(narrow)} | values


def _fit(counts: list[int], held: list[int]) -> bool:
    return len(counts) == len(held) and all(h in (1, c) for c, h in zip(counts, held, strict=True))


def _in_order(sizes: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items()))  # as canonical JSON has them


def _differ(tensor: Tensor) -> bool:
    return bool(tensor.numel() and tensor.isfinite().all() and tensor.min() < tensor.max())
