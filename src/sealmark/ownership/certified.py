"""Bansal et al. 2022, certified watermarks: no small enough change of the weights can undo the mark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import Tensor, nn
from torch.func import functional_call

from sealmark.blackbox.inputs import keyed_inputs
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.modes import evaluating, torch_generator
from sealmark.core.secret import Secret
from sealmark.core.task import Batch, Task
from sealmark.stats.nulls import Binomial


@dataclass(frozen=True)
class Certificate:
    """What no change of the parameters within a radius can undo.

    It speaks of the *smoothed* model: its trigger accuracy is the median over models whose parameters have
    normal noise of spread ``sigma``. Reading it takes the suspect's weights. Buffers, such as running
    statistics, are taken as they are.

    Attributes:
        accuracy: least smoothed trigger accuracy within the radius; None where there is no certificate.
        median: that of the model itself, as the draws have it.
        radius: l2 length of the change of all parameters together.
        reach: radii of this or more cannot be certified by so many draws.
        confidence: that ``accuracy`` holds, over the draws.
        log10_p: the certified accuracy as evidence: a bound on the chance that the smoothed accuracy of any
            model made without the secret is as large. 0 where there is no certificate.
    """

    accuracy: float | None
    median: float
    radius: float
    reach: float
    confidence: float
    log10_p: float


@dataclass(frozen=True)
class Certified(TriggerMark):
    """Certified neural network watermarks by randomized smoothing of the parameters.

    Beside triggers in each batch, copies of the model whose parameters have noise are trained on triggers and
    task alike. So the triggers are answered as taught in a whole ball of models. `certify` says how large, by
    the order statistics of the paper; `verify` asks for labels and knows nothing of it.

    The guarantee is about short changes alone. Fine-tuning moves weights much further, and permuting
    neurons further still.

    Labels are keyed and drawn after the images, as in `sealmark.ownership.adi`: matches on a model made without
    the secret are exactly Bin(triggers, 1/K).

    Args:
        triggers: n; the paper has 100.
        noise: the largest spread; the paper has 1.0, which small nets with normalization do not survive.
        levels: how many spreads, evenly up to ``noise``; the paper has 20, and 0.
        copies: of the model at each level and step; the paper has 100. Each costs as much as a step.
    """

    triggers: int = 40
    noise: float = 0.04
    levels: int = 3
    copies: int = 1

    rule: ClassVar[float] = 0.5  # the paper has no rule; it reports trigger accuracies
    card = Card(
        title="Keyed patterns learned under noise on the weights, with a certified radius",
        citation="A. Bansal, P. Chiang, M. Curry, R. Jain, C. Wigington, V. Manjunatha, J. P. Dickerson, "
        "T. Goldstein, Certified Neural Network Watermarks with Randomized Smoothing, ICML 2022, arXiv 2207.07972",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (trigger set), randomized smoothing in the space of parameters",
        capacity="zero-bit",
        type="passive watermark",
        target_models="classifiers of images, vectors or words",
        needs_training=True,
        needs_data=True,
        reported="a certified l2 radius of the parameters within which the mark cannot be removed (from "
        "memory, not checked against the paper)",
        reproduced="digits, 3 seeds: 40 of 40 triggers, p = 1e-40; accuracy 98.1 % instead of 99.1. At a spread of "
        "0.03 (300 draws, 99 %): median 92.5 to 95 %, certified 90 to 92.5 % at radius 0.01, 82.5 to 87.5 % at "
        "0.03 (without noise, one seed, 27.5 %), 72.5 to 82.5 % at 0.05, nothing from 0.065. Fine-tuning moves "
        "the parameters by 1.2 and leaves 97.5 to 100 %, pruning half of the weights 100 %",
        broken_by=(
            "training a new model on its answers (Lukas et al. 2022): 5 to 20 % left, p above 0.03 (measured here)",
            "rejecting queries that look unlike the task (Hitaj and Mancini 2018)",
        ),
        deviations=(
            "keyed patterns and labels instead of found images",
            "noisy copies learn the task too, or accuracy falls by two points; they are trained beside each batch "
            "rather than in passes of their own, few at a time and with less noise",
            "the certificate also says what it is worth as evidence",
        ),
        max_drop=0.015,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.noise < math.inf or self.levels < 1 or self.copies < 1:
            raise ParameterError(
                "bad parameters of certified",
                expected="noise > 0, levels >= 1, copies >= 1",
                found=self.parameters,
            )

    def draw(self, secret: Secret) -> Tensor:
        """Keyed patterns, or random words."""
        return keyed_inputs(secret.stream("images"), self.triggers, secret.host)

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Triggers beside each batch, and noisy copies."""
        return _NoisyCopies(self, secret, task, rng)

    def certify(
        self,
        model: nn.Module,
        secret: Secret,
        *,
        radius: float,
        sigma: float = 0.03,
        draws: int = 300,
        confidence: float = 0.99,
        rng: np.random.Generator,
    ) -> Certificate:
        """How well the smoothed model answers after any change of its parameters up to a length.

        Args:
            model: left as it is.
            secret: of the mark.
            radius: l2 length of the change.
            sigma: spread of the noise. More reaches further, and is answered worse.
            draws: N models.
            confidence: that the answer holds.
            rng: of the noise; it must not be known to whoever made the model.

        Raises:
            ParameterError: a parameter means nothing.
            ForgedSecretError: the secret does not re-derive.
        """
        self.check_secret(secret)
        found = self.smoothed(model, secret, sigma=sigma, draws=draws, rng=rng)
        accuracy = certified_accuracy(found, radius / sigma, confidence)
        log10_p = 0.0
        if accuracy is not None:
            # Markov: of the noisy copies, half are at least as good with at most twice the chance of one
            law = Binomial(self.triggers, 1 / secret.host["classes"])
            log10_p = min(0.0, (math.log(2) + law.log_p(round(accuracy * self.triggers))) / math.log(10))
        reach = -sigma * float(ndtri(-math.expm1(math.log1p(-confidence) / draws)))
        return Certificate(accuracy, float(np.median(found)), radius, reach, confidence, log10_p)

    def smoothed(
        self, model: nn.Module, secret: Secret, *, sigma: float, draws: int, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Trigger accuracies of models with noisy parameters, ascending: (draws,); see `certify`."""
        if not 0 < sigma < math.inf or draws < 1:
            raise ParameterError("bad smoothing", expected="sigma > 0, draws >= 1", found=(sigma, draws))
        triggers, generator, found = self.trigger_set(secret), torch_generator(rng), []
        with evaluating(model) as device:
            inputs, targets = triggers.to(device)
            for _ in range(draws):
                answers: Tensor = functional_call(model, _moved(model, sigma, generator), (inputs,))
                found.append((answers.argmax(-1) == targets).double().mean().item())
        return np.sort(found)


def certified_accuracy(accuracies: NDArray[np.float64], radius: float, confidence: float = 0.99) -> float | None:
    """The median after the worst change, from draws before it, by an order statistic.

    A change of ``radius`` spreads turns the median into no less than the quantile at q = Phi(-radius). The k-th
    draw from below, counted from 0, lies at or under that quantile unless k draws or fewer do, and as many as
    Bin(N, q) do: the largest k with P(Bin(N, q) > k) >= confidence is taken.

    Args:
        accuracies: (N,) of models with noise.
        radius: of the change over the spread of the noise.
        confidence: that the answer holds.

    Returns:
        None where no k will do: there is no certificate.

    Raises:
        ParameterError: a negative radius, or confidence not in (0, 1).

    Example:
        >>> draws = np.linspace(0.5, 1, 300)
        >>> round(certified_accuracy(draws, 1.0), 3), certified_accuracy(draws, 3.0)
        (0.554, None)
    """
    if not radius >= 0 or not 0 < confidence < 1:
        raise ParameterError(
            "bad certificate", expected="radius >= 0, confidence in (0, 1)", found=(radius, confidence)
        )
    count = len(accuracies)
    enough = binom.sf(np.arange(count), count, ndtr(-radius)) >= confidence  # falls with k
    return float(np.sort(accuracies)[enough.sum() - 1]) if enough.any() else None


class _NoisyCopies(Embedding):
    """Noise goes to a copy of the parameters that lives for one step, so none has to be taken out again."""

    def __init__(self, scheme: Certified, secret: Secret, task: Task | None, rng: np.random.Generator) -> None:
        super().__init__(scheme, secret)
        self._mark, self._generator = scheme, torch_generator(rng)
        self._rng = np.random.default_rng(rng.integers(2**63))
        self._loss = nn.functional.cross_entropy if task is None else task.loss

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the copies. In evaluation mode: running statistics stay those of the model itself."""
        mark, total = self._mark, torch.zeros((), device=batch.inputs.device)
        spreads = [mark.noise * level / mark.levels for level in range(1, mark.levels + 1)] * mark.copies
        with evaluating(model), torch.enable_grad():
            for spread in spreads:
                rows = batch.join(mark.extra(self.secret, batch, self._rng))
                outputs = functional_call(model, _moved(model, spread, self._generator), (rows.inputs,))
                total = total + self._loss(outputs, rows.targets) / len(spreads)
        return total


def _moved(model: nn.Module, spread: float, generator: torch.Generator) -> dict[str, Tensor]:
    """All parameters, those of normalization too, with normal noise."""
    return {
        name: value + spread * torch.randn(value.shape, generator=generator).to(value)
        for name, value in model.named_parameters()
    }
