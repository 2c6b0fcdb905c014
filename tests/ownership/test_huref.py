"""HuRef: invariant products."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.suspect import WhiteBox
from sealmark.ownership.huref import Huref

SCHEME = Huref()


@pytest.fixture(scope="module")
def secret(reader, unrelated):
    return SCHEME.enroll(reader, references=unrelated, rng=np.random.default_rng(0))


def _similarity(model, secret):
    return SCHEME.score(WhiteBox(model), secret).statistic


@pytest.mark.parametrize(
    ("name", "least"),
    [("itself", 0.999), ("permuted", 0.999), ("rotated", 0.999), ("another head basis", 0.999), ("int8", 0.98),
     ("fine-tuned", 0.9), ("pruned", 0.7)],
)  # fmt: skip
def test_products_outlast_changes_of_basis_and_training(derived, secret, name, least):
    assert _similarity(derived[name][0], secret) > least


def test_unrelated_models_have_other_products(strangers, secret):
    assert max(abs(_similarity(model, secret)) for model in strangers) < 0.05
    assert max(map(abs, secret.host["null"])) < 0.05


def test_another_order_of_the_vocabulary_hides_the_lineage(reader, secret):
    shuffled = copy.deepcopy(reader)
    order = torch.randperm(289, generator=torch.Generator().manual_seed(0))
    shuffled.embed_tokens.weight.data = reader.embed_tokens.weight.data[order]
    assert abs(_similarity(shuffled, secret)) < 0.1


def test_a_gate_is_part_of_the_product(reader):
    gated = copy.deepcopy(reader)
    for block in gated.layers:
        block.gate_proj = torch.nn.Linear(64, 128, bias=False)
    kept = SCHEME.enroll(gated, references=[reader], rng=np.random.default_rng(0))
    assert _similarity(gated, kept) > 0.999
    assert _similarity(reader, kept) < 0.9


def test_blocks_without_those_products_are_a_mismatch(reader, secret):
    bare = copy.deepcopy(reader)
    for block in bare.layers:
        del block.o_proj, block.v_proj
    with pytest.raises(ModelMismatchError, match="blocks have another form"):
        SCHEME.score(WhiteBox(bare), secret)


def test_bad_parameters_are_refused():
    with pytest.raises(ParameterError):
        Huref(words=2)
