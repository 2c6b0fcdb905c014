"""AdvParams (Xue et al. 2021): a few parameters, chosen by the gradient, at the ends of their layer's range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.core.card import Card
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.patching import PatchLock, Victim
from sealmark.core.task import Task

_STEP = 5  # places a gradient
_WORSE = 2.0  # times the loss of answers that are given to the wrong rows
_PATIENCE = 10  # gradients without a larger loss
_BAND = 0.05  # of a layer's range, at each end


@dataclass(frozen=True)
class AdvParams(PatchLock):
    """Move the few weights that matter most to the end of their layer's range that hurts.

    What a weight is worth is the slope of the loss times the way to that end (first order), on some of the
    owner's rows, in evaluation mode; five weights are moved for each gradient. A weight lands at random in
    the outer twentieth of the range: weights that all equal the layer's extreme would give themselves away.

    Args:
        count: how many; 0 for as many as it takes until fresh rows are served no better than by one answer
            for all and their loss is twice that of the model's own answers given to other rows, or until the
            loss grows no more.

    Raises:
        ParameterError: ``count`` is negative.

    Example:
        >>> AdvParams(count=25).parameters
        {'count': 25}
    """

    count: int = 0

    card = Card(
        title="A few parameters at the ends of their range",
        citation="M. Xue, Z. Wu, J. Wang, Y. Zhang, W. Liu, AdvParams: An Active DNN Intellectual Property "
        "Protection Technique via Adversarial Perturbation Based Parameter Encryption, IEEE TETC 2022, "
        "arXiv 2105.13697",
        function=("authorization",),
        scenario="white-box",
        mechanism="adversarial perturbation of a few parameters; the key is where they are and what stood there",
        capacity="one key a model",
        type="active lock",
        target_models="any network with weight tensors of two or more dimensions",
        needs_training=False,
        needs_data=True,
        reported="accuracy falls by 80.65, 81.16 and 87.91 points on Fashion-MNIST, CIFAR-10 and GTSRB; down to "
        "0.000205 % of the parameters encrypted; no training; robust to fine-tuning and pruning",
        reproduced="digits, 3 seeds: 20 to 30 of 155,536 weights (0.013 to 0.019 %) take the accuracy from 0.991 "
        "to 0.109, 5 leave 0.97; unlocked bit for bit; 0.109 with 20 wrong keys, 0.119 at worst; a key that "
        "lacks 1, 5, 10, 25, 50 % of the places: 0.99, 0.98, 0.97, 0.88, 0.21",
        broken_by=(
            "nine tenths of the key: 0.98 of 0.98 retrieval on all-MiniLM-L6-v2, of which 20 of 22.7 million "
            "weights leave 0.00 without a key (docs/results/minilm.md)",
            "fresh statistics for batch normalization on 90 rows and nothing else: 0.71 "
            "(docs/results/authorization.md)",
            "fine-tuning on 10 % of the attacker's rows: 0.95, where starting afresh gives 0.84 (gain 0.75)",
            "the mean for every weight in the outer twentieth of its layer's range, without data: 0.34 to 0.56",
            "three quarters of the key: 0.88",
        ),
        deviations=(
            "original bits are kept and put back; perturbations that are added and subtracted again are not exact",
            "the end is judged by the task's loss and its metric, beside one answer for all rows, and not by a "
            "given accuracy",
            "weights land at random in the outer twentieth of the range and not all at its end",
            "biases and normalization layers are left alone",
        ),
        max_drop=0.0,
        needs_trained=True,
        key_point="load",
        exact_unlock=True,
        grade="research",
    )

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ParameterError("bad count", expected="0 or more", found=self.count)

    def choose(
        self, model: nn.Module, task: Task | None, rng: np.random.Generator
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """See `PatchLock.choose`."""
        victim = Victim(model, task, rng)
        weights = {name: tensor.clone() for name, tensor in victim.weights.items()}
        chosen: dict[str, list[int]] = {}
        best, since = 0.0, 0
        while self.count or since < _PATIENCE:
            rows = victim.draw()
            left = self.count - sum(map(len, chosen.values())) if self.count else _STEP
            moves = best_moves(victim, weights, chosen, victim.gradients(weights, rows), min(_STEP, left))
            for name, place, upper in moves:
                low, high = victim.weights[name].aminmax()
                end, inward = (high, low) if upper else (low, high)
                weights[name].view(-1)[place] = end + _BAND * rng.random() * (inward - end)
                chosen.setdefault(name, []).append(place)
            if not moves:
                break
            fresh = victim.draw()
            with torch.no_grad():
                loss = float(victim.loss(weights, fresh))
            if not self.count and loss >= _WORSE * victim.useless(fresh) and not victim.serves(weights, fresh):
                break
            best, since = max(best, loss), 0 if loss > best else since + 1
        if not chosen:
            raise UnsupportedError("no weight changes the loss", expected="a trained model", found="slopes of 0")
        return {
            name: (torch.tensor(places), weights[name].view(-1)[places].cpu()) for name, places in chosen.items()
        }


def best_moves(
    victim: Victim,
    weights: Mapping[str, Tensor],
    taken: Mapping[str, list[int]],
    slopes: Mapping[str, Tensor],
    count: int,
) -> list[tuple[str, int, bool]]:
    """The places not taken whose move to an end of their layer's range raises the loss most, to first order.

    Returns:
        Name, place in the flat tensor, and whether it is the upper end; fewer than ``count`` where no other
        move would raise the loss.
    """
    found: list[tuple[float, str, int, bool]] = []
    for name, slope in slopes.items():
        low, high = victim.weights[name].aminmax()
        flat, way = slope.reshape(-1), torch.where(slope > 0, high, low) - weights[name]
        gains = flat * way.reshape(-1)
        gains[taken.get(name, [])] = 0.0
        top = gains.topk(min(count, gains.numel()))
        found += [
            (gain, name, place, bool(flat[place] > 0))
            for gain, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            if gain > 0
        ]
    return [move for _, *move in sorted(found, reverse=True)[:count]]  # type: ignore[misc]
