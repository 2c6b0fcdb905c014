"""Trigger sets: inputs that the model was taught to answer by keyed labels.

A scheme says what the inputs are. Labels, training, verification, the order of queries and the law are here,
so that no scheme can have a law of its own.

Why the law holds: labels are drawn from the committed seed after the inputs are fixed (a secret's streams
depend on the digests of its tensors). Given what a suspect answers, which was settled without the seed, each
label is one of k equally likely ones. So matches are Bin(m, 1/k), for any suspect and any inputs, even for
inputs that the owner chose in bad faith. Where labels are drawn from the classes other than an input's natural
one, a suspect matches with chance 1/k or not at all, and Bin(m, 1/k) is a bound. Rows that share one label are
one trial: at most one label can be the answer to more than half of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.inputs import check_packed, form_of, pack, unpack
from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.stats.nulls import Binomial
from sealmark.stats.sequential import EProcess, Stopped


@dataclass(frozen=True)
class TriggerMark(Watermark):
    """Base of trigger-set watermarks: write `draw`, or hold inputs in the secret from `bind`.

    The secret's tensors may hold, put there by `bind` before any label is drawn:

    - ``inputs``: (n, ...) packed, see `sealmark.blackbox.inputs`; else they follow from the seed by `draw`;
    - ``natural``: (m,) the class of each trial that its label must not be;
    - ``trials``: (n,) which trial a row belongs to; else each row is one;
    - ``places``: the owner's training rows that became triggers, and are no longer trained on as they were.

    Args:
        triggers: n, the rows that are asked. 30 reach p = 1e-30 with ten classes.
        per_batch: triggers that are trained on beside each batch.

    Attributes:
        rule: share of matching rows at which the paper claims the model; told in the details, decides nothing.
    """

    triggers: int = 30
    per_batch: int = 16

    access = Access.LABELS
    rule: ClassVar[float]

    def __post_init__(self) -> None:
        if self.triggers < 1 or self.per_batch < 1:
            raise ParameterError(
                f"bad parameters of {self.name}",
                expected="triggers >= 1, per_batch >= 1",
                found=self.parameters,
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of inputs and labels; what the owner chose, see ``choices``."""
        form = form_of(task, self.name)
        if "inputs" in chosen:
            check_packed(chosen["inputs"], self.triggers, form)
        return form, dict(chosen)

    def draw(self, secret: Secret) -> Tensor:
        """Inputs that follow from the seed: (n, ...) packed. Not called where the secret holds inputs.

        Raises:
            ForgedSecretError: the scheme does not make such secrets.
        """
        raise ForgedSecretError("the secret holds no inputs", expected=f"what keygen of {self.name} picked")

    def options(self, secret: Secret) -> Tensor | None:
        """Which labels a trial may have, all equally likely: (m, k) int64; None for all classes."""
        if "natural" not in secret.tensors:
            return None
        return other_labels(secret.tensors["natural"], secret.host["classes"])

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """The label of each trial, and the inputs where they follow from the seed."""

        def make() -> dict[str, Tensor]:
            options = self.options(secret)
            count = int(_trials(secret, self.triggers).max()) + 1
            kinds = secret.host["classes"] if options is None else options.shape[1]
            if kinds < 2 or (options is not None and len(options) != count):
                raise ParameterError(
                    f"{self.name} has no labels to draw",
                    expected=f"for each of {count} trials two labels or more",
                    found=None if options is None else tuple(options.shape),
                    advice="a wrong label is drawn among three classes or more",
                )
            if options is not None and bool((options.sort(1).values.diff(dim=1) == 0).any()):
                raise ForgedSecretError(
                    "a trial has one label twice: it would be no draw", expected="distinct labels"
                )
            drawn = torch.from_numpy(secret.stream("labels").integers(count, kinds))
            labels = drawn if options is None else options.gather(1, drawn[:, None])[:, 0]
            return {"labels": labels} | ({} if self._held(secret) else {"inputs": self.draw(secret)})

        return secret.memo("trigger parts", make)

    def places(self, secret: Secret) -> Tensor | None:
        """Which of the owner's training rows became triggers; None where none did."""
        return secret.tensors.get("places")

    def lesson(self, model: nn.Module, secret: Secret, task: Task) -> Task:
        """The task without the rows that became triggers: a row cannot be taught two labels.

        Raises:
            ParameterError: the secret was made for another task.
        """
        places = self.places(secret)
        if places is None:
            return task
        if int(places.max()) >= task.owner.rows:
            raise ParameterError("the secret was made for another task", found=f"{task.owner.rows} rows")
        kept = torch.ones(task.owner.rows, dtype=torch.bool)
        kept[places] = False
        return dataclasses.replace(task, owner=task.owner.take(kept))

    def trigger_set(self, secret: Secret) -> Batch:
        """The rows as the model sees them, (n, ...) in the task's range, and the label of each, (n,) int64."""

        def make() -> Batch:
            parts = self.parts(secret)
            packed = parts["inputs"] if "inputs" in parts else secret.tensors["inputs"]
            trials = _trials(secret, len(packed))
            if len(trials) != len(packed) or int(trials.max()) >= len(parts["labels"]) or int(trials.min()) < 0:
                raise ForgedSecretError(
                    "inputs and labels do not fit",
                    expected=f"{len(trials)} rows of {len(parts['labels'])} trials",
                    found=f"{len(packed)} rows",
                )
            return Batch(unpack(packed, secret.host), parts["labels"][trials])

        return secret.memo("trigger set", make)

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        """``per_batch`` triggers in order, from a random place."""
        triggers = self.trigger_set(secret)
        rows = (int(rng.integers(triggers.rows)) + torch.arange(self.per_batch)) % triggers.rows
        return triggers.take(rows).to(batch.inputs.device)

    def claims(self, matches: int, rows: int) -> bool:
        """The paper's own decision on so many matching rows: for the record, and for the false claims it allows."""
        return matches >= self.rule * rows

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Trials that match, against Bin(m, 1/k)."""
        triggers = self.trigger_set(secret)
        matching = suspect.labels(triggers.inputs) == triggers.targets
        trials = _trials(secret, triggers.rows)
        won = sum(_won(matching[trials == trial]) for trial in range(int(trials.max()) + 1))
        chance, bound = self._chance(secret)
        null = Binomial(int(trials.max()) + 1, chance, bound=bound)
        return Score(won, null, self._details(int(matching.sum()), triggers.rows, won, null.n))

    def score_in_turn(self, suspect: Suspect, secret: Secret, enough: float) -> Score:
        """One trial after the other, in an order that the secret fixes; see `Watermark.score_in_turn`.

        Asking ends when the verdict is sure, when nothing can be won any more, or when the budget is spent.
        """
        chance, bound = self._chance(secret)
        process, matches, asked, why = EProcess(chance), 0, 0, "all were asked"
        rows, reach = self.trigger_set(secret).rows, 0
        for left, part in self._in_turn(secret):
            if asked and suspect.budget is not None and suspect.queries + part.rows > suspect.budget:
                why, reach = "the budget is spent", process.queries
                break
            reach = process.queries + 1 + left
            matching = suspect.labels(part.inputs) == part.targets
            process.add(_won(matching))
            matches, asked = matches + int(matching.sum()), asked + part.rows
            if process.log_p <= enough:
                why = "the verdict is sure"
                break
            if process.best_after(left) > enough:
                why = "nothing can be won any more"
                break
        details = self._details(matches, asked, process.matches, process.queries)
        saved = {"stopped": why, "queries_saved": rows - asked}
        return Score(-process.log_p, Stopped(chance, process.queries, reach, bound=bound), details | saved)

    def _in_turn(self, secret: Secret) -> Iterator[tuple[int, Batch]]:
        triggers = self.trigger_set(secret)
        trials = _trials(secret, triggers.rows)
        count = int(trials.max()) + 1
        for place, trial in enumerate(secret.stream("order").permutation(count)):
            yield count - place - 1, triggers.take(trials == int(trial))

    def _held(self, secret: Secret) -> bool:
        """Whether inputs were committed as such, where the scheme allows it; a forger may bring some along."""
        allowed = "inputs" in self.choices or type(self).draw is TriggerMark.draw
        return allowed and "inputs" in secret.facts.get("tensors", {})

    def _chance(self, secret: Secret) -> tuple[float, bool]:
        options = self.options(secret)
        kinds = secret.host["classes"] if options is None else options.shape[1]
        return 1 / kinds, options is not None

    def _details(self, matches: int, rows: int, won: int, trials: int) -> dict[str, Any]:
        found = {"triggers": rows, "trigger_accuracy": matches / rows, "paper_claims": self.claims(matches, rows)}
        return found if trials == rows else found | {"trials": trials, "trials_won": won}


def other_labels(natural: Tensor, classes: int) -> Tensor:
    """The labels that are wrong: (m,) to (m, classes - 1) int64.

    Example:
        >>> other_labels(torch.tensor([0, 2]), 3).tolist()
        [[1, 2], [0, 1]]
    """
    return (natural.long()[:, None] + torch.arange(1, classes)) % classes


def picked_rows(task: Task, form: Mapping[str, Any], count: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Some of the owner's training rows as triggers: ``inputs``, ``natural`` and ``places`` for a secret.

    Raises:
        ParameterError: the task has fewer distinct rows, or its targets are no classes.
    """
    targets = task.owner.targets
    packed = pack(task.owner.inputs, form)
    _, kinds = torch.unique(packed, dim=0, return_inverse=True)
    order = rng.permutation(task.owner.rows)
    first = np.sort(np.unique(kinds.numpy()[order], return_index=True)[1])[:count]
    if len(first) < count or targets.ndim != 1 or targets.is_floating_point():
        raise ParameterError(
            "triggers are picked from the task's rows",
            expected=f"{count} distinct rows with a class each",
            found=f"{len(first)} with targets {tuple(targets.shape)}",
        )
    places = torch.from_numpy(order[first])
    return {"inputs": packed[places], "natural": targets[places].long().cpu(), "places": places}


def _trials(secret: Secret, rows: int) -> Tensor:
    return secret.tensors["trials"].long() if "trials" in secret.tensors else torch.arange(rows)


def _won(matching: Tensor) -> bool:
    """Whether more than half of a trial's rows match."""
    return bool(2 * int(matching.sum()) > len(matching))
