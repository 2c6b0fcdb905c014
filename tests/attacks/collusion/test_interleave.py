"""Taking turns: by weights the coalition is named, by layers at least one of it."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from sealmark.attacks.collusion.interleave import Interleave
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError


def test_each_weight_is_that_of_some_copy_and_all_come_by_alike(made_of):
    made = made_of(Interleave(), np.repeat(np.arange(4.0)[:, None], 4000, 1))
    counts = np.bincount(made.int().numpy(), minlength=4)
    assert counts.sum() == 4000
    assert (abs(counts - 1000) < 150).all()


def test_a_layer_is_of_one_copy_and_layers_are_of_several(toy, rng):
    models = [nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(20))) for _ in range(3)]
    for number, model in enumerate(models):
        for tensor in model.state_dict().values():
            tensor.fill_(number)
    made = Interleave("layer").run(models, Resources.of(toy), rng=rng).model
    sources = [
        {float(v) for k, t in layer.state_dict().items() if t.is_floating_point() for v in t} for layer in made
    ]
    assert all(len(source) == 1 for source in sources)
    assert set.union(*sources) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("by", ["weight", "layer"])
@pytest.mark.parametrize("size", [2, 3])
def test_colluders_are_named_and_nobody_else(by, size, spread, digits, plain):
    pirate = spread.after("interleave", size, by=by)
    found = spread.accused(pirate)
    assert found
    assert found <= set(spread.users[:size])
    assert digits.score(pirate) >= digits.score(plain) - 0.01


def test_by_layers_the_owner_of_most_weights_is_named_in_any_coalition(spread):
    found = spread.accused(spread.after("interleave", 10, by="layer"))
    assert found
    assert found <= set(spread.users[:10])


@pytest.mark.parametrize("by", ["weight", "layer"])
def test_deepmarks_names_colluders(by, words_of_a_code):
    found = words_of_a_code.accused(words_of_a_code.after("interleave", by=by))
    guilty = set(words_of_a_code.users[:3])
    assert found == guilty if by == "weight" else len(found) == 1 and found < guilty


def test_another_unit_is_refused():
    with pytest.raises(ParameterError, match="weight or layer"):
        Interleave("block")  # type: ignore[arg-type]
