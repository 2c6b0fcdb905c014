"""What tests share: a transformer or the digits net, what is derived from it, and what is not."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.task import Recipe
from sealmark.core.training import train_task


@pytest.fixture(scope="package")
def tokens():
    return registry.task("tokens")


@pytest.fixture(scope="package")
def reader(tokens):
    return train_task(tokens, rng=np.random.default_rng(0)).eval()


def _others(tokens, seeds, epochs):
    recipe = dataclasses.replace(tokens.recipe, epochs=epochs)
    return [train_task(tokens, rng=np.random.default_rng(seed), recipe=recipe).eval() for seed in seeds]


@pytest.fixture(scope="package")
def unrelated(tokens):
    return _others(tokens, range(300, 306), 1)


@pytest.fixture(scope="package")
def strangers(tokens):
    return _others(tokens, range(100, 103), 4)


def rotated(model):
    """The residual stream in another basis, as conversions to rotated nets leave the weights."""
    width = model.embed_tokens.weight.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(5)))[0]
    result = copy.deepcopy(model)
    with torch.no_grad():
        result.embed_tokens.weight.copy_(model.embed_tokens.weight @ turn)
        for new, old in zip(result.layers, model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "up_proj"):
                getattr(new, name).weight.copy_(getattr(old, name).weight @ turn)
            for name in ("o_proj", "down_proj"):
                getattr(new, name).weight.copy_(turn.T @ getattr(old, name).weight)
    return result


def in_another_head_basis(model):
    """Queries and keys, values and outputs of each head in another basis: the function stays."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for block in result.layers:
            size = block.q_proj.weight.shape[0] // block.heads
            for head in range(block.heads):
                rows = slice(head * size, (head + 1) * size)
                for first, second in (("q_proj", "k_proj"), ("v_proj", "o_proj")):
                    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
                    one, two = getattr(block, first), getattr(block, second)
                    one.weight[rows] = turn @ one.weight[rows]
                    one.bias[rows] = turn @ one.bias[rows]
                    if second == "o_proj":
                        two.weight[:, rows] = two.weight[:, rows] @ turn.T
                    else:
                        two.weight[rows] = turn @ two.weight[rows]
                        two.bias[rows] = turn @ two.bias[rows]
    return result


@pytest.fixture(scope="package")
def derived(tokens, reader):
    """Each derived model, and the least similarity that awm shall find."""
    resources, rng = Resources.of(tokens), np.random.default_rng(1)

    def attacked(name, **parameters):
        return registry.modification(name, **parameters).run(reader, resources, rng=rng).model

    return {
        "itself": (reader, 0.999),
        "fine-tuned": (attacked("fine_tune", epochs=10, rate=0.1), 0.9),
        "pruned": (attacked("prune", rate=0.5), 0.75),
        "int8": (attacked("quantize", bits=8), 0.99),
        "permuted": (attacked("permute"), 0.999),
        "rotated": (rotated(reader), 0.999),
        "another head basis": (in_another_head_basis(reader), 0.999),
    }


QUICK = Recipe(4, 64, 0.1, clip=1.0)  # answers points as often as 15 epochs at 0.05 do; two epochs do half as often


@pytest.fixture(scope="session")
def references(digits):
    """Twenty models that have nothing to do with the plain one, to learn a law from."""
    return [train_task(digits, rng=np.random.default_rng(seed), recipe=QUICK).eval() for seed in range(700, 720)]


@pytest.fixture(scope="session")
def independents(digits):
    """Suspects that are innocent, fully trained on the owner's rows or the attacker's; none is a reference."""
    sets = ((digits.owner, range(100, 103)), (digits.attacker, range(200, 203)))
    return [
        train_task(digits, rng=np.random.default_rng(s), rows=rows).eval() for rows, seeds in sets for s in seeds
    ]


@pytest.fixture(scope="session")
def descendants(plain, digits):
    """The plain digits model and what a thief makes of it."""

    def attacked(name, **parameters):
        attack = registry.modification(name, **parameters)
        return attack.run(plain, Resources.of(digits), rng=np.random.default_rng(3)).model

    return {
        "itself": plain,
        "fine-tuned": attacked("fine_tune", epochs=10, rate=0.01),
        "fine-tuned hard": attacked("fine_tune", epochs=20, rate=0.05),
        "pruned 0.5": attacked("prune", rate=0.5),
        "pruned 0.7": attacked("prune", rate=0.7),
    }
