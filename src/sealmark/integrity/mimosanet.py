"""MimosaNet (Szentannai et al. 2019): the same function in a form that any change of the weights destroys."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.core.card import Card
from sealmark.core.errors import ParameterError, TamperedError, UnsupportedError
from sealmark.core.evidence import Evidence, Score, judge
from sealmark.core.integrity import CodeNull, Seal, Sealed, Source
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.symmetry.rewriting import resize
from sealmark.core.symmetry.structure import Units, units_of
from sealmark.core.task import Task
from sealmark.core.weights import weights_of

_HIGHEST = {torch.float32: 1e4, torch.float64: 1e12}  # where the weights still cancel; halves never do
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mimosanet(Seal):
    """Between two linear layers with a ReLU every neuron becomes several with huge weights that cancel.

    A neuron with weights V, bias b and outgoing weights W is replaced by ``copies`` neurons with weights
    ``a_i V``, biases ``a_i b`` and outgoing weights ``c_i W``, where ``a_i > 0``, c_i is of the size of
    ``height`` and of either sign, and ``sum_i a_i c_i = 1``. As ReLU takes positive factors out, the
    function stays. Decoys are neurons drawn from the layer's own weights, for which that sum is 0. All are
    shuffled. An error of s in a weight comes out as an error of ``s * height``: fine-tuned, pruned,
    quantized, or stored in 16 bits, the model is useless. All that is drawn follows from the record.

    The record keeps the layers as they were and a digest of every other tensor: any change is found, named,
    and the original comes back bit for bit.

    It deters and does not protect: `merge_colinear` takes it off in milliseconds.

    Args:
        copies: M, at least 2, of each neuron.
        height: C. With 1 nothing is destroyed; over 10,000 the float32 of the honest user is not enough.
        decoys: deceptive neurons, as a share of the layer's own.

    Raises:
        ParameterError: out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> sealed = Mimosanet().seal(model)
        >>> sealed.model[0].out_features
        48
        >>> x = torch.ones(1, 8)
        >>> torch.allclose(sealed.model(x), model(x), atol=0.02), len(merge_colinear(sealed.model)[0].weight)
        (True, 16)
    """

    copies: int = 2
    height: float = 1000.0
    decoys: float = 0.5

    card = Card(
        title="MimosaNet: an equivalent network that a change destroys",
        citation="K. Szentannai, J. Al-Afandi, A. Horvath, MimosaNet: An Unrobust Neural Network Preventing Model "
        "Stealing, arXiv 1907.01650, 2019",
        function=("integrity",),
        scenario="white-box",
        mechanism="equivalent layers with huge weights that cancel, deceptive neurons",
        capacity="zero-bit",
        type="active seal",
        target_models="networks with two linear layers and a ReLU between them, in 32 or 64 bits",
        needs_training=False,
        needs_data=False,
        reported="the same responses and accuracy, extreme sensitivity to changes (abstract); useless after "
        "1 % of noise (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds, between fc1 and fc2: all 497 answers as before, logits within 0.006; accuracy "
        "0.68 after noise of 0.1 % of each weight, 0.17 after 1 %, 0.09 after an epoch of fine-tuning at rate 0.01 "
        "and 0.80 even at 1e-6, 0.10 after pruning 50 %, 0.19 in int8, 0.59 in bfloat16, but 0.99 in float16; the "
        "plain model and height 1 stay at 0.98 or more in all of these. `merge_colinear` gives 0.99 and ordinary "
        "robustness back",
        broken_by=(
            "merging neurons whose weights point the same way, with neither key nor data: `merge_colinear`",
            "fine-tuning with gradients clipped to norm 1: 0.98 after 20 epochs at the owner's rate (measured)",
            "distillation, and training a new head on the layers before",
        ),
        deviations=(
            "a digest of every tensor finds and names changes",
            "all that is drawn follows from the record",
        ),
        max_drop=0.0,
        grade="research",
    )

    def __post_init__(self) -> None:
        if self.copies < 2 or self.height < 1 or self.decoys < 0:
            raise ParameterError(
                "bad parameters of mimosanet",
                expected="copies >= 2, height >= 1, decoys >= 0",
                found=(self.copies, self.height, self.decoys),
            )

    def seal(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Sealed:
        """See `Seal.seal`.

        Raises:
            UnsupportedError: no two linear layers with a ReLU between them, a type that cannot hold
                ``height``, or a forward function that cannot be traced.
        """
        pairs = list(_pairs(model))
        if not pairs:
            raise UnsupportedError(
                "the model has no place for this seal",
                expected="two linear layers with a ReLU and nothing else between them",
                found=type(model).__name__,
                advice="use the seal `reversible`, which takes any network",
            )
        weights = weights_of(model)
        for name in _names(model, pairs):
            if self.height > _HIGHEST.get(weights.info[name].dtype, 0):
                raise UnsupportedError(
                    f"{name} cannot hold weights that cancel",
                    expected=f"a height up to {_HIGHEST.get(weights.info[name].dtype, 0):g}",
                    found=f"{self.height:g} in {weights.info[name].dtype}",
                    advice="lower the height, or seal in float32 or float64",
                )
        secret = self.new_secret(
            weights,
            host={"pairs": pairs, "digests": {name: tensor_digest(weights[name]) for name in weights}},
            tensors={name: weights[name] for name in _names(model, pairs)},
            owner=owner,
            rng=rng,
        )
        return Sealed(_with(model, self._sealed(secret)), secret)

    def check(self, source: Source, secret: Secret) -> Evidence:
        """See `Seal.check`."""
        self.check_secret(secret)
        changed = self._changed(source, secret)
        return judge(
            Score(float(not changed), CodeNull(256), {"changed": changed}),
            scheme=self.name,
            commitment=secret.commitment,
        )

    def restore(self, model: nn.Module, secret: Secret) -> nn.Module:
        """See `Seal.restore`."""
        self.check_secret(secret)
        changed = self._changed(model, secret)
        if changed:
            raise TamperedError(
                "the model was changed since it was sealed",
                found=f"changes in {changed}",
                advice="get an unchanged copy; what was changed cannot be restored",
            )
        return _with(model, secret.tensors)

    def _changed(self, source: Source, secret: Secret) -> list[str]:
        sealed = {name: tensor_digest(tensor) for name, tensor in self._sealed(secret).items()}
        expected, weights = {**secret.host["digests"], **sealed}, weights_of(source)
        differ = {name for name in weights if name in expected and tensor_digest(weights[name]) != expected[name]}
        return sorted((expected.keys() ^ set(weights)) | differ)

    def _sealed(self, secret: Secret) -> dict[str, Tensor]:
        """The layers as they are shipped."""

        def make() -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for maker, reader in secret.host["pairs"]:
                tensors |= self._expanded(secret, maker, reader)
            return tensors

        return secret.memo("sealed", make)

    def _expanded(self, secret: Secret, maker: str, reader: str) -> dict[str, Tensor]:
        """Exact on every machine: products of float64, rounded once."""
        places = [f"{maker}.weight", f"{maker}.bias", f"{reader}.weight"]
        originals = {name: secret.tensors[name] for name in places if name in secret.tensors}
        units = {name: _by_unit(tensor, name == places[2]) for name, tensor in originals.items()}
        size = len(units[places[0]])
        decoys = round(self.decoys * size)
        rows, columns = self._factors(secret, maker, size, decoys)
        order = secret.stream(f"order/{maker}").permutation(rows.size)
        result = {}
        for name, own in units.items():
            index = secret.stream(f"decoys/{name}").integers(decoys * own.shape[1], size).reshape(decoys, -1)
            every = np.concatenate([own, np.take_along_axis(own, index, 0)])
            factors = columns if name == places[2] else rows
            copies = (factors[:, :, None] * every[:, None, :]).reshape(rows.size, -1)[order]
            shaped = copies.T if name == places[2] else copies.reshape(-1, *originals[name].shape[1:])
            result[name] = torch.from_numpy(np.ascontiguousarray(shaped)).to(originals[name].dtype)
        return result

    def _factors(self, secret: Secret, maker: str, size: int, decoys: int) -> tuple[_Array, _Array]:
        """Factors a and c, (size + decoys, copies) each: ``sum_i a_i c_i`` is 1 for neurons and 0 for decoys."""
        count, form = (size + decoys) * self.copies, (size + decoys, self.copies)
        rows = (0.5 + 1.5 * secret.stream(f"rows/{maker}").uniform(count)).reshape(form)
        heights = self.height * (0.5 + secret.stream(f"columns/{maker}").uniform(count))
        columns = (heights * secret.stream(f"signs/{maker}").signs(count)).reshape(form)
        columns[:, -1] = np.repeat([1.0, 0.0], [size, decoys])
        for place in range(self.copies - 1):
            columns[:, -1] -= rows[:, place] * columns[:, place]
        columns[:, -1] /= rows[:, -1]
        return rows, columns


def merge_colinear(model: nn.Module, *, tolerance: float = 1e-4) -> nn.Module:
    """The attack on `Mimosanet`: a copy in which neurons whose weights point the same way are one.

    Their outgoing weights are added; where these cancel, the neuron goes. It needs neither key nor data.

    Args:
        model: sealed or not; without such neurons it stays as it is.
        tolerance: how far from 1 the cosine of two rows of weights and bias may be.

    Raises:
        UnsupportedError: `torch.fx` cannot trace the model.
    """
    tensors: dict[str, Tensor] = {}
    for maker, reader in _pairs(model):
        names = _names(model, [(maker, reader)])
        state = {name: model.get_parameter(name).detach() for name in names}
        rows = torch.cat([state[name].double().reshape(len(state[names[0]]), -1) for name in names[:-1]], 1)
        rounding = 10 * torch.finfo(state[names[-1]].dtype).eps
        merged, outgoing = _merged(rows, state[names[-1]].double().T, tolerance, rounding)
        if len(merged) < len(rows):
            width = state[names[0]].shape[1]
            parts = [merged[:, :width], merged[:, width:].squeeze(1), outgoing.T]
            chosen = parts if len(names) == 3 else [parts[0], parts[2]]
            tensors |= {name: part.to(state[name].dtype) for name, part in zip(names, chosen, strict=True)}
    return _with(model, tensors)


def _merged(rows: Tensor, outgoing: Tensor, tolerance: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Rows (n, in) and outgoing weights (n, out) of what is left, each with the same length on both sides."""
    lengths = rows.norm(dim=1)
    directions = rows / lengths.clamp(min=1e-300)[:, None]
    free = lengths > 0
    kept: list[tuple[Tensor, Tensor]] = []
    for unit in range(len(rows)):
        if free[unit]:
            group = free & (directions @ directions[unit] > 1 - tolerance)
            free &= ~group
            parts = lengths[group, None] * outgoing[group]
            total = parts.sum(0)
            if total.norm() > rounding * parts.norm():
                balance = total.norm().sqrt()
                kept.append((directions[unit] * balance, total / balance))
    return torch.stack([rows[0] * 0, *(row for row, _ in kept)])[1:], torch.stack(
        [outgoing[0] * 0, *(out for _, out in kept)]
    )[1:]


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Linear layers with a ReLU and nothing else between them; a layer takes part once."""
    taken: set[str] = set()
    for units in units_of(model):
        pair = _pair(model, units)
        if pair and not taken & set(pair):
            taken |= set(pair)
            yield pair


def _pair(model: nn.Module, units: Units) -> tuple[str, str] | None:
    layers = {slot.tensor.rpartition(".")[0] for slot in units.makers}
    plain = units.activations == ("relu",) and not units.norms and units.resizable
    if not plain or len(layers) != 1 or len(units.readers) != 1:
        return None
    maker, reader = layers.pop(), units.readers[0].tensor.rpartition(".")[0]
    named = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    for layer in (model.get_submodule(maker), model.get_submodule(reader)):
        if type(layer) is not nn.Linear or sum(parameter is layer.weight for parameter in named) != 1:
            return None
    return (maker, reader) if units.readers[0].block == 1 else None


def _names(model: nn.Module, pairs: list[tuple[str, str]]) -> list[str]:
    """Weight, bias if there is one, and the reader's weight of each pair."""
    names = []
    for maker, reader in pairs:
        bias = [f"{maker}.bias"] if model.get_submodule(maker).bias is not None else []
        names += [f"{maker}.weight", *bias, f"{reader}.weight"]
    return names


def _by_unit(tensor: Tensor, columns: bool) -> _Array:
    """What each unit owns: (units, entries)."""
    matrix: Any = (tensor.T if columns else tensor).double().numpy()
    return np.asarray(matrix.reshape(len(matrix), -1), np.float64)


def _with(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy with other parameters in its linear layers, which then have another width."""
    result = copy.deepcopy(model)
    for name, tensor in tensors.items():
        resize(result, name, tensor.to(result.get_parameter(name).device, copy=True))
    return result
