"""Reversible watermark (Guan et al. 2020): an authentication code in the weights that comes off again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.card import Card
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.integrity import Source, WeightSeal
from sealmark.core.modes import evaluating
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap, Weights, weights_of
from sealmark.integrity._carrier import FORMS, Carrier, find_peak

_CODE_BITS = 256
_PROBES = 256


@dataclass(frozen=True)
class Reversible(WeightSeal):
    """Histogram shifting in the channels that matter least.

    A weight's bit pattern, read as an integer that grows with the weight, is cut into a leading part v
    (sign, exponent, ``mantissa`` bits) and a rest that never changes. In the histogram of v over the
    host channels, P is the peak and Z the next empty bin above it. Embedding moves P < v < Z up by one,
    which empties P + 1, and there v = P becomes P + bit; reading goes the other way. The peak's height is
    the capacity. No weight changes by more than ``2**-mantissa`` of itself.

    The hosts are the tensors with the highest peaks, as many as the 256 bits of the code need, and in
    the last of them no more channels than it takes: those whose activations have the least entropy
    where a task is given, otherwise those with the smallest weights.

    Ours: integers, where the paper shifts decimal digits; adding and subtracting 0.001 in float32 leaves
    some 4 % of the weights changed. Z is always empty, so no location map is needed. The code is keyed:
    whoever reads P and Z off the weights can take the code out, and cannot make another.

    Args:
        mantissa: bits of the mantissa in v, 1 to 7: fewer give more room and larger changes.
        bins: of the histogram of a channel's activations.

    Raises:
        ParameterError: out of range.

    Example:
        >>> model = nn.Linear(256, 256)
        >>> seal = Reversible()
        >>> sealed = seal.seal(model)
        >>> str(seal.check(sealed.model, sealed.secret).verdict)
        'MATCH'
        >>> torch.equal(seal.restore(sealed.model, sealed.secret).weight, model.weight)
        True
    """

    mantissa: int = 3
    bins: int = 32

    card = Card(
        title="Reversible watermark: a code in the weights that comes off without a trace",
        citation="X. Guan, H. Feng, W. Zhang, H. Zhou, J. Zhang, N. Yu, Reversible Watermarking in Deep "
        "Convolutional Neural Networks for Integrity Authentication, ACM Multimedia 2020",
        function=("integrity",),
        scenario="white-box",
        mechanism="histogram shifting on the leading bits of unimportant channels' weights",
        capacity="multi-bit",
        type="passive fragile watermark, a seal",
        target_models="any network with some 10,000 weights; types of 16, 32 and 64 bits",
        needs_training=False,
        needs_data=False,
        reported="accuracy within 0.5 points, exact recovery (AlexNet to DenseNet121 on ImageNet)",
        reproduced="digits, 3 seeds: 300 of 300 flipped bits found and placed, to the channel in all matrices and "
        "filters, restored bit for bit, no loss of accuracy (docs/results/figures.md); room for 4,900 bits; of "
        "these the code takes 256; 1,000 bytes of the record are for channels",
        broken_by=("whoever has the record can seal a changed model anew: it serves against outsiders",),
        deviations=(
            "integers instead of decimal digits, hence exact",
            "a keyed code instead of a plain hash",
            "weight size orders the channels where there is no data",
        ),
        max_drop=0.005,
    )

    def __post_init__(self) -> None:
        if not 1 <= self.mantissa <= 7 or self.bins < 2:
            raise ParameterError(
                "bad parameters of reversible",
                expected="mantissa 1 to 7, bins >= 2",
                found=(self.mantissa, self.bins),
            )

    def bind(
        self, weights: Weights, model: nn.Module | None, task: Task | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """``carriers``: tensor, form, channels, P, Z and number of bits of each host.

        Raises:
            UnsupportedError: the peaks hold fewer than 256 in all, or a weight is NaN or infinite.
        """
        room = self._rooms(weights)
        carriers: list[dict[str, Any]] = []
        left = _CODE_BITS
        for name in sorted(room, key=lambda name: (-room[name], name)):
            if left and room[name]:
                order = _channel_order(name, weights[name], self.bins, model, task)
                carrier = self._carrier(name, weights[name], order, min(left, room[name]))
                carriers.append(dataclasses.asdict(carrier))
                left -= carrier.bits
        if left:
            raise UnsupportedError(
                "the weights have too little room for the code",
                expected=f"{_CODE_BITS} bits",
                found=f"{_CODE_BITS - left} bits in {len(room)} weight tensors",
                advice="pass a smaller mantissa, or seal a larger model",
            )
        return {"carriers": carriers}, {}

    def capacity(self, source: Source) -> int:
        """How many bits the weight tensors hold; the code takes 256 of them.

        Raises:
            UnsupportedError: a weight is NaN or infinite.

        Example:
            >>> room = Reversible().capacity(nn.Linear(256, 256))
            >>> 256 < room < Reversible(mantissa=1).capacity(nn.Linear(256, 256))
            True
        """
        return sum(self._rooms(weights_of(source)).values())

    def sealer(self, secret: Secret, code: bytes) -> TensorMap:
        """Embed the bits of the code, each carrier its share."""
        carriers = _carriers(secret)
        bits = torch.from_numpy(np.unpackbits(np.frombuffer(code, np.uint8))).bool()
        shares = dict(zip(carriers, torch.split(bits, [c.bits for c in carriers.values()]), strict=True))

        def embed(name: str, tensor: Tensor) -> Tensor:
            return carriers[name].embed(tensor, shares[name]) if name in carriers else tensor

        return embed

    def opener(self, secret: Secret) -> TensorMap:
        """Undo the embedding; a tensor that lost its form is left as it is."""
        carriers = _carriers(secret)

        def restore(name: str, tensor: Tensor) -> Tensor:
            fits = name in carriers and carriers[name].suits(tensor)
            return carriers[name].restore(tensor) if fits else tensor

        return restore

    def read_code(self, weights: Weights, secret: Secret) -> bytes:
        """The bits of all carriers; others, or fewer, when the weights were changed."""
        read = [torch.empty(0, dtype=torch.bool)]
        for name, carrier in _carriers(secret).items():
            if name in weights.info and carrier.suits(weights[name]):
                read.append(carrier.read(weights[name]))
        return np.packbits(torch.cat(read).numpy()).tobytes()

    def _rooms(self, weights: Weights) -> dict[str, int]:
        hosts = [
            n for n, info in weights.info.items() if info.dtype in FORMS and len(info.shape) >= 2 and info.count
        ]
        return {name: self._room(name, weights[name]) for name in hosts}

    def _room(self, name: str, tensor: Tensor) -> int:
        if not tensor.isfinite().all():
            raise UnsupportedError(
                f"{name} holds NaN or an infinity",
                expected="finite weights",
                advice="repair the model first: it answers NaN or nonsense",
            )
        return find_peak(tensor, self.mantissa).height

    def _carrier(self, name: str, tensor: Tensor, order: list[int], bits: int) -> Carrier:
        fewest, most = 1, len(order)
        while fewest < most:  # the peak of the first channels grows with their number
            middle = (fewest + most) // 2
            enough = find_peak(tensor[order[:middle]], self.mantissa).height >= bits
            fewest, most = (fewest, middle) if enough else (middle + 1, most)
        peak = find_peak(tensor[order[:most]], self.mantissa)
        form = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return Carrier(name, *form, self.mantissa, order[:most], peak.value, peak.zero, bits)


def _carriers(secret: Secret) -> dict[str, Carrier]:
    def make() -> dict[str, Carrier]:
        return {fields["tensor"]: Carrier(**fields) for fields in secret.host["carriers"]}

    return secret.memo("carriers", make)


def _channel_order(name: str, tensor: Tensor, bins: int, model: nn.Module | None, task: Task | None) -> list[int]:
    """The channels of a tensor, least important first."""
    importance = None if model is None or task is None else _entropies(model, name, task.owner, bins)
    if importance is None:
        importance = tensor.detach().double().abs().flatten(1).sum(1)
    order: list[int] = importance.argsort(stable=True).tolist()
    return order


def _entropies(model: nn.Module, name: str, rows: Batch, bins: int) -> Tensor | None:
    """Entropy of each channel's mean activation over some rows: (channels,); None where it has none."""
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    means: list[Tensor] = []

    def keep(module: nn.Module, _: Any, outputs: Tensor) -> None:
        outputs = outputs.movedim(-1, 1) if isinstance(module, nn.Linear) else outputs
        means.append(outputs.double().unsqueeze(-1).flatten(2).mean(2).cpu())

    hook = module.register_forward_hook(keep)
    try:
        with evaluating(model) as device:
            model(rows.inputs[:_PROBES].to(device))
    finally:
        hook.remove()
    if not means:
        return None
    return torch.tensor([_entropy(channel, bins) for channel in torch.cat(means).numpy().T])


def _entropy(values: np.ndarray[Any, np.dtype[np.float64]], bins: int) -> float:
    counts = np.histogram(values, bins)[0]
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
