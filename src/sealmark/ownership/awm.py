"""AWM (Zeng et al. 2025): do two transformers share their attention weights, up to what costs nothing?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Task
from sealmark.core.weights import weights_of
from sealmark.ownership._lineage import Lineage, Source
from sealmark.ownership._transformer import Transformer, spread_ids, unbiased_cka

_ROLES = ("query", "key")


@dataclass(frozen=True)
class Awm(Lineage):
    """Centered kernel alignment of query and key weights, after the residual dimensions were matched.

    The columns of both tables of words are matched by the absolute cosine (Hungarian assignment), which
    gives the order and the signs of the residual dimensions. Then, block by block, the rows of Wq^T and
    Wk^T, which belong to those dimensions, are compared by unbiased linear CKA: it ignores scale and any
    rotation on the head's side. Blocks are matched by assignment where their numbers differ. The statistic
    is the mean over blocks, queries and keys.

    Weights are read one tensor at a time, from files of any size. Of the original, the table for ``words``
    evenly spread words and the attention weights of up to ``blocks`` blocks are kept.

    Ours: orthogonal Procrustes on the tables beside the assignment, the better of the two counts, because
    a rotated residual stream (as QuaRot and SliceGPT make it) defeats the assignment; evenly spread words
    instead of the shared vocabulary's; and p by rank among unrelated models instead of a z-score whose
    standard deviation was not specified.

    Args:
        words: how many rows of the table decide the matching.
        blocks: how many blocks are compared, evenly spread.
        matching: ``both``, ``assignment`` (the paper's) or ``procrustes``.
    """

    words: int = 4096
    blocks: int = 8
    matching: Literal["both", "assignment", "procrustes"] = "both"

    access = Access.WEIGHTS
    card = Card(
        title="Attention weights compared after matching residual dimensions",
        citation="B. Zeng et al., AWM: Accurate Weight-Matrix Fingerprint for Large Language Models, arXiv "
        "2510.06738, ICLR 2026",
        function=("ownership",),
        scenario="white-box",
        mechanism="intrinsic weight fingerprint: unbiased CKA of query and key weights",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="transformers with a table of words",
        needs_training=False,
        needs_data=False,
        reported="60 derived and 90 unrelated pairs of language models separated without error, under 30 s a "
        "pair (abstract)",
        reproduced="small transformers, unrelated ones within 0.05: 0.98 after fine-tuning, 0.91 after pruning "
        "50 %, 1 permuted or rotated (0.09 rotated with the paper's assignment alone). all-MiniLM-L6-v2, "
        "untrained nets within 0.002: 1, 0.99, 1 (0.01). With 20 unrelated models p is 1/21 at the least "
        "(docs/results/lineage.md)",
        broken_by=(
            "another vocabulary in another order: not testable",
            "folding the normalizations' factors into the weights, which scales residual dimensions one by one",
            "training a new model on its answers: the weights are new",
        ),
        deviations=(
            "Procrustes beside the assignment",
            "evenly spread words",
            "rank among unrelated models instead of a z-score",
        ),
        task="tokens",
    )

    def __post_init__(self) -> None:
        if self.words < 8 or self.blocks < 1 or self.matching not in ("both", "assignment", "procrustes"):
            raise ParameterError(
                "bad parameters of awm",
                expected="words >= 8, blocks >= 1, matching both, assignment or procrustes",
                found=self.parameters,
            )

    def record(self, model: Source, task: Task | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The words' vectors, and Wq^T and Wk^T of the chosen blocks."""
        net = Transformer.of(weights_of(model))
        ids = spread_ids(net.vocabulary, self.words)
        chosen = spread_ids(len(net.blocks), self.blocks).tolist()
        kept = {"ids": ids, "words": net.words(ids)}
        for block in chosen:
            for role in _ROLES:
                kept[f"{role}.{block}"] = _rows(net, block, role)
        return {"blocks": len(net.blocks), "chosen": chosen}, kept

    def similarity(self, suspect: Suspect, host: Mapping[str, Any], kept: Mapping[str, Tensor]) -> float:
        """The statistic, -1 to 1: the mean CKA under the better matching of residual dimensions.

        Raises:
            ModelMismatchError: not a transformer, or of another vocabulary.
        """
        net = Transformer.of(suspect.weights)
        words = net.words(kept["ids"])
        found = [self._mean(net, host, kept, turn) for turn in self._turns(kept["words"], words)]
        return max(found)

    def _turns(self, mine: Tensor, theirs: Tensor) -> list[Tensor]:
        """Maps from the suspect's residual dimensions to the original's: (width, width of the suspect)."""
        methods = {"assignment": assignment, "procrustes": procrustes}
        names = methods if self.matching == "both" else [self.matching]
        return [methods[name](mine, theirs) for name in names]

    def _mean(self, net: Transformer, host: Mapping[str, Any], kept: Mapping[str, Tensor], turn: Tensor) -> float:
        chosen: list[int] = host["chosen"]
        same = len(net.blocks) == host["blocks"]
        others = chosen if same else list(range(len(net.blocks)))
        table = np.zeros((len(chosen), len(others)))
        for column, other in enumerate(others):
            turned = {role: turn @ _rows(net, other, role) for role in _ROLES}
            rows = [column] if same else range(len(chosen))
            for row in rows:
                table[row, column] = np.mean(
                    [unbiased_cka(kept[f"{role}.{chosen[row]}"], turned[role]) for role in _ROLES]
                )
        return float(table[linear_sum_assignment(-table)].mean() if not same else np.diag(table).mean())


def assignment(mine: Tensor, theirs: Tensor) -> Tensor:
    """The signed permutation that matches columns best by the absolute cosine: (d, d') of -1, 0, 1."""
    cosines = functional.normalize(mine.double(), dim=0).T @ functional.normalize(theirs.double(), dim=0)
    rows, columns = linear_sum_assignment(-cosines.abs().numpy())
    turn = torch.zeros(cosines.shape)
    turn[rows, columns] = cosines[rows, columns].sign().float()
    return turn


def procrustes(mine: Tensor, theirs: Tensor) -> Tensor:
    """The (semi-)orthogonal map that brings the suspect's vectors closest to the original's: (d, d')."""
    left, _, right = torch.linalg.svd(mine.double().T @ theirs.double(), full_matrices=False)
    turn: Tensor = left @ right
    return turn.float()


def _rows(net: Transformer, block: int, role: str) -> Tensor:
    matrix = net.matrix(block, role)
    assert matrix is not None  # noqa: S101 - `Transformer.of` keeps blocks that have both
    return matrix.T.contiguous()
