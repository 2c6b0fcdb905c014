"""Dataset inference: is the suspect surer of the rows that the owner trained on than of those he held out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import t as student
from torch import Tensor, nn

from sealmark.blackbox.crafting import require_real
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Score
from sealmark.core.modes import seeded
from sealmark.core.ownership import Fingerprint
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.nulls import Permutation

_HIDDEN, _FIT_STEPS, _FIT_RATE = 100, 1000, 0.1  # of the paper's regressor
_RULE = 0.01  # the paper's level
_CHUNK = 10_000  # divisions at a time


@dataclass(frozen=True, repr=False)
class Divisions(Permutation):
    """Rank of the true division into trained and held-out rows among random ones."""

    def __str__(self) -> str:
        return f"rank among {len(self.statistics)} random divisions of the same rows"


@dataclass(frozen=True)
class DatasetInference(Fingerprint):
    """Mean distance to the suspect's boundary, of trained rows less that of held-out rows (blind walk).

    From each row one walks along keyed noise until the answer is no longer the row's label. Learning a row moves
    the boundary away from it, and models that are learned from such a model inherit part of that.

    What is assumed: that one random permutation of rows divided them into the owner's and his held-out ones, as
    in our tasks, and that an innocent suspect was made without knowledge of that division. Then, given the rows
    and the suspect, every division is as likely as the true one, and the rank among random divisions is exact,
    whatever the suspect is. The paper's t-test assumes independent normal confidences on top. Somebody else
    who trained on the owner's rows knows the division, and is flagged.

    With ``fitted`` rows the paper's regressor weighs the distances. It is fitted to the model's answers on rows
    that are no evidence, but the model has seen all of the owner's rows: the law then assumes also that 30
    distances along random directions cannot hold which evidence row is whose.

    A division can be made up after the fact, to suit a suspect: a match proves nothing without a commitment
    from before. Each dispute reveals the evidence rows to whoever runs or checks the test.

    Args:
        evidence: trained rows that are shown, and as many held-out ones.
        fitted: rows of each kind for the paper's regressor; 0 takes the plain mean of the distances.
        draws: of each of three noises: uniform, normal, Laplace.
        noise: standard deviation of one step, as a share of the task's range.
        steps: of a walk; a row that keeps its label counts as one more.
        relabelings: random divisions; the p-value goes down to ``1 / (relabelings + 1)``.

    Raises:
        ParameterError: fewer than two evidence rows, one row to fit, or nothing to draw.

    Example:
        >>> DatasetInference(fitted=50).parameters["relabelings"]
        99999
    """

    evidence: int = 100
    fitted: int = 0
    draws: int = 10
    noise: float = 0.03
    steps: int = 20
    relabelings: int = 99_999

    access = Access.LABELS
    has_key = False

    card = Card(
        title="Dataset inference by blind walks",
        citation="P. Maini, M. Yaghini, N. Papernot, Dataset Inference: Ownership Resolution in Machine Learning, "
        "ICLR 2021",
        function=("ownership",),
        scenario="black-box",
        mechanism="distances to the decision boundary, larger at rows that were trained on than at held-out ones",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="classifiers of real-valued inputs that fit their training rows better than others",
        needs_training=False,
        needs_data=True,
        reported="CIFAR-10, 10 rows (the authors' notebook): p 1e-42 for the model, 1e-27 fine-tuned, 1e-5 "
        "distilled, 1e-4 extracted by labels, 0.68 for an independent model",
        reproduced="digits under noise, 200 rows, test accuracy 0.6, three seeds: p 1e-5, the floor, for the "
        "model, pruned, extracted on the owner's inputs, and for another model of the same rows; fine-tuned 1e-5 "
        "to 2e-4; knockoff on other rows 5e-5 to 0.2; six models of others 0.3 to 0.9. With the paper's "
        "regressor on 50 and 50 rows: 5e-5 at most, fine-tuned 0.004 to 0.06, knockoff 0.04 to 0.5, others "
        "0.1 to 0.9. On clean digits (one seed) the model itself does not reach 1e-3",
        broken_by=(
            "extraction on other rows than the owner's (measured)",
            "generalizing well: without a gap between trained and held-out rows there is nothing to see (measured)",
            "adversarial training; the paper's test accuses independent models of the same distribution "
            "(Szyller, Zhang, Liu and Asokan, TMLR 2023)",
            "false claims by a division made up for a suspect, without a commitment from before (Liu et al. 2024)",
        ),
        deviations=(
            "the exact rank among random divisions instead of Welch's t-test, which is told in the details with "
            "a level of 0.01 (from memory, not checked against the paper)",
            "the plain mean of distances by default, since the paper's regressor is fitted to a model that has "
            "seen the evidence rows",
            "the same directions for all rows, and one test on all evidence instead of a mean over samples",
            "distances are counted in steps; a row that is answered wrongly counts 0",
        ),
        task="noisy_digits",
        grade="research",
    )

    def __post_init__(self) -> None:
        counts = min(self.evidence - 1, self.draws, self.steps, self.relabelings)
        if counts < 1 or self.fitted == 1 or self.fitted < 0 or not self.noise > 0:
            raise ParameterError(
                "bad parameters of dataset_inference",
                expected="evidence >= 2, fitted 0 or >= 2, draws, steps and relabelings >= 1, noise > 0",
                found=self.parameters,
            )

    def enroll(
        self,
        model: nn.Module | Weights | Path | str,
        task: Task | None = None,
        *,
        references: Sequence[nn.Module | Weights | Path | str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `Fingerprint.enroll`; uses no references. The task's owner rows must be what the model learned.

        Raises:
            ParameterError: no classes, too few rows, or a regressor and no live model.
            UnsupportedError: inputs are whole numbers, on which no noise can be added.
        """
        form = form_of(task, self.name)
        assert task is not None  # noqa: S101 - form_of refuses None
        require_real(task.owner.inputs)
        wanted = self.evidence + self.fitted
        if min(task.owner.rows, task.test.rows) < wanted or (self.fitted and not isinstance(model, nn.Module)):
            raise ParameterError(
                f"{self.name} needs rows of both kinds, and a live model to fit a regressor",
                expected=f"{wanted} trained and {wanted} held-out rows",
                found=f"{task.owner.rows} and {task.test.rows}, and {type(model).__name__}",
                advice="lower evidence, or fitted to 0",
            )
        rng = np.random.default_rng() if rng is None else rng
        secret = self.new_secret(weights_of(model), host=form, owner=owner, rng=rng)
        order = [torch.from_numpy(rng.permutation(rows.rows)) for rows in (task.owner, task.test)]

        def rows(part: slice) -> Batch:
            both = task.owner.take(order[0][part]).join(task.test.take(order[1][part]))
            return Batch(pack(both.inputs, form), both.targets)

        shown = rows(slice(0, self.evidence))
        learned = {"inputs": shown.inputs, "labels": shown.targets}
        if self.fitted and isinstance(model, nn.Module):
            learned |= _fit(self.walks(WhiteBox(model), rows(slice(self.evidence, wanted)), secret), rng)
        return secret.with_learned(learned)

    def walks(self, suspect: Suspect, rows: Batch, secret: Secret) -> Tensor:
        """How far each row is from another answer than its label, along each direction, in steps.

        Args:
            suspect: answers labels; asked again only about walks that have not ended.
            rows: packed inputs (N, ...) and labels (N,).
            secret: names the directions.

        Returns:
            (N, 3 draws) in 0 .. steps + 1, everything of one row in one row; 0 where it is answered wrongly itself.
        """
        inputs, ways = unpack(rows.inputs, secret.host), self._directions(secret)
        right = suspect.labels(inputs) == rows.targets
        far = torch.where(right[:, None], float(self.steps + 1), 0.0).repeat(1, len(ways))
        for step in range(1, self.steps + 1):
            row, way = torch.nonzero(far > self.steps, as_tuple=True)
            if len(row) == 0:
                break
            left = suspect.labels(inputs[row] + step * ways[way]) != rows.targets[row]
            far[row[left], way[left]] = step
        return far

    def _directions(self, secret: Secret) -> Tensor:
        """One step of each walk: (3 draws, ...), the three noises one after the other."""

        def make() -> Tensor:
            form = secret.host
            count, span = self.draws * math.prod(form["shape"]), form["high"] - form["low"]
            flat, bell, peak = (secret.stream(f"noise {kind}").uniform(count) for kind in range(3))
            centred = peak - 0.5
            laplace = -np.sign(centred) * np.log1p(-2 * np.abs(centred)) / math.sqrt(2)
            noises = np.stack([(flat - 0.5) * math.sqrt(12), ndtri(bell), laplace])
            return torch.from_numpy(noises * self.noise * span).float().reshape(-1, *form["shape"])

        return secret.memo("directions", make)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Mean confidence at trained rows less that at held-out ones, against other divisions of the same rows."""
        far = self.walks(suspect, Batch(secret.tensors["inputs"], secret.tensors["labels"]), secret)
        sure = (_regressed(far, secret) if self.fitted else far.mean(1)).double().numpy()
        trained, held_out = sure[: self.evidence], sure[self.evidence :]
        difference = float(trained.mean() - held_out.mean())
        chosen = [part.astype(np.float64) @ sure for part in self._divisions(secret)]
        others = (2 * np.concatenate(chosen) - sure.sum()) / self.evidence
        welch = _welch(trained, held_out)
        details = {
            "revealed_rows": 2 * self.evidence,
            "walk_trained": float(far[: self.evidence].mean()),
            "walk_held_out": float(far[self.evidence :].mean()),
            "welch_p": welch,
            "paper_claims": welch < _RULE,
        }
        # sums in another order differ in the last bits, and a tie must count as one
        return Score(round(difference, 9), Divisions(tuple(np.round(others, 9).tolist())), details)

    def _divisions(self, secret: Secret) -> list[NDArray[np.bool_]]:
        """Uniform choices of ``evidence`` of the shown rows, (<= 10,000, rows) each, from the secret's stream."""

        def make() -> list[NDArray[np.bool_]]:
            rows, stream = 2 * self.evidence, secret.stream("divisions")
            parts = []
            for start in range(0, self.relabelings, _CHUNK):
                count = min(_CHUNK, self.relabelings - start)
                words = stream.words(count * rows, offset=start * rows).reshape(count, rows)
                middle = np.partition(words, self.evidence - 1, axis=1)[:, self.evidence - 1]
                parts.append(words <= middle[:, None])
            return parts

        return secret.memo("divisions", make)


def _fit(far: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """The paper's regressor: 30-100-1, tanh, large for the first half of the rows; standardized by that half."""
    half = len(far) // 2
    mean, spread = far[:half].mean(0), far[:half].std(0).clamp_min(1e-6)
    kinds = torch.ones(len(far)).index_fill(0, torch.arange(half, len(far)), -1.0)
    with seeded(rng):
        net = nn.Sequential(nn.Linear(far.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1), nn.Tanh())
    descent = torch.optim.SGD(net.parameters(), lr=_FIT_RATE)
    for _ in range(_FIT_STEPS):
        loss = -(kinds * net((far - mean) / spread)[:, 0]).mean()
        descent.zero_grad(set_to_none=True)
        loss.backward()
        descent.step()
    return {"mean": mean, "spread": spread, **{f"net {name}": part for name, part in net.state_dict().items()}}


def _regressed(far: Tensor, secret: Secret) -> Tensor:
    part = secret.tensors
    hidden = (far - part["mean"]) / part["spread"] @ part["net 0.weight"].T + part["net 0.bias"]
    return (hidden.relu() @ part["net 2.weight"].T + part["net 2.bias"]).tanh()[:, 0]


def _welch(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """P-value of Welch's one-sided test that ``one`` has the larger mean; 1 where nothing varies."""
    shares = [float(part.var(ddof=1)) / len(part) for part in (one, other)]
    error = sum(shares)
    if error == 0:
        return 1.0
    freedom = error**2 / sum(share**2 / (len(part) - 1) for share, part in zip(shares, (one, other), strict=True))
    return float(student.sf((one.mean() - other.mean()) / math.sqrt(error), freedom))
