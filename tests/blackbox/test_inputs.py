from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sealmark.blackbox.inputs import check_packed, form_of, keyed_inputs, pack, patterns, unpack
from sealmark.core import registry
from sealmark.core.errors import ParameterError
from sealmark.crypto.random import Stream

GOLDEN = [183, 173, 192, 183, 202, 186, 212, 221]  # first row of the first image under the all-zero key


def test_images_are_the_same_on_every_machine():
    images = patterns(Stream(bytes(32)), 2, (1, 8, 8))
    assert images.shape == (2, 1, 8, 8)
    assert images[0, 0, 0].tolist() == GOLDEN


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 2, 2), (7,), (2, 5, 9)])
def test_images_of_any_shape_are_distinct(shape):
    images = patterns(Stream(bytes(32)), 40, shape)
    assert images.shape == (40, *shape)
    assert len(torch.unique(images, dim=0)) == 40


def test_real_inputs_come_back_within_half_a_step_and_stay_put(digits):
    form = form_of(digits, "test")
    packed = pack(digits.test.inputs, form)
    again = unpack(packed, form)
    assert packed.dtype == torch.uint8
    assert (again - digits.test.inputs).abs().max() <= 0.5 / 255 + 1e-7
    assert torch.equal(pack(again, form), packed)


def test_words_are_kept_as_they_are():
    tokens = registry.task("tokens")
    form = form_of(tokens, "test")
    assert form["integer"]
    assert torch.equal(unpack(pack(tokens.test.inputs, form), form), tokens.test.inputs)
    drawn = keyed_inputs(Stream(bytes(32)), 50, form)
    assert drawn.shape == (50, 32)
    assert form["low"] <= drawn.min() < drawn.max() <= form["high"]


def test_task_must_classify_and_be_finite(digits):
    for task in (None, replace(digits, classes=0)):
        with pytest.raises(ParameterError, match="classification task"):
            form_of(task, "test")
    broken = digits.owner._replace(inputs=digits.owner.inputs / 0)
    with pytest.raises(ParameterError, match="finite"):
        form_of(replace(digits, owner=broken), "test")


def test_chosen_inputs_must_fit_the_task(digits):
    form = form_of(digits, "test")
    check_packed(torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8), 2, form)
    with pytest.raises(ParameterError, match="bad inputs"):
        check_packed(torch.zeros(2, 1, 8, 8), 2, form)
    with pytest.raises(ParameterError, match="the same"):
        check_packed(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 2, form)
