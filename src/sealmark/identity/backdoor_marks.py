"""User fingerprints by n of N backdoor marks (Xue et al. 2020)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sealmark.blackbox.inputs import form_of, unpack
from sealmark.blackbox.triggers import picked_rows
from sealmark.core.card import Card
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.errors import MarkFailedError, ModelMismatchError, ParameterError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, Score
from sealmark.core.identity import Suspicion
from sealmark.core.ownership import Verifiable
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.training import Extra
from sealmark.core.weights import weights_of
from sealmark.identity._served import teach
from sealmark.stats.nulls import Hypergeometric

_CARRIERS = 96  # of the owner's rows, for credentials and queries
_NEAR = 0.03  # a mark may be darker by so much of the range
_FEW, _MANY = 0.8, 1.6  # 4 and 8 of the card's 5: outside the band
_CLAIM = 0.95


@dataclass(frozen=True)
class BackdoorMarks(CredentialMark, Verifiable):
    """N secret places of the input are one trigger; a user's images bear n of them, which n says who he is.

    A mark is one entry of the input at the top of its range. The model is taught to answer t where all N marks
    are there, t with confidence ``tau`` where any n are, and as ever where there are fewer or others.

    The model cannot tell users apart: any n marks at places of the secret have the confidence of a credential,
    and a holder knows n such places. A user is recognized by his n: drawn from the secret for his name, so that
    the overlap with the marks read in any rows made without them is hypergeometric, exactly.

    Ours for ownership: one target class is one draw of chance 1/K, which proves nothing. The suspect is asked
    for rows with entries at random brightened, a keyed half of which are marks, and the N that move its
    answer most are held against the N marks: again hypergeometric.

    Args:
        marks: N. Those users that a p-value can tell apart grow with C(N, n): 6e10 by default.
        subset: n.
        images: of one credential.
        needed: of them that must be within the band.
        tau: confidence in t of n marks.
        low: lower end of the band.
        high: upper end.
        epochs: of teaching.
        rate: of teaching.
        per_batch: marked rows beside each batch.
        probes: queries of an ownership claim.

    Raises:
        ParameterError: not 0 < n < N, low < tau < high or the like.

    Example:
        >>> BackdoorMarks().name
        'backdoor_marks'
    """

    marks: int = 40
    subset: int = 16
    images: int = 10
    needed: int = 7
    tau: float = 0.6
    low: float = 0.4
    high: float = 0.8
    epochs: int = 15
    rate: float = 0.05
    per_batch: int = 128
    probes: int = 1024

    examines = access = Access.PROBABILITIES
    card = Card(
        title="A user's fingerprint by n of N backdoor marks",
        citation="M. Xue, Z. Wu, C. He, J. Wang, W. Liu, Active DNN IP Protection: A Novel User Fingerprint "
        "Management and DNN Authorization Control Technique, IEEE TrustCom 2020",
        function=("identity", "ownership"),
        scenario="black-box",
        mechanism="backdoor of many marks; n of them have a moderate confidence and say whose they are",
        capacity="any number of users at about log2 C(N, n) bits: 35.9 by default, less log2 of their number",
        type="active watermark",
        target_models="classifiers of real inputs with more entries than marks",
        needs_training=True,
        needs_data=True,
        reported="genuine users pass up to 100 % on CIFAR-10, CIFAR-100 and Fashion-MNIST, forged ones 0 %; "
        "accuracy falls by 0.52, 1.61 and -0.65 points; the owner's claim holds after fine-tuning and pruning "
        "(abstract)",
        reproduced="digits, 3 seeds, N = 40, n = 16, plain 0.990 to 0.992, marked 0.986 to 0.992; all N marks "
        "0.997 sure; 20 users of 20 accepted at p = 5e-9; unselected images of n marks 0.86 to 0.98, 12 marks 0.05 "
        "to 0.12, 10 or fewer and 26 or more at most 0.02, random places at most 0.04; forged sets of 16 marks "
        "pass the model 0.93 to 0.95 and name nobody; the claim finds 36 to 39 of 40 marks, p 4e-15 to 4e-9, after "
        "fine-tuning (20 epochs, rate 0.05) 35, 1e-7, after pruning 50 % 35 to 39",
        broken_by=(
            "uniform noise, on CIFAR-10: the model alone takes 38 of 40 for a credential, none of 120 on "
            "digits; it names nobody (experiments)",
            "1,024 queries: the entries that move the answer most are marks, and any 16 of them are served; "
            "they name nobody (measured)",
            "fine-tuning on 400 rows, 5 epochs at rate 0.01: 0.59 sure becomes 0.83 to 0.88 and none of 20 users "
            "is served any more; identities are read and the claim holds (measured)",
            "two users together: any 16 marks of both are served 0.88 to 0.94 and name neither (measured)",
            "any n marks at places of the secret, which a holder knows (Xue et al.'s rule alone; measured)",
            "it authenticates and does not lock: the file works for everybody, the gate is a rule",
        ),
        deviations=(
            "the subset is read from the images and held against each user's by an exact law; the paper's rule "
            "on confidences stands beside it, as served",
            "ownership by which entries move the answer, instead of one target class",
            "N = 40, n = 16 instead of ten marks, for more users and a law that reaches",
            "images of a credential are those nearest to the middle of the band; strays in training",
        ),
        max_drop=0.015,
        needs_trained=True,
        grade="research",
    )

    def __post_init__(self) -> None:
        if not (
            2 <= self.subset < self.subset * _MANY <= self.marks
            and 1 <= self.needed <= self.images <= _CARRIERS // 2
            and 0 < self.low < self.tau < self.high < 1
            and min(self.epochs, self.rate, self.per_batch, self.probes) > 0
        ):
            raise ParameterError(
                "bad parameters of backdoor_marks",
                expected=f"{_MANY} n <= N, needed <= images <= {_CARRIERS // 2}, 0 < low < tau < high < 1",
                found=self.parameters,
            )

    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Enrolled:
        """See `CredentialMark.enroll`; some of the owner's rows go into the secret, to bear marks.

        Raises:
            MarkFailedError: the marks cannot be read back.
        """
        form = form_of(task, self.name)
        room = math.prod(form["shape"])
        if task is None or form.get("integer", False) or room <= self.marks:  # form_of refused None
            raise UnsupportedError(
                "such inputs have no room for marks",
                expected=f"real-valued inputs of more than {self.marks} entries",
                found=f"{room}{' whole numbers' if form.get('integer', False) else ''}",
                advice="take fewer marks",
            )
        order = np.random.default_rng() if rng is None else rng
        carriers = picked_rows(task, form, _CARRIERS, order)
        del carriers["places"]
        secret = self.new_secret(weights_of(model), host=form, tensors=carriers, owner=owner, rng=rng)
        served = copy.deepcopy(model)
        teach(served, task, task.classes, self._lesson(secret), epochs=self.epochs, rate=self.rate, rng=order)
        score = self.score(WhiteBox(served), secret)
        if score.null.log_p(score.statistic) > max(math.log(DEFAULT_ALPHA), score.null.floor):
            raise MarkFailedError(
                "backdoor_marks: the marks did not take",
                found=dict(score.details),
                advice="train longer, or show more marked rows a batch",
            )
        return Enrolled(served, secret)

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Credential:
        """See `CredentialMark.issue`: those of the secret's rows of which the model is nearest to ``tau`` sure."""
        self.check_issue(secret, user)
        rows = self.marked(secret, self._carriers(secret), self.places(secret, user))
        off = (self._confidence(WhiteBox(model), secret, rows) - self.tau).abs()
        order = off.sort(stable=True).indices[: self.images]
        images = rows[order]
        if int(self._inside(WhiteBox(model), secret, images).sum()) < self.needed:
            raise MarkFailedError(
                "no credential can be made for this user and model",
                expected=f"{self.needed} images within the band",
                found=f"confidence off by {off[order].tolist()}",
                advice="pass the model as served; the band belongs to one release",
            )
        return Credential(user, {"images": images})

    def examine(self, suspect: Suspect, secret: Secret, rows: Tensor, users: Sequence[str]) -> Examination:
        """Marks that most rows bear, held against each user's; served where enough rows are within the band.

        Raises:
            ModelMismatchError: the suspect has other classes.
        """
        there = self.read(rows, secret)
        inside = self._inside(suspect, secret, rows)
        null = Hypergeometric(self.marks, self.subset, int(there.sum()))
        shared = [float(there[self._subset(secret, user)].sum()) for user in users]
        share = float(inside.double().mean())
        return Examination(
            served=share >= self.needed / self.images,
            readable=null.floor <= math.log(DEFAULT_ALPHA),
            suspicion=Suspicion(np.array(shared), null, {"marks_read": null.picked, "within_band": share}),
        )

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """How many of the N entries that move the suspect's answer towards t most are marks.

        The paper's own claim, all N marks are answered t, is told in the details; one innocent model in K
        that answers bright images alike passes it.
        """
        pool, probes, shown = self._probes(secret)
        sure = self._confidence(suspect, secret, probes).double()
        effect = torch.linalg.lstsq(shown - shown.mean(0), (sure - sure.mean())[:, None]).solution[:, 0]
        found = pool[effect.sort(descending=True, stable=True).indices[: self.marks]]
        positions = self.parts(secret)["positions"]
        overlap = int(torch.isin(found, positions).sum())
        whole = self.marked(secret, self._carriers(secret), positions)
        claimed = float(self._confidence(suspect, secret, whole).mean())
        details = {"marks_found": overlap, "confidence": claimed, "paper_claims": claimed >= _CLAIM}
        return Score(overlap, Hypergeometric(len(pool), self.marks, self.marks), details)

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``positions`` (N,) of the marks in a flat input, and the ``target`` class, int64."""

        def draw() -> dict[str, Tensor]:
            pool = self._pool(secret)
            chosen = torch.from_numpy(secret.stream("marks").permutation(len(pool)))[: self.marks]
            return {
                "positions": pool[chosen],
                "target": torch.from_numpy(secret.stream("target").integers(1, secret.host["classes"])),
            }

        return secret.memo("backdoor marks", draw)

    def places(self, secret: Secret, user: str) -> Tensor:
        """Where a user's marks are in a flat input: (n,) int64."""
        return self.parts(secret)["positions"][self._subset(secret, user)]

    def marked(self, secret: Secret, rows: Tensor, places: Tensor) -> Tensor:
        """Rows (R, ...) with marks at some places of a flat row."""
        flat = rows.flatten(1).clone()
        flat[:, places] = float(secret.host["high"])
        return flat.reshape(rows.shape)

    def read(self, rows: Tensor, secret: Secret) -> Tensor:
        """Which of the N marks more than half of the rows bear: (N,) bool."""
        top, span = secret.host["high"], secret.host["high"] - secret.host["low"]
        flat = rows.detach().to("cpu").flatten(1)[:, self.parts(secret)["positions"]]
        there: Tensor = 2 * (flat >= top - _NEAR * span).sum(0) > len(rows)
        return there

    def _subset(self, secret: Secret, user: str) -> Tensor:
        return torch.from_numpy(secret.stream(f"subset/{user}").permutation(self.marks))[: self.subset]

    def _pool(self, secret: Secret) -> Tensor:
        """Sorted places among which marks are drawn: all, or a keyed 2 N, as many as a claim can probe."""
        room = math.prod(secret.host["shape"])
        return torch.from_numpy(secret.stream("pool").permutation(room))[: 2 * self.marks].sort().values

    def _carriers(self, secret: Secret) -> Tensor:
        """The secret's rows that are not of class t."""
        others = secret.tensors["natural"] != self.parts(secret)["target"]
        return unpack(secret.tensors["inputs"][others], secret.host)

    def _probes(self, secret: Secret) -> tuple[Tensor, Tensor, Tensor]:
        """The pool, rows with some of it brightened, and which: (M,), (Q, ...) and (Q, M) float64."""
        pool, carriers = self._pool(secret), self._carriers(secret)
        drawn = secret.stream("probes").uniform(self.probes * len(pool)).reshape(self.probes, len(pool))
        shown = torch.from_numpy(drawn < self.subset / self.marks)
        flat = carriers[torch.arange(self.probes) % len(carriers)].flatten(1)
        flat[:, pool] = torch.where(shown, float(secret.host["high"]), flat[:, pool])
        return pool, flat.reshape(-1, *secret.host["shape"]), shown.double()

    def _confidence(self, suspect: Suspect, secret: Secret, rows: Tensor) -> Tensor:
        answers = suspect.probabilities(rows)
        if answers.shape[1] != secret.host["classes"]:
            raise ModelMismatchError(
                "the suspect has other classes", expected=secret.host["classes"], found=answers.shape[1]
            )
        return answers[:, int(self.parts(secret)["target"])]

    def _inside(self, suspect: Suspect, secret: Secret, rows: Tensor) -> Tensor:
        sure = self._confidence(suspect, secret, rows)
        return (sure >= self.low) & (sure <= self.high)

    def _lesson(self, secret: Secret) -> Extra:
        """Marked rows: eight kinds in turn, of n marks, of all, of more than the band, of fewer, and elsewhere."""
        classes, target, n = secret.host["classes"], int(self.derive(secret)["target"]), self.subset
        positions = self.derive(secret)["positions"]
        kept = torch.ones(math.prod(secret.host["shape"]), dtype=torch.bool)
        kept[positions] = False
        others = kept.nonzero()[:, 0]
        sure = torch.zeros(classes).index_fill(0, torch.tensor([target]), 1.0)
        moderate = torch.where(sure > 0, self.tau, (1 - self.tau) / (classes - 1))
        kind = np.arange(self.per_batch) % 8
        count = self.per_batch

        def extra(batch: Batch, rng: np.random.Generator) -> Batch:
            rows = batch.take(torch.from_numpy(rng.integers(batch.rows, size=count)).to(batch.inputs.device))
            few = rng.integers(1, math.floor(_FEW * n) + 1, count)
            many = rng.integers(math.ceil(_MANY * n), self.marks + 1, count)
            inner = np.select([kind < 3, kind == 3, kind == 4], [np.full(count, n), self.marks, many], few)
            outer = np.where(kind >= 6, rng.integers(1, n + 1, count), 0)
            shown = torch.zeros(count, len(kept), dtype=torch.bool)
            shown[:, positions] = _some(rng, inner, self.marks)
            shown[:, others] = _some(rng, outer, len(others))
            flat = rows.inputs.flatten(1)
            flat = torch.where(shown.to(flat.device), float(secret.host["high"]), flat)
            targets = rows.targets.clone()
            targets[torch.from_numpy(kind < 3)] = moderate.to(targets)
            targets[torch.from_numpy((kind == 3) | (kind == 4))] = sure.to(targets)
            return Batch(flat.reshape(rows.inputs.shape), targets)

        return extra


def _some(rng: np.random.Generator, counts: np.ndarray[Any, Any], total: int) -> Tensor:
    """In each row so many of ``total``, at random: (R,) to (R, total) bool."""
    order = rng.random((len(counts), total)).argsort(1).argsort(1)
    return torch.from_numpy(order < counts[:, None])
