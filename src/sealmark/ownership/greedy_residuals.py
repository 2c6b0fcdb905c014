"""Liu et al. 2021: bits in the signs of a layer's row residuals, made of its larger weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Score
from sealmark.core.hosts import choose_host, read_host
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap
from sealmark.stats.nulls import score_of_bits

_SHORTEST_ROW = 8


@dataclass(frozen=True)
class GreedyResiduals(Watermark):
    """Signs of residuals of the larger weights.

    The layer's weights are dealt into one row of D for each bit. In a row the share ``ratio`` (eta) with
    the smallest magnitudes counts as zero; the residual r_i is the mean over all D. With s_i = 2 b_i - 1
    the loss gains ``strength * sum_i max(0, mu - s_i r_i)``. A bit is read as ``r_i >= 0``.

    The paper's mu = 0.1 is far above any residual that a small net reaches: its hinge never switches
    off. Here mu is ``margin * rms(W) / sqrt(D)``, about that many standard deviations of an unmarked
    layer's residual, so that lambda and mu suit layers of any size.

    The number of matching bits is exactly Bin(bits, 1/2) on any suspect made without the secret, since
    the message follows from the committed seed and nothing that is read depends on the message. The test
    is two-sided: turning all signs of a normalized layer inverts the mark and costs nothing.

    Args:
        layer: name of the weight tensor; empty for the largest with at least 8 weights a bit.
        bits: N, the length of the message.
        ratio: eta, the share of each row that is left out.
        margin: of the hinge; see above.
        strength: lambda.
        keyed: deal the weights in a secret order. False for consecutive weights, as in the paper: where a
            bit stands is then public, and whoever embeds another message erases this one.
    """

    layer: str = ""
    bits: int = 256
    ratio: float = 0.5
    margin: float = 5.0
    strength: float = 0.5
    keyed: bool = True

    access = Access.WEIGHTS
    carries_payload = True
    card = Card(
        title="Bits in the signs of a layer's row residuals, of its larger weights alone",
        citation="H. Liu, Z. Weng, Y. Zhu, Watermarking Deep Neural Networks with Greedy Residuals, ICML 2021",
        function=("ownership",),
        scenario="white-box",
        mechanism="hinge on the signs of row means of the larger weights",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with a convolutional or linear layer",
        needs_training=True,
        needs_data=True,
        reported="256 bits in AlexNet and ResNet-18; better than earlier methods in five tasks (abstract, code)",
        reproduced="digits, fc1, seeds 0 to 2: 256 bits at BER 0 and p = 2e-77, from scratch and by fine-tuning, at"
        " 0.1 points of accuracy on average; BER 0 after 20 epochs of fine-tuning at the owner's rate and at four"
        " times it, pruning of 50 and 90 %, int8, and overwriting by the same scheme at 1 and 10 times the"
        " strength; 300 wrong secrets 0.42 to 0.59, 12 readings of independent models 0.48 to 0.54",
        broken_by=(
            "permuting units of the layer or of its inputs, BER 0.47 to 0.51, or turning signs before a batch"
            " normalization, at no cost in accuracy (Yan et al. 2022, 2023), unless the suspect is aligned to the"
            " original first",
            "overwriting, where rows are consecutive as in the paper: BER 0.47 to 0.55 at no cost (measured)",
            "fine-tuning at ten times the owner's rate: BER 0.21 to 0.32, not yet enough to hide it (measured)",
            "training a new model on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "bits from the committed seed, which binds the owner's public key, instead of the hash of a signature",
            "weights are dealt into rows in a secret order (keyed=False for consecutive ones)",
            "no pooling: a row holds the weights themselves, at least 8",
            "mu in standard deviations of an unmarked layer's residual",
            "exact two-sided test",
        ),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        if self.bits < 1 or not 0 <= self.ratio < 1 or self.margin <= 0 or self.strength <= 0:
            raise ParameterError(
                "bad parameters of greedy_residuals",
                expected="bits >= 1, 0 <= ratio < 1, margin > 0, strength > 0",
                found=(self.bits, self.ratio, self.margin, self.strength),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer and note its form."""
        layer, info = choose_host(model, self.layer, room=lambda i: i.count // _SHORTEST_ROW, need=self.bits)
        return {"layer": layer, "shape": list(info.shape)}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``message`` b: (bits,) float32 of 0 and 1; ``rows``: (bits, D) int64, which weights they hold."""

        def draw() -> dict[str, Tensor]:
            count = math.prod(secret.host["shape"])
            order = secret.stream("rows").permutation(count) if self.keyed else np.arange(count)
            rows = order[: count // self.bits * self.bits].reshape(self.bits, -1)
            message = payload_bits(secret, self.bits)
            return {"message": torch.from_numpy(message).float(), "rows": torch.from_numpy(rows)}

        return secret.memo("greedy_residuals", draw)

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """``strength * sum_i max(0, mu - s_i r_i)``."""
        weight = model.get_parameter(secret.host["layer"]).float()
        key = self.derive_on(secret, weight.device)
        mu = self.margin * weight.detach().square().mean().sqrt() / math.sqrt(key["rows"].shape[1])
        signs = 2 * key["message"] - 1
        return self.strength * (mu - signs * self._residuals(weight, key["rows"])).relu().sum()

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits against Bin(bits, 1/2), two-sided."""
        matches = int((self._read(suspect, secret) == self.derive(secret)["message"].numpy()).sum())
        return score_of_bits(matches, self.bits)

    def blind(self, secret: Secret) -> TensorMap:
        """Nothing of the layer: which of its weights are the larger ones is read, too."""
        layer = secret.host["layer"]
        return lambda name, tensor: torch.zeros_like(tensor) if name == layer else tensor

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        return payload_bytes(secret, self._read(suspect, secret))

    def _read(self, suspect: Suspect, secret: Secret) -> NDArray[np.uint8]:
        layer, shape = secret.host["layer"], tuple(secret.host["shape"])
        weight = read_host(suspect, layer, lambda info: info.shape == shape, f"shape {shape}")
        residuals = self._residuals(weight, self.derive(secret)["rows"])
        return (residuals >= 0).numpy().astype(np.uint8)

    def _residuals(self, weight: Tensor, rows: Tensor) -> Tensor:
        values = weight.reshape(-1)[rows]
        sizes = values.detach().abs()
        # ties are kept, so that a quantized layer reads alike on every platform
        smallest = sizes.kthvalue(1 + int(self.ratio * rows.shape[1]), dim=1, keepdim=True).values
        return (values * (sizes >= smallest)).mean(1)
