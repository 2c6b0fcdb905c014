"""Uchida et al. 2017: bits in the mean filter of one layer, put there by a regularizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.core.card import Card
from sealmark.core.errors import ModelMismatchError, ParameterError, UnknownNameError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorInfo, weights_of
from sealmark.stats.nulls import Binomial


@dataclass(frozen=True)
class Uchida(Watermark):
    """Weight regularizer with a secret random projection.

    The host vector w is the layer's weight averaged over its output filters, so that their order does
    not matter. The loss gains ``strength * sum_j BCE(sigmoid(X w)_j, b_j)`` (eq. 4 of the paper; a sum
    over bits, not a mean). A bit is read as ``(X w)_j >= 0``.

    Embedding from scratch, by fine-tuning, or in the user's own loop (`sealmark.attach`) differ in the
    model that one starts from and in nothing else.

    Ours: X and b are derived from the committed seed, where the paper draws X at will and its code sets
    every b to one. So the number of matching bits is exactly Bin(bits, 1/2) on any suspect made without
    the secret. The test is two-sided: weight shifting inverts the mark instead of erasing it.

    Args:
        layer: name of the weight tensor; empty for the largest host that has at least ``bits`` entries.
        bits: T, the length of the message; at most the host's length M, and BER 0 wants T well under M.
        strength: lambda. The paper's 0.01 suits 576 hosts and 200 epochs; small nets want more.
    """

    layer: str = ""
    bits: int = 256
    strength: float = 0.02

    access = Access.WEIGHTS
    carries_payload = True
    card = Card(
        title="Bits in a layer's mean filter, by a regularizer",
        citation="Y. Uchida, Y. Nagai, S. Sakazawa, S. Satoh, Embedding Watermarks into Deep Neural Networks, "
        "ICMR 2017; Y. Nagai et al., Digital watermarking for deep neural networks, IJMIR 7, 2018",
        function=("ownership",),
        scenario="white-box",
        mechanism="weight regularizer, secret random projection",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with a convolutional or linear layer",
        needs_training=True,
        needs_data=True,
        reported="256 bits in WRN-10-4 on CIFAR-10; survives fine-tuning and pruning of 65 % of the "
        "weights (abstract)",
        reproduced="digits, 3 seeds: 256 bits at BER 0 and p = 2e-77, from scratch, by fine-tuning and in an"
        " own loop; accuracy within 0.1 points on average (docs/results/figures.md)",
        broken_by=(
            "permuting the input channels of the layer, or dummy neurons, at no cost in accuracy "
            "(Yan et al. 2022, 2023), unless the suspect is aligned to the original first",
            "training a new model on its answers (Lukas et al. 2022)",
            "detection and overwriting through the weights' variance (Wang and Kerschbaum 2019)",
        ),
        deviations=("keyed X and b", "two-sided exact test instead of BER = 0"),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        if self.bits < 1 or self.strength <= 0:
            raise ParameterError(
                "bad parameters of uchida",
                expected="bits >= 1, strength > 0",
                found=(self.bits, self.strength),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer and note its form."""
        hosts = {name: _length(info) for name, info in weights_of(model).info.items() if len(info.shape) >= 2}
        layer = self.layer or max(hosts, key=lambda name: (hosts[name], name), default="")
        if layer not in hosts:
            raise UnknownNameError("no such weight tensor", expected=f"one of {sorted(hosts)}", found=layer)
        if hosts[layer] < self.bits:
            raise ParameterError(
                f"{layer} is too small a host",
                expected=f"at most {hosts[layer]} bits",
                found=self.bits,
                advice="pass fewer bits or a layer with more inputs",
            )
        return {"layer": layer, "length": hosts[layer]}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``projection`` X: (T, M) float32 of standard normals; ``message`` b: (T,) float32 of 0 and 1."""

        def draw() -> dict[str, Tensor]:
            length = int(secret.host["length"])
            projection = secret.stream("projection").normal(self.bits * length)
            keyed = secret.stream("message").bits(self.bits)
            return {
                "projection": torch.from_numpy(projection).float().reshape(self.bits, length),
                "message": torch.from_numpy(keyed ^ self._payload(secret)).float(),
            }

        return secret.memo("uchida", draw)

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """``strength * sum_j BCE((X w)_j, b_j)``."""
        weight = model.get_parameter(secret.host["layer"])
        key = secret.memo(("uchida", weight.device), lambda: _moved(self.derive(secret), weight.device))
        logits = key["projection"] @ _host(weight).float()
        return self.strength * functional.binary_cross_entropy_with_logits(logits, key["message"], reduction="sum")

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits against Bin(bits, 1/2), two-sided."""
        key = self.derive(secret)
        read = self._read(suspect, secret)
        matches = int((read == key["message"].numpy()).sum())
        null = Binomial(self.bits, 0.5, two_sided=True)
        return Score(matches, null, {"bits": self.bits, "ber": 1 - matches / self.bits})

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        keyed = secret.stream("message").bits(self.bits)
        count = len(bytes.fromhex(secret.facts["payload"]))
        return np.packbits(self._read(suspect, secret).astype(np.uint8) ^ keyed)[:count].tobytes()

    def _read(self, suspect: Suspect, secret: Secret) -> np.ndarray[Any, np.dtype[np.uint8]]:
        layer, length = secret.host["layer"], secret.host["length"]
        weights = suspect.weights
        if layer not in weights.info or _length(weights.info[layer]) != length:
            raise ModelMismatchError(
                "the suspect has another form",
                expected=f"{layer} with {length} inputs a filter",
                found=weights.info.get(layer),
                advice="align the suspect to the original, or use a scheme that reads answers",
            )
        host = _host(weights[layer].detach().to("cpu", torch.float32))
        bits = (self.derive(secret)["projection"] @ host) >= 0
        return bits.numpy().astype(np.uint8)

    def _payload(self, secret: Secret) -> np.ndarray[Any, np.dtype[np.uint8]]:
        payload = np.frombuffer(bytes.fromhex(secret.facts["payload"]), np.uint8)
        bits = np.unpackbits(payload)
        if len(bits) > self.bits:
            raise ParameterError("payload too long", expected=f"at most {self.bits // 8} bytes", found=len(payload))
        return np.pad(bits, (0, self.bits - len(bits)))


def _host(weight: Tensor) -> Tensor:
    return weight.mean(0).reshape(-1)


def _length(info: TensorInfo) -> int:
    return info.count // info.shape[0] if info.count else 0


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
