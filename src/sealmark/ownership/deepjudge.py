"""DeepJudge (Chen et al. 2022): is the suspect's behavior on hard cases that of the model, or that of others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from sealmark.blackbox.crafting import ascend, logits_of, require_real
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.blackbox.points import live_models
from sealmark.core.activations import activations, tapped
from sealmark.core.card import Card
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.ownership import Fingerprint
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.nulls import Population

_RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # shares of the inputs' range
_STEPS = 10
_ACCESS = {
    "label": Access.LABELS,
    "probabilities": Access.LABELS | Access.PROBABILITIES,
    "module": Access.LABELS | Access.PROBABILITIES | Access.MODULE,
}
_METRICS = {"label": 1, "probabilities": 2, "module": 6}


@dataclass(frozen=True)
class Deepjudge(Fingerprint):
    """Distances between suspect and model on test cases, each held against those of unrelated models.

    - RobD, by labels: the difference of their accuracies on adversarial examples against the model (PGD, from
      the rows that it is surest of).
    - JSD, by probabilities: the mean Jensen-Shannon divergence (in nats) of their answers on those.
    - LOD, LAD, NOD, NAD, by a hidden layer: on cases that each drive one of its units, the distance of the
      layer's outputs, the share of units that are active in one alone (above half of the layer's span for that
      case), and both for the driven unit by itself.

    The paper votes: a metric says copy below ``slack`` times the lower bound of the unrelated models' mean, by a
    one-sided t-test. The vote is told, as `details["votes"]`, and decides nothing; between that threshold and the
    nearest reference it reads ``undecided``, where extracted models fall. The verdict is the suspect's rank
    among the references, by minus the mean of its distances, each standardized by the references' mean and
    standard deviation. The references set these, so with several metrics the rank is not exactly uniform.

    Ours, besides: the radius is chosen, the smallest at which the model keeps an accuracy of 0.05 at most and
    the references 0.3 to 0.7 on average, else that of the largest gap; units are driven by sign steps instead
    of fuzzing. Hidden units can be permuted at no cost: pass ``original=`` to `verify` with ``answers="module"``.

    Args:
        cases: how many inputs are asked; as many again drive units.
        answers: what the suspect gives: ``label``, ``probabilities``, or ``module`` for an open one.
        layer: which hidden layer is read, with ``module``.
        slack: of the vote; the paper has 0.9 for answers and 0.6 for layers (from memory).
        confidence: of the vote's bound.
    """

    cases: int = 150
    answers: Literal["label", "probabilities", "module"] = "label"
    layer: str = ""
    slack: float = 0.6
    confidence: float = 0.99

    has_key = False
    card = Card(
        title="Distances of behavior on adversarial cases, and of hidden layers",
        citation="J. Chen, J. Wang, T. Peng, Y. Sun, P. Cheng, S. Ji, X. Ma, B. Li, D. Song, Copy, Right? A "
        "Testing Framework for Copyright Protection of Deep Learning Models, IEEE S&P 2022, arXiv 2112.05588",
        function=("ownership",),
        scenario="black-box",
        mechanism="similarity of behavior on adversarial test cases",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="classifiers of images or vectors",
        needs_training=False,
        needs_data=True,
        needs_trained=True,
        reported="tells fine-tuned, pruned and extracted copies from independent models (from memory, not checked "
        "against the paper)",
        reproduced="digits, three owners (seeds 0 to 2), 20 references trained alike, answers='probabilities'. "
        "RobD 0.00 to 0.12 after fine-tuning (20 epochs at 0.05), at most 0.013 after 10 at 0.01 and pruning 50 % "
        "or 70 %; independent models 0.17 to 0.77. JSD at most 0.046, and 0.095 to 0.353. Within one owner copies "
        "are at least three times nearer, all are voted copies and no independent model is. Knocked off by labels: "
        "no copy; distilled: a copy for one owner of three, else undecided or independent. p 0.048, the least "
        "that 20 can give; 6 of 60 verifications of independent models ranked above all references (2.9 expected; "
        "one model counts three times). False claims: innocent models are voted copies",
        broken_by=(
            "adversarial training of the copy, which changes what RobD measures",
            "permuted hidden units, unless the suspect is aligned first",
            "false claims: cases that fool every model, and made-up references (Liu et al. 2024; measured)",
        ),
        deviations=(
            "rank among unrelated models instead of the vote, which is told",
            "the radius of the cases is chosen by the references",
            "one driven case a unit instead of fuzzing, PGD alone instead of FGSM, PGD and CW",
        ),
        grade="research",
    )

    def __post_init__(self) -> None:
        open_layer = (self.answers == "module") == bool(self.layer)
        if (
            self.answers not in _ACCESS
            or self.cases < 2
            or not (0 < self.slack <= 1 and 0.5 <= self.confidence < 1)
        ):
            raise ParameterError(
                "bad parameters of deepjudge",
                expected="cases >= 2, answers label, probabilities or module, slack in (0, 1], "
                "confidence in [0.5, 1)",
                found=self.parameters,
            )
        if not open_layer:
            raise ParameterError(
                "a layer is read where the suspect is open",
                expected="layer= and answers='module'",
                found=self.layer,
            )

    @property
    def access(self) -> Access:  # type: ignore[override]
        """What ``answers`` says."""
        return _ACCESS[self.answers]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names, in the order of the secret's ``references``."""
        return ("RobD", "JSD", "LOD", "LAD", "NOD", "NAD")[: _METRICS[self.answers]]

    def enroll(
        self,
        model: nn.Module | Weights | Path | str,
        task: Task | None = None,
        *,
        references: Sequence[nn.Module | Weights | Path | str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `Fingerprint.enroll`; needs live models, and two references or more.

        Raises:
            UnknownNameError: no such layer.
            UnsupportedError: the inputs have no gradient.
            MarkFailedError: no radius fools the model.
        """
        model, live = live_models(self.name, model, references)
        form = form_of(task, self.name)
        rows = _surest(cast("Task", task), model, self.cases)
        radius, cases = _fooling(model, live, rows, form)
        secret = self.new_secret(weights_of(model), host=form | {"radius": radius}, owner=owner, rng=rng)
        kept = {"inputs": cases, "classes": rows.targets}
        asked = unpack(cases, form)
        if self.answers != "label":
            kept["answers"] = WhiteBox(model).probabilities(asked)
        kept["rob"] = _accuracy(logits_of(model, asked), rows.targets)
        if self.answers == "module":
            kept |= _driven(model, self.layer, rows, secret)
        table = torch.stack([self.distances(WhiteBox(other), kept, secret.host) for other in live])
        return secret.with_learned(kept | {"references": table})

    def distances(self, suspect: Suspect, kept: Mapping[str, Tensor], form: Mapping[str, Any]) -> Tensor:
        """One number a metric, small for a copy: (k,) float64.

        Args:
            suspect: is asked each case once.
            kept: the secret's tensors.
            form: the secret's host.

        Raises:
            ModelMismatchError: the suspect has other classes, no such layer, or one of another width.
        """
        asked = unpack(kept["inputs"], form)
        if self.answers == "label":
            labels = suspect.labels(asked)
            return (_agreement(labels, kept["classes"]) - kept["rob"]).abs().reshape(1)
        answers = suspect.probabilities(asked).cpu()
        _check_form(answers, kept["answers"])
        robustness = (_accuracy(answers, kept["classes"]) - kept["rob"]).abs()
        found = [robustness, divergence(answers, kept["answers"]).mean()]
        if self.answers == "module":
            model = cast("WhiteBox", suspect).model
            outputs = activations(model, self.layer, unpack(kept["driven"], form)).flatten(1)
            found += _layer_distances(outputs, kept["outputs"], kept["units"])
        return torch.stack([value.double() for value in found])

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Minus the mean standardized distance, against those of the references."""
        table = secret.tensors["references"]
        mean, spread = table.mean(0), table.std(0).clamp_min(1e-9)
        found = self.distances(suspect, secret.tensors, secret.host)
        bounds = self.slack * self._lower_bounds(table)
        nearest = table.amin(0)
        votes = {
            name: "copy" if near <= bound else "undecided" if near < least else "independent"
            for name, near, bound, least in zip(
                self.metrics, found.tolist(), bounds.tolist(), nearest.tolist(), strict=True
            )
        }
        details = {
            "distances": dict(zip(self.metrics, found.tolist(), strict=True)),
            "thresholds": dict(zip(self.metrics, bounds.tolist(), strict=True)),
            "votes": votes,
            "paper_claims": 2 * list(votes.values()).count("copy") > len(votes),
            "radius": secret.host["radius"],
            "references": len(table),
            "nearest_reference": dict(zip(self.metrics, nearest.tolist(), strict=True)),
        }
        population = -((table - mean) / spread).mean(1)
        return Score(float(-((found - mean) / spread).mean()), Population.of(population.tolist()), details)

    def _lower_bounds(self, table: Tensor) -> Tensor:
        """Of each metric's mean over unrelated models, by a one-sided t-test: (m, k) to (k,)."""
        quantile = float(student.ppf(self.confidence, len(table) - 1))
        bound: Tensor = table.mean(0) - quantile * table.std(0) / len(table) ** 0.5
        return bound.clamp_min(0)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row's probabilities, in nats: (N, K) twice to (N,) in 0 .. log 2.

    Example:
        >>> divergence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    one, other = (part.double().clamp(1e-12, 1) for part in (one, other))
    middle = ((one + other) / 2).log()
    apart: Tensor = (one * (one.log() - middle) + other * (other.log() - middle)) / 2
    return apart.sum(1).clamp_min(0)


def _surest(task: Task, model: nn.Module, count: int) -> Batch:
    """Test rows that the model answers rightly, those first of which it is surest by the sum of p^2."""
    require_real(task.test.inputs)
    logits = logits_of(model, task.test.inputs)
    sure = torch.softmax(logits.double(), 1).square().sum(1)
    sure[logits.argmax(1) != task.test.targets] = -1
    order = sure.argsort(descending=True, stable=True)
    return task.test.take(order[: min(count, int((sure >= 0).sum()))])


def _fooling(
    model: nn.Module, references: Sequence[nn.Module], rows: Batch, form: Mapping[str, Any]
) -> tuple[float, Tensor]:
    """The radius, as a share of the range, and the cases, packed; see `Deepjudge`."""
    found: list[tuple[float, float, Tensor]] = []
    span = form["high"] - form["low"]
    for radius in _RADII:
        limits = {"low": form["low"], "high": form["high"]}
        moved = ascend(model, rows.inputs, rows.targets, radius=radius * span, steps=_STEPS, **limits)
        cases = pack(moved, form)
        asked = unpack(cases, form)
        own = float(_accuracy(logits_of(model, asked), rows.targets))
        others = [float(_accuracy(logits_of(other, asked), rows.targets)) for other in references]
        mean = sum(others) / len(others)
        if own <= 0.05:
            if 0.3 <= mean <= 0.7:
                return radius, cases
            found.append((mean - own, radius, cases))
    if not found:
        raise MarkFailedError(
            "no case fools the model",
            expected=f"an accuracy of 0.05 at most within {_RADII[-1]} of the range",
            found=own,
            advice="use another fingerprint",
        )
    return max(found, key=lambda each: each[0])[1:]


class _Hidden(nn.Module):
    """A model that answers with one of its layers."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self._layer = model, layer

    def forward(self, inputs: Tensor) -> Tensor:
        with tapped(self.model, self._layer) as tap:
            self.model(inputs)
            return tap.output.flatten(1)


def _driven(model: nn.Module, layer: str, rows: Batch, secret: Secret) -> dict[str, Tensor]:
    """Of each row a version that drives one keyed unit of the layer, and what the layer says of it."""
    form, hidden = secret.host, _Hidden(model, layer)
    width = logits_of(hidden, rows.inputs[:1]).shape[1]
    units = torch.from_numpy(secret.stream("units").integers(rows.rows, width))
    driven = ascend(
        hidden,
        rows.inputs,
        units[:, None],
        objective=lambda outputs, chosen: outputs.gather(1, chosen)[:, 0],
        radius=form["radius"] * (form["high"] - form["low"]),
        steps=_STEPS,
        low=form["low"],
        high=form["high"],
    )
    packed = pack(driven, form)
    outputs = activations(model, layer, unpack(packed, form)).flatten(1)
    return {"driven": packed, "units": units, "outputs": outputs}


def _layer_distances(found: Tensor, own: Tensor, units: Tensor) -> list[Tensor]:
    """LOD, LAD, NOD, NAD of (N, U) outputs of two layers, where row i drives unit ``units[i]``."""
    _check_form(found, own)
    apart = (found - own).double()
    differ = (_active(found) != _active(own)).double()
    chosen = units[:, None]
    return [
        apart.norm(dim=1).mean(),
        differ.mean(),
        apart.gather(1, chosen).abs().mean(),
        differ.gather(1, chosen).mean(),
    ]


def _check_form(found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape:
        raise ModelMismatchError(
            "the suspect has another form",
            expected=f"answers of shape {tuple(own.shape)}",
            found=tuple(found.shape),
        )


def _active(outputs: Tensor) -> Tensor:
    """Which units are above half of the row's span: (N, U) to (N, U) bool."""
    low, high = outputs.amin(1, keepdim=True), outputs.amax(1, keepdim=True)
    return (outputs - low) > 0.5 * (high - low)


def _accuracy(answers: Tensor, classes: Tensor) -> Tensor:
    return _agreement(answers.argmax(1), classes)


def _agreement(labels: Tensor, classes: Tensor) -> Tensor:
    return (labels == classes).double().mean()
