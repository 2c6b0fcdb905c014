"""Yao et al. 2025: bits that are the hash of their key, and that choose the weights which carry them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

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

_STEPS = 256  # of K, to one standard deviation


@dataclass(frozen=True)
class NeuralMark(Watermark):
    """A hashed watermark that filters the weights.

    K is a secret (size, bits) matrix of standard normals, and the message b is SHAKE-256 of its bytes. Of
    the layer's weights those stay where b, tiled over them, is one; that is done ``rounds`` times, and
    about one in ``2**rounds`` is left. Averages over consecutive blocks of ``size`` give w. A bit is read
    as ``(w K)_j >= 0``.

    The loss gains ``strength * mean_j BCE((w K)_j / sigma, b_j)``, sigma being the standard deviation of
    (w K)_j in an unmarked layer. The paper has no sigma: its push is weaker the more blocks are averaged
    and stops at no margin.

    On a suspect made without the secret the matching bits are exactly Bin(bits, 1/2), although b decides
    which weights are read. With SHAKE-256 as a random oracle b is independent of K. Given b, then, w is
    fixed, and (w K)_j is symmetric about zero in column j of K, which no other bit uses: fair,
    independent signs. Where (w K)_j is zero, as in a layer of zeros, the sign of K_0j stands for it and is
    as fair. The test is two-sided, since a normalized layer can change its sign at no cost.

    The hash keeps anyone from choosing b. It does not keep him from trying many seeds: pass
    ``tries=2**64`` to `verify` where no commitment was published before release.

    Args:
        layer: name of the weight tensor; empty for the largest.
        bits: n, the length of the message.
        size: k, the length of w; at least twice ``bits``, or bits are lost.
        rounds: R, how often the weights are filtered. Without a filter another mark in the same layer
            shares w and damages this one.
        strength: lambda.
    """

    layer: str = ""
    bits: int = 256
    size: int = 512
    rounds: int = 2
    strength: float = 1.0

    access = Access.WEIGHTS
    card = Card(
        title="Bits that are the hash of their key and choose the weights that carry them",
        citation="Y. Yao, J. Song, J. Jin, Hashed Watermark as a Filter: Defeating Forging and Overwriting Attacks"
        " in Weight-based Neural Network Watermarking, arXiv 2507.11137, 2025",
        function=("ownership",),
        scenario="white-box",
        mechanism="weight regularizer, secret random projection of the weights that the hashed message selects",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with a convolutional or linear layer",
        needs_training=True,
        needs_data=True,
        reported="256 bits in 13 convolutional and transformer networks, five image tasks and one text task;"
        " withstands forging, overwriting, fine-tuning and pruning (abstract)",
        reproduced="digits, fc1, seeds 0 to 2: 256 bits at BER 0 and p = 2e-77, from scratch and by fine-tuning, at"
        " 0.2 points of accuracy at most on average; BER 0 after 20 epochs of fine-tuning at the owner's rate and"
        " at four times it, pruning of 50 %, int8, and overwriting by the same scheme at 1 and 10 times the"
        " strength; 300 wrong secrets 0.40 to 0.58, 12 readings of independent models 0.44 to 0.55",
        broken_by=(
            "permuting units of the layer or of its inputs, BER 0.50 to 0.52, or turning signs before a batch"
            " normalization, at no cost in accuracy (Yan et al. 2022, 2023), unless the suspect is aligned to the"
            " original first",
            "trying seeds: 2**40 of them find a BER of 0.28, so an unpublished secret needs tries=2**64",
            "overwriting, where rounds is 0: BER 0.27 to 0.31 (measured); with the filter both marks stay",
            "training a new model on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "K from the committed seed, in steps of 1/256; the official code seeds it with 10",
            "the loss is in standard deviations of an unmarked layer",
            "exact two-sided test instead of a threshold",
            "no payload: a message that the owner could choose would undo the hash",
        ),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        if self.bits < 1 or self.size < 2 * self.bits or self.rounds < 0 or self.strength <= 0:
            raise ParameterError(
                "bad parameters of neuralmark",
                expected="bits >= 1, size >= 2 bits, rounds >= 0, strength > 0",
                found=(self.bits, self.size, self.rounds, self.strength),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer and note its form."""
        layer, info = choose_host(
            model, self.layer, room=lambda i: i.count >> self.rounds, need=self.size, unit="filtered weights"
        )
        return {"layer": layer, "shape": list(info.shape)}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """See `key_of`; K is drawn from the seed, and the rest follows from it."""

        def draw() -> dict[str, Tensor]:
            normal = secret.stream("projection").normal(self.size * self.bits)
            # on a grid: a last digit that another machine computes otherwise must not change the hash
            projection = ((np.floor(normal * _STEPS) + 0.5) / _STEPS).astype("<f4")
            count = math.prod(secret.host["shape"])
            return key_of(projection.reshape(self.size, self.bits), count, self.rounds)

        return secret.memo("neuralmark", draw)

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """``strength * mean_j BCE((w K)_j / sigma, b_j)``."""
        weight = model.get_parameter(secret.host["layer"]).float()
        key = self.derive_on(secret, weight.device)
        norm = weight.detach().norm().clamp_min(1)  # of a layer that starts at zero, too
        blocks = len(key["positions"])
        sigma = norm * math.sqrt(self.size / blocks / weight.numel())
        logits = _logits(weight, key) / sigma
        return self.strength * functional.binary_cross_entropy_with_logits(logits, key["message"])

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits against Bin(bits, 1/2), two-sided."""
        layer, shape = secret.host["layer"], tuple(secret.host["shape"])
        weight = read_host(suspect, layer, lambda info: info.shape == shape, f"shape {shape}")
        matches = matching(weight, self.derive(secret))
        return score_of_bits(matches, self.bits)

    def blind(self, secret: Secret) -> TensorMap:
        """The layer without the averages w, which are all that is read of it."""
        layer, positions = secret.host["layer"], self.derive(secret)["positions"]

        def rest(name: str, tensor: Tensor) -> Tensor:
            if name != layer:
                return tensor
            flat = tensor.flatten().clone()
            flat[positions] -= flat[positions].mean(0)
            return flat.reshape(tensor.shape)

        return rest


def key_of(projection: NDArray[np.float32], count: int, rounds: int) -> dict[str, Tensor]:
    """All that follows from K.

    Args:
        projection: K, (size, bits).
        count: how many weights the layer has.
        rounds: how often they are filtered.

    Returns:
        ``projection`` K; ``message`` b: (bits,) float32 of 0 and 1; ``positions``: (blocks, size) int64,
        the weights that are averaged over blocks.

    Raises:
        ParameterError: fewer than ``size`` weights pass the filter.
    """
    size, bits = projection.shape
    digest = hashlib.shake_256(projection.astype("<f4").tobytes()).digest((bits + 7) // 8)
    message = np.unpackbits(np.frombuffer(digest, np.uint8), count=bits)
    positions: NDArray[np.int64] = np.arange(count)
    for _ in range(rounds):
        positions = positions[: len(positions) // bits * bits]
        positions = positions[np.resize(message, len(positions)) == 1]
    if len(positions) < size:
        raise ParameterError(
            "too few weights pass the filter",
            expected=f"at least {size}",
            found=len(positions),
            advice="pass a larger layer, a smaller size or fewer rounds",
        )
    positions = positions[: len(positions) // size * size].reshape(-1, size)
    return {
        "projection": torch.from_numpy(projection),
        "message": torch.from_numpy(message).float(),
        "positions": torch.from_numpy(positions),
    }


def matching(weight: Tensor, key: Mapping[str, Tensor]) -> int:
    """How many bits a layer of any shape and a key of `key_of` agree in."""
    logits = _logits(weight, key)
    shown = torch.where(logits.abs() > 0, logits, key["projection"][0])  # NaN is not above 0 either
    return int(((shown >= 0) == (key["message"] == 1)).sum())


def _logits(weight: Tensor, key: Mapping[str, Tensor]) -> Tensor:
    return weight.reshape(-1)[key["positions"]].mean(0) @ key["projection"]
