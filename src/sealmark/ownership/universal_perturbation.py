"""One perturbation for all inputs (Peng et al. 2022): does the suspect answer it as the model does?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_ind_from_stats
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from sealmark.blackbox.crafting import frozen, logits_of, require_real
from sealmark.blackbox.inputs import form_of, pack, unpack
from sealmark.blackbox.points import live_models, sources
from sealmark.core.card import Card
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.modes import chunks, device_of
from sealmark.core.ownership import Fingerprint
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.training import train
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.nulls import Population

_BATCH = 100  # rows of one step of the perturbation
_WIDTHS = (64, 32)  # of the encoder's two layers
_FIT_STEPS, _FIT_RATE, _TEMPERATURE = 150, 1e-3, 0.1  # of the encoder


@dataclass(frozen=True)
class UniversalPerturbation(Fingerprint):
    """Answers to chosen rows, and to the same rows plus one perturbation that was made to fool the model.

    The perturbation ascends the model's loss on the owner's rows, by signs. K-means spreads test rows over the
    model's logits. A print takes one row of every cluster: the suspect's probabilities there and at the perturbed
    row, one after the other. The statistic is the mean over prints of the cosine similarity between suspect and
    model, of the prints themselves or of what an encoder makes of them.

    The encoder learns, by the supervised contrastive loss, that prints of the model and of surrogates, trained on
    its answers, belong together, and those of every reference among themselves. Surrogates and references are
    trained for it here: the references given to `enroll` teach nothing, so that their similarities are the law.
    It is off by default, since plain similarity tells more at this scale; see the card.

    Args:
        points: rows of one print, which is the number of clusters.
        prints: how many prints are compared.
        depth: rows of each cluster that prints draw from; at most ``2 * points * depth`` queries.
        radius: largest change of an entry, as a share of the task's range.
        passes: over the owner's rows, for the perturbation.
        encoder: compare what the encoder makes of prints, as the paper does.
        shadows: how many surrogates the encoder learns from, and how many references.
        epochs: of each of their trainings.
        level: p-value at which the paper accuses (a confidence of 99.99 %); told in the details, decides nothing.

    Raises:
        ParameterError: points, prints or shadows under 2, other counts under 1, radius or level outside 0 to 1.

    Example:
        >>> UniversalPerturbation(encoder=True, shadows=10, epochs=10).level
        0.0001
    """

    points: int = 20
    prints: int = 20
    depth: int = 10
    radius: float = 0.25
    passes: int = 20
    encoder: bool = False
    shadows: int = 4
    epochs: int = 4
    level: float = 1e-4

    access = Access.PROBABILITIES
    has_key = False

    card = Card(
        title="Universal adversarial perturbation",
        citation="Z. Peng, S. Li, G. Chen, C. Zhang, H. Zhu, M. Xue, Fingerprinting Deep Neural Networks Globally "
        "via Universal Adversarial Perturbations, CVPR 2022, arXiv 2202.08602",
        function=("ownership",),
        scenario="black-box",
        mechanism="similarity of answers to one perturbation of many inputs",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="differentiable classifiers of real-valued inputs",
        needs_training=False,
        needs_data=True,
        needs_trained=True,
        reported="a confidence above 99.99 % within 20 fingerprints of a stolen model",
        reproduced="digits, 20 references, nine other independent models, four derived ones (fine-tuned 10 epochs "
        "at 0.01 and 20 at 0.05, pruned 50 % and 70 %). Settings are the best of ten on owners of seeds 0 to 2, "
        "three draws each, where the mean AUC of derived against all others is 1.000, with the encoder 0.992, "
        "without a perturbation 0.926. Held-out owners of seeds 3 to 5, other independent models: 0.993 (least "
        "0.957: the long fine-tuning crosses), 0.930 and 0.851. First draw of these: itself 1.00, pruned at least "
        "0.992, fine-tuned at least 0.969, adversarially fine-tuned at least 0.973, models of other origin 0.922 "
        "to 0.969. Of six owners, extraction by probabilities was accused for three, distilling for one, "
        "extraction by labels for none; with an encoder of 10 and 10 shadow models of 10 epochs one of these 18 "
        "was accused, and 3 of 24 derived ones were missed. "
        "p 0.048, the least that 20 can give; 4 of 54 verifications of independent models ranked above all "
        "references (2.6 expected; one model counts three times)",
        broken_by=(
            "extraction by labels, and half of the time by probabilities (measured)",
            "false claims: rows that every model answers alike, and made-up references, convict the innocent by "
            "the paper's test (measured)",
            "the paper's test counts prints, not models: with honest references it accused in 7 of 54 "
            "verifications of independent models (measured)",
        ),
        deviations=(
            "similarity of the prints themselves by default, the encoder as a mode",
            "rank among references instead of a two-sample t-test, which is told in the details (from memory, not "
            "checked against the paper)",
            "k-means over the logits, since which layer is the embedding is not known",
            "sign steps on batches make the perturbation",
            "few and quick shadow models; each reference is an origin of its own in the contrastive loss",
        ),
        grade="research",
    )

    def __post_init__(self) -> None:
        least = min(self.points, self.prints, self.shadows) >= 2 and min(self.depth, self.passes, self.epochs) >= 1
        if not least or not (0 < self.radius <= 1 and 0 < self.level < 1):
            raise ParameterError(
                f"bad parameters of {self.name}",
                expected="points, prints, shadows >= 2, other counts >= 1, radius in (0, 1], level in (0, 1)",
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
        """See `Fingerprint.enroll`; needs live models, and two references or more.

        Raises:
            MarkFailedError: too few test rows that the model answers rightly.
            UnsupportedError: inputs have no gradient.
        """
        model, live = live_models(self.name, model, references)
        form, task = form_of(task, self.name), cast("Task", task)
        require_real(task.owner.inputs)
        rng = np.random.default_rng() if rng is None else rng
        secret = self.new_secret(weights_of(model), host=form, owner=owner, rng=rng)
        moved = universal(model, task.owner.inputs, self.radius, self.passes, form, rng)
        rows, prints = self._spread(model, task, rng)
        kept = {"inputs": pack(torch.cat([rows, rows + moved]), form), "prints": prints}
        asked = unpack(kept["inputs"], form)
        kept["answers"] = WhiteBox(model).probabilities(asked).cpu()
        if self.encoder:
            kept |= self._encoder(model, task, asked, prints, rng)
        table = [self.similarities(WhiteBox(other), kept, form) for other in live]
        return secret.with_learned(kept | {"references": torch.stack(table)})

    def _spread(self, model: nn.Module, task: Task, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Test rows of every cluster, (R, ...), and which of them each print takes, (prints, points) int64."""
        right = sources(task, model, task.test.rows, rng).inputs
        if len(right) < self.points:
            raise MarkFailedError(
                "too few rows that the model answers rightly",
                expected=f"{self.points} test rows or more",
                found=len(right),
                advice="ask for fewer points",
            )
        means = KMeans(self.points, n_init=1, random_state=int(rng.integers(2**31)))
        cluster = means.fit_predict(logits_of(model, right).numpy())
        members = [np.flatnonzero(cluster == number)[: self.depth] for number in range(self.points)]
        sizes = [len(rows) for rows in members]
        starts = np.cumsum([0, *sizes[:-1]])
        columns = [start + rng.integers(size, size=self.prints) for start, size in zip(starts, sizes, strict=True)]
        return right[torch.from_numpy(np.concatenate(members))], torch.from_numpy(np.stack(columns, 1))

    def similarities(self, suspect: Suspect, kept: Mapping[str, Tensor], form: Mapping[str, Any]) -> Tensor:
        """Of each print between suspect and model, -1 to 1: (prints,) float64.

        Args:
            suspect: is asked every row once as it is and once perturbed.
            kept: the secret's tensors.
            form: the secret's host.

        Raises:
            ModelMismatchError: the suspect has other classes.
        """
        answers = suspect.probabilities(unpack(kept["inputs"], form)).cpu()
        if answers.shape != kept["answers"].shape:
            raise ModelMismatchError(
                "the suspect has another form",
                expected=f"answers of shape {tuple(kept['answers'].shape)}",
                found=tuple(answers.shape),
            )
        found, own = (prints_of(each, kept["prints"]) for each in (answers, kept["answers"]))
        if self.encoder:
            found, own = (encoded(each, [kept["first"], kept["second"]]) for each in (found, own))
        return functional.cosine_similarity(found.double(), own.double(), dim=1)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """The mean similarity, against those of the references."""
        table = secret.tensors["references"]
        found = self.similarities(suspect, secret.tensors, secret.host)
        population = table.mean(1)
        paper_p = _welch(found, table.flatten())
        rows, moved = secret.tensors["answers"].argmax(1).chunk(2)
        details = {
            "similarity": float(found.mean()),
            "nearest_reference": float(population.max()),
            "references": len(table),
            "paper_p": paper_p,
            "paper_claims": paper_p <= self.level,
            "fooled": float((rows != moved).double().mean()),
        }
        return Score(float(found.mean()), Population.of(population.tolist()), details)

    def _encoder(
        self, model: nn.Module, task: Task, asked: Tensor, prints: Tensor, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Its two layers, (D, 64) and (64, 32), from prints of shadow models.

        A half of the surrogates learns from scratch, the others are the model, fine-tuned on its own labels.
        Every second reference knows only half of the rows, as a stranger has other data.
        """
        copies = [self._surrogate(number % 2 == 1, model, task, rng) for number in range(self.shadows)]
        others = [self._reference(number % 2 == 1, model, task, rng) for number in range(self.shadows)]
        pool = [model, *copies, *others]
        shown = torch.cat([prints_of(logits_of(each, asked).softmax(1), prints) for each in pool])
        origin = torch.tensor([0] * (1 + len(copies)) + list(range(1, 1 + len(others))))
        sizes = (shown.shape[1], *_WIDTHS)
        layers = [_layer(rng, *shape) for shape in pairwise(sizes)]
        adam = torch.optim.Adam(layers, lr=_FIT_RATE)
        with torch.enable_grad():
            for _ in range(_FIT_STEPS):
                loss = contrastive(encoded(shown, layers), origin.repeat_interleave(len(prints)))
                adam.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
        return {name: layer.detach() for name, layer in zip(("first", "second"), layers, strict=True)}

    def _surrogate(self, tuned: bool, model: nn.Module, task: Task, rng: np.random.Generator) -> nn.Module:
        answers = logits_of(model, task.owner.inputs)
        start = copy.deepcopy(model).requires_grad_(True) if tuned else task.model(rng).to(device_of(model))
        targets = answers.argmax(1) if tuned else answers.softmax(1)
        return self._trained(start, Batch(task.owner.inputs, targets), task, rng)

    def _reference(self, partly: bool, model: nn.Module, task: Task, rng: np.random.Generator) -> nn.Module:
        count = task.owner.rows // 2 if partly else task.owner.rows
        rows = task.owner.take(torch.from_numpy(rng.permutation(task.owner.rows)[:count]))
        return self._trained(task.model(rng).to(device_of(model)), rows, task, rng)

    def _trained(self, model: nn.Module, rows: Batch, task: Task, rng: np.random.Generator) -> nn.Module:
        recipe = replace(task.recipe, epochs=self.epochs)
        train(model, rows, loss=functional.cross_entropy, recipe=recipe, rng=rng, augment=task.augment)
        return model.eval()


def universal(
    model: nn.Module,
    inputs: Tensor,
    radius: float,
    passes: int,
    form: Mapping[str, Any],
    rng: np.random.Generator,
) -> Tensor:
    """One change for all inputs that raises the model's loss against its own answers: sign steps on batches.

    Args:
        model: on any device; left as it is.
        inputs: (N, ...) real.
        radius: largest change of an entry (l-infinity), as a share of the range.
        passes: over the inputs.
        form: ``low`` and ``high``, the range in which a changed input stays.
        rng: order of the inputs.

    Returns:
        (1, ...) on the CPU.
    """
    device, labels = device_of(model), logits_of(model, inputs).argmax(1)
    limit = radius * (form["high"] - form["low"])
    step = 2.5 * limit / (passes * -(-len(inputs) // _BATCH))
    moved = torch.zeros_like(inputs[:1], device=device)
    with frozen(model):
        for _ in range(passes):
            for rows in chunks(torch.from_numpy(rng.permutation(len(inputs))), _BATCH):
                leaf = moved.clone().requires_grad_(True)
                logits = model((inputs[rows].to(device) + leaf).clamp(form["low"], form["high"]))
                loss = functional.cross_entropy(logits, labels[rows].to(device))
                slope = torch.autograd.grad(loss, leaf)[0]
                moved = (moved + step * slope.sign()).clamp(-limit, limit)
    return moved.to("cpu")


def prints_of(answers: Tensor, prints: Tensor) -> Tensor:
    """What each print reads, unperturbed and perturbed answers in turn: (2R, K) and (V, P) to (V, 2PK).

    Example:
        >>> prints_of(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([[1, 0], [1, 1]]))
        tensor([[ 2., -2.,  1., -1.],
                [ 2., -2.,  2., -2.]])
    """
    pairs = torch.stack(answers.chunk(2), 1)  # (R, 2, K)
    return pairs[prints].flatten(1)


def encoded(prints: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """On the unit sphere: (N, D) and layers (D, H), (H, E) to (N, E)."""
    return functional.normalize((prints @ layers[0]).relu() @ layers[1], dim=1)


def contrastive(points: Tensor, origin: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020): every point near those of its origin, far from others.

    Args:
        points: (N, E) of length 1.
        origin: (N,) int64; each has two points or more.

    Returns:
        Mean over points of minus the mean log share that those of the same origin have in its similarities.

    Example:
        >>> points, origin = torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1])
        >>> bool(contrastive(points, origin) < 1e-3 < contrastive(points, torch.tensor([0, 1, 0, 1])))
        True
    """
    itself = torch.eye(len(points), dtype=torch.bool)
    logs = (points @ points.T / _TEMPERATURE).masked_fill(itself, -1e9).log_softmax(1)
    same = ((origin[:, None] == origin) & ~itself).to(logs)
    return -((logs * same).sum(1) / same.sum(1)).mean()


def _layer(rng: np.random.Generator, inputs: int, outputs: int) -> Tensor:
    values: NDArray[np.float64] = rng.normal(0, (2 / inputs) ** 0.5, (inputs, outputs))
    return torch.from_numpy(values).float().requires_grad_(True)


def _welch(found: Tensor, others: Tensor) -> float:
    """One-sided p-value of Welch's t-test that ``found`` has the larger mean."""
    sides = [(float(side.mean()), max(float(side.std()), 1e-9), len(side)) for side in (found, others)]
    return float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False, alternative="greater").pvalue)
