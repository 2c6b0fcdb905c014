"""Where a transformer keeps what: embeddings, attention and feed-forward weights, by the names in use."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sealmark.core.errors import ModelMismatchError
from sealmark.core.weights import Weights

_EMBEDDING = re.compile(r"(word_embeddings|embed_tokens|wte|tok_embeddings|token_embedding)\.weight$")
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_ROLES = {
    "query": re.compile(r"(q_proj|query|q_lin|to_q|wq)\.weight$"),
    "key": re.compile(r"(k_proj|key|k_lin|to_k|wk)\.weight$"),
    "value": re.compile(r"(v_proj|value|v_lin|to_v|wv)\.weight$"),
    "fused": re.compile(r"(in_proj_weight|(c_attn|qkv|query_key_value|qkv_proj)\.weight)$"),
    "output": re.compile(r"(o_proj|attention\.output\.dense|attn\.c_proj|out_proj|out_lin|to_out|wo)\.weight$"),
    "gate": re.compile(r"(gate_proj|w1)\.weight$"),
    "up": re.compile(r"(up_proj|intermediate\.dense|c_fc|fc1|lin1|linear1|w3)\.weight$"),
    "down": re.compile(r"(down_proj|(?<!attention\.)output\.dense|mlp\.c_proj|fc2|lin2|linear2|w2)\.weight$"),
}
_FUSED = ("query", "key", "value")
_TURNED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")  # (inputs, outputs), as GPT-2 has it


@dataclass(frozen=True)
class Transformer:
    """A transformer's tensors, found by their names and loaded one at a time.

    Attributes:
        weights: all of them.
        embedding: name of the (vocabulary, width) table of words.
        blocks: for each block, the tensor of each role.
    """

    weights: Weights
    embedding: str
    blocks: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, weights: Weights) -> Transformer:
        """Find the parts.

        Raises:
            ModelMismatchError: there is no table of words, or no block with queries and keys.
        """
        tables = [name for name in weights if _EMBEDDING.search(name)]
        blocks: dict[int, dict[str, str]] = {}
        for name in weights:
            place = _BLOCK.search(name)
            role = next((role for role, names in _ROLES.items() if names.search(name)), None)
            if place and role and len(weights.info[name].shape) == 2:
                blocks.setdefault(int(place[1]), {})[role] = name
        whole = [blocks[i] for i in sorted(blocks) if {"query", "key"} <= blocks[i].keys() or "fused" in blocks[i]]
        if not tables or not whole:
            raise ModelMismatchError(
                "not a transformer whose tensors can be told apart",
                expected="a table such as embed_tokens.weight, blocks with q_proj.weight and k_proj.weight",
                found=[*weights][:6],
                advice="use reef, which listens to activations",
            )
        return cls(weights, tables[0], tuple(whole))

    def words(self, ids: Tensor) -> Tensor:
        """Rows of the table: (n, width) float32.

        Raises:
            ModelMismatchError: the vocabulary is too small for them: not testable.
        """
        size = self.weights.info[self.embedding].shape[0]
        if int(ids.max()) >= size:
            raise ModelMismatchError(
                "not testable: the suspect has another vocabulary",
                expected=f"at least {int(ids.max()) + 1} words",
                found=size,
            )
        return self.weights[self.embedding][ids].float().cpu()

    @property
    def vocabulary(self) -> int:
        """How many words."""
        return self.weights.info[self.embedding].shape[0]

    def matrix(self, block: int, role: str) -> Tensor | None:
        """A weight as (outputs, inputs) float32; None where the block has none of that role."""
        names = self.blocks[block]
        if role in names:
            return self._oriented(names[role])
        if role in _FUSED and "fused" in names:
            return self._oriented(names["fused"]).chunk(3)[_FUSED.index(role)]
        return None

    def _oriented(self, name: str) -> Tensor:
        tensor = self.weights[name].float().cpu()
        return tensor.T.contiguous() if _TURNED.search(name) else tensor


def spread_ids(vocabulary: int, count: int) -> Tensor:
    """At most ``count`` word ids, evenly spread: (n,) int64.

    Example:
        >>> spread_ids(10, 4).tolist()
        [0, 3, 6, 9]
    """
    return torch.linspace(0, vocabulary - 1, min(count, vocabulary)).round().long()


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """Linear centered kernel alignment of two sets of rows, with the unbiased estimator of HSIC.

    The usual, biased estimator is near 1 for unrelated rows that are fewer than their columns.

    Args:
        x: (n, p), n at least 4.
        y: (n, q).

    Returns:
        Near 0 for unrelated rows, 1 for rows that agree up to rotation and scale.

    Source: L. Song et al., JMLR 13, 2012 (the estimator); S. Kornblith et al., ICML 2019 (CKA).

    Example:
        >>> x = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
        >>> round(unbiased_cka(x, 2 * x.flip(1)), 6)
        1.0
    """
    k, m = (_hollow(rows.double() @ rows.double().T) for rows in (x, y))
    scale = _hsic(k, k) * _hsic(m, m)
    return float(_hsic(k, m) / scale.sqrt()) if scale > 0 else 0.0


def _hollow(gram: Tensor) -> Tensor:
    return gram - torch.diag(gram.diagonal())


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return ((k * m).sum() + whole - rows) / (n * (n - 3))
