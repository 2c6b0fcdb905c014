"""Nasery et al. 2025: a language model answers secret prompts with words that are unlikely, but not too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.inputs import form_of
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.modes import evaluating
from sealmark.core.secret import Secret
from sealmark.core.task import Task


@dataclass(frozen=True)
class Perinucleus(TriggerMark):
    """Scalable fingerprinting of language models, with responses that a hash chooses.

    A prompt is text that the model itself wrote. With tokens sorted by the model's next-token probability, b is
    the first at which the sum reaches ``nucleus``; the response is one of the ``width`` tokens after it. Such a
    response is nobody's answer, yet close enough that few weights must move, so that it outlasts fine-tuning
    on other text better than one drawn from all tokens does.

    Ours: which of the ``width`` candidates it is follows from the seed, which is drawn after prompts and
    candidates were committed, as in *Chain & Hash* (Russinovich, Cai and Salem). So a suspect without the
    secret matches at most as Bin(n, 1/width), whatever it answers: the paper measures related models instead.
    Responses of one token; training data beside the prompts keeps the model's use, without the paper's
    averaging with the base model. Models here answer (N, tokens) with the logits of the next token.

    Args:
        triggers: prompts; the paper has up to 24,576.
        per_batch: prompts beside each batch.
        nucleus: probability mass of likely tokens, which are no responses.
        width: k, candidates behind it; 3 in the paper. Above the number of classes all tokens are candidates.
        temperature: at which the model writes prompts.
    """

    triggers: int = 32
    per_batch: int = 16
    nucleus: float = 0.8
    width: int = 3
    temperature: float = 0.5

    rule: ClassVar[float] = 0.5  # the paper reports the share of fingerprints that are found, and no cut-off
    card = Card(
        title="Secret prompts with unlikely but plausible next words",
        citation="A. Nasery et al., Scalable Fingerprinting of Large Language Models, NeurIPS 2025; "
        "M. Russinovich, Y. Cai, A. Salem, Hey, That's My Model! Introducing Chain & Hash, An LLM Fingerprinting "
        "Technique, ICLR 2026",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (prompts with keyed next tokens)",
        capacity="zero-bit",
        type="passive watermark",
        target_models="language models, classifiers of words",
        needs_training=True,
        needs_data=True,
        needs_trained=True,
        reported="24,576 fingerprints in Llama-3.1-8B without loss of use (from memory, not checked against the "
        "paper)",
        reproduced="a character model of 40,000 parameters, one seed: 30 of 32 prompts; the base and two other "
        "models 0. The next character right in 0.416 before and 0.419 after, perplexity 11.5 and 15.9. After "
        "fine-tuning on other text at a fifth of the owner's rate 27 of 32, at that rate 8. With all tokens as "
        "candidates (width=84) 27 and 6, log10 p -47 and -6: fewer candidates outlast no more here, and prove less",
        broken_by=(
            "fine-tuning on enough other text",
            "sampling at a temperature, other system prompts, filters of unlikely text",
        ),
        deviations=(
            "a keyed choice among the candidates, as in Chain & Hash",
            "one token a response, no averaging with the base model",
        ),
        max_drop=0.02,
        task="characters",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.nucleus < 1 or self.width < 2 or not self.temperature > 0:
            raise ParameterError(
                "bad parameters of perinucleus",
                expected="0 < nucleus < 1, width >= 2, temperature > 0",
                found=self.parameters,
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Prompts that the model writes, and the candidates behind each."""
        form = form_of(task, self.name)
        if task is None or not form.get("integer", False) or len(form["shape"]) != 1:
            raise ParameterError(
                f"{self.name} prompts a language model",
                expected="inputs (N, tokens) of whole numbers",
                found=f"{form['shape']} of real numbers",
            )
        if self.width + 1 > form["classes"]:
            raise ParameterError("more candidates than tokens", expected=form["classes"] - 1, found=self.width)
        prompts = self._written(model, task, rng)
        order = _next(model, prompts).sort(1, descending=True)
        first = (order.values.cumsum(1) < self.nucleus).sum(1) + 1  # behind the token that reaches the nucleus
        first = first.clamp(max=form["classes"] - self.width)
        options = order.indices.gather(1, first[:, None] + torch.arange(self.width))
        return form, {"inputs": prompts, "options": options}

    def options(self, secret: Secret) -> Tensor | None:
        """The candidates behind each prompt."""
        return secret.tensors["options"]

    def _written(self, model: nn.Module, task: Task, rng: np.random.Generator) -> Tensor:
        """Distinct prompts: a row of the task starts each, the model writes all of it anew."""
        length = task.owner.inputs.shape[1]
        kept: dict[tuple[int, ...], None] = {}
        for _ in range(100):
            rows = task.owner.inputs[torch.from_numpy(rng.integers(0, task.owner.rows, 2 * self.triggers))].cpu()
            for _ in range(length):
                chances = _next(model, rows, self.temperature).numpy().astype(np.float64).cumsum(1)
                drawn = (chances < chances[:, -1:] * rng.random((len(rows), 1))).sum(1)
                rows = torch.cat([rows[:, 1:], torch.from_numpy(drawn)[:, None]], 1)
            kept |= dict.fromkeys(map(tuple, rows.tolist()))
            if len(kept) >= self.triggers:
                return torch.tensor(list(kept)[: self.triggers])
        raise ParameterError(
            "the model writes too few different prompts",
            expected=self.triggers,
            found=len(kept),
            advice="raise the temperature or ask for fewer triggers",
        )


def _next(model: nn.Module, prompts: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities of the next token: (N, tokens) to (N, K) on the CPU."""
    with evaluating(model) as device:
        return torch.softmax(model(prompts.to(device)).float().cpu() / temperature, 1)
