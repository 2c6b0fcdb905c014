"""HuRef (Zeng et al. 2024): invariant products of a transformer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sealmark.core.card import Card
from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Task
from sealmark.core.weights import weights_of
from sealmark.ownership._lineage import Lineage, Source
from sealmark.ownership._transformer import Transformer, spread_ids


@dataclass(frozen=True)
class Huref(Lineage):
    """Cosine of three products that no change of basis moves, in the last blocks.

    With X the vectors of some words: X Wq^T Wk X^T, X Wv^T Wo^T X^T, and X (gate * up)^T down^T X^T, or
    X up^T down^T X^T where the net has no gate. They stay as they are when residual dimensions are
    permuted or rotated, heads change basis, or hidden units change places. Each is standardized; the
    statistic is the mean of the cosines with the original's.

    Ours: evenly spread words, where the paper takes the most frequent ones of a corpus; p by rank among
    unrelated models. The baseline for `awm`.

    Args:
        words: how many; the products are words x words.
        blocks: the last so many; the paper has 2.
    """

    words: int = 512
    blocks: int = 2

    access = Access.WEIGHTS
    card = Card(
        title="Invariant products of attention and feed-forward weights",
        citation="B. Zeng, L. Wang, Y. Hu, Y. Xu, C. Zhou, X. Wang, Y. Yu, Z. Lin, HuRef: HUman-REadable "
        "Fingerprint for Large Language Models, NeurIPS 2024, arXiv 2312.04828",
        function=("ownership",),
        scenario="white-box",
        mechanism="intrinsic weight fingerprint: invariant terms",
        capacity="zero-bit",
        type="passive fingerprint",
        target_models="transformers with a table of words",
        needs_training=False,
        needs_data=False,
        reported="cosines near 1 for derived language models and near 0 for unrelated ones (from memory, not "
        "checked against the paper)",
        reproduced="small transformers, unrelated ones within 0.02: 0.99 after fine-tuning, 0.90 after pruning "
        "50 %, 1 permuted or rotated; all-MiniLM-L6-v2: 1, 0.89, 1, untrained nets within 0.002 "
        "(docs/results/lineage.md)",
        broken_by=(
            "another order of the vocabulary",
            "heavy continued training: the products fall off faster than the similarity of awm",
            "folding the normalizations' factors into the weights",
        ),
        deviations=("evenly spread words", "rank among unrelated models"),
        task="tokens",
    )

    def __post_init__(self) -> None:
        if self.words < 8 or self.blocks < 1:
            raise ParameterError(
                "bad parameters of huref", expected="words >= 8, blocks >= 1", found=self.parameters
            )

    def record(self, model: Source, task: Task | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The standardized products."""
        net = Transformer.of(weights_of(model))
        ids = spread_ids(net.vocabulary, self.words)
        products = self._products(net, ids)
        return {"products": sorted(products)}, {"ids": ids, **products}

    def similarity(self, suspect: Suspect, host: Mapping[str, Any], kept: Mapping[str, Tensor]) -> float:
        """The mean cosine, -1 to 1.

        Raises:
            ModelMismatchError: not a transformer, of another vocabulary, or without those products.
        """
        found = self._products(Transformer.of(suspect.weights), kept["ids"])
        if sorted(found) != host["products"]:
            raise ModelMismatchError(
                "the suspect's blocks have another form", expected=host["products"], found=sorted(found)
            )
        cosines = [torch.cosine_similarity(kept[k].flatten(), found[k].flatten(), 0) for k in host["products"]]
        return float(torch.stack(cosines).mean())

    def _products(self, net: Transformer, ids: Tensor) -> dict[str, Tensor]:
        words, found = net.words(ids), dict[str, Tensor]()
        for back in range(1, min(self.blocks, len(net.blocks)) + 1):
            block = len(net.blocks) - back
            parts = {role: net.matrix(block, role) for role in ("query", "key", "value", "output", "up", "down")}
            gate = net.matrix(block, "gate")
            if gate is not None and parts["up"] is not None:
                parts["up"] = gate * parts["up"]
            for name, first, second in (
                ("attention", parts["query"], parts["key"]),
                ("values", parts["value"], _turned(parts["output"])),
                ("hidden", parts["up"], _turned(parts["down"])),
            ):
                if first is not None and second is not None and first.shape == second.shape:
                    product = (words @ first.T) @ (second @ words.T)
                    found[f"{name}.{back}"] = (product - product.mean()) / product.std().clamp_min(1e-12)
        return found


def _turned(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T
