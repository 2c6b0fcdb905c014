import copy
import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from sealmark.attacks.evasion.preprocess import Filtered, Preprocess
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights

MILD = [("blur", 0.5), ("jpeg", 65), ("noise", 0.05), ("quantize", 10)]
ALL = [*MILD, ("median", 3)]


def serve(model, task, kind="blur", strength=0.0, seed=0):
    attack = Preprocess(kind, strength)
    return attack.run(model, Resources.of(task, 0.0), rng=np.random.default_rng(seed)).model


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 9, 12, generator=torch.Generator().manual_seed(0))


def changed(kind, strength, images, limits=(0.0, 1.0)):
    return Filtered(torch.nn.Identity(), kind, strength, limits, b"seed").filtered(images)


@pytest.mark.parametrize(("kind", "strength"), MILD)
def test_a_mild_filter_costs_little_accuracy_and_leaves_the_mark(digits, marked, kind, strength):
    served = serve(marked.model, digits, kind, strength)
    assert digits.score(served) > digits.score(marked.model) - 0.03
    assert marked.known(served) > 0.9


def test_noise_enough_to_blind_the_mark_costs_accuracy(digits, marked):
    served = serve(marked.model, digits, "noise", 0.2)
    assert marked.known(served) < 0.6
    assert 0.8 < digits.score(served) < digits.score(marked.model) - 0.02


@pytest.mark.parametrize(("kind", "strength"), ALL)
def test_the_stolen_weights_are_served_as_they_are(digits, plain, kind, strength):
    served = serve(plain, digits, kind, strength)
    assert ModelWeights(served.model).digest() == ModelWeights(plain).digest()
    assert set(served.state_dict()) == {f"model.{name}" for name in plain.state_dict()}
    assert not served.training


@pytest.mark.parametrize(("kind", "strength"), ALL)
def test_the_same_question_gets_the_same_answer_however_it_is_asked(digits, plain, kind, strength):
    served = serve(plain, digits, kind, strength)
    asked = digits.test.inputs[:20]
    first = WhiteBox(served).logits(asked)
    assert torch.equal(first, WhiteBox(served).logits(asked))
    assert torch.allclose(first.flip(0), WhiteBox(served).logits(asked.flip(0)), atol=1e-5)
    assert torch.equal(first, WhiteBox(copy.deepcopy(served)).logits(asked))


def test_noise_follows_from_the_generator_and_from_the_input(digits, plain):
    asked = digits.test.inputs[:20]
    one, again, other = (serve(plain, digits, "noise", 0.1, seed).filtered(asked) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    grey = torch.full((2, 1, 8, 8), 0.5)
    grey[1, 0, 0, 0] = 0.6
    first, second = serve(plain, digits, "noise", 0.1).filtered(grey) - grey
    assert not torch.allclose(first, second, atol=1e-3)


def test_noise_has_the_deviation_that_was_asked_for():
    grey = torch.full((4, 1, 50, 50), 0.0)
    grey[:, 0, 0, 0] = torch.arange(4) / 100
    noise = changed("noise", 0.1, grey, (-1.0, 1.0)) - grey
    assert noise.std() == pytest.approx(0.2, rel=0.05)
    assert abs(noise.mean()) < 0.01


def test_filters_stay_in_the_range_of_the_task(images):
    for kind, strength in ALL:
        found = changed(kind, strength, images * 8 - 4, (-4.0, 4.0))
        assert found.shape == images.shape
        assert found.dtype == images.dtype
        assert found.min() >= -4 - 1e-5
        assert found.max() <= 4 + 1e-5


def test_the_blur_is_a_gaussian(images):
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, 0.8, 0.8), mode="nearest", radius=(0, 0, 3, 3))
    assert np.allclose(changed("blur", 0.8, images).numpy(), expected, atol=1e-5)


def test_the_median_is_the_median_of_the_window(images):
    expected = ndimage.median_filter(images.numpy(), (1, 1, 5, 5), mode="nearest")
    assert np.array_equal(changed("median", 5, images).numpy(), expected)


def test_quantized_inputs_have_so_many_levels(images):
    found = changed("quantize", 4, images)
    assert torch.allclose(torch.unique(found), torch.tensor([0, 1 / 3, 2 / 3, 1]), atol=1e-6)
    assert (found - images).abs().max() <= 1 / 6 + 1e-6


def test_jpeg_is_jpeg(images):
    picture = Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy())
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    expected = np.asarray(Image.open(file)) / 255
    assert np.allclose(changed("jpeg", 40, images)[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_of_low_quality_strays_further(images, channels):
    pictures = images[:, :channels].repeat(1, 1, 2, 2)
    fine, coarse = ((changed("jpeg", quality, pictures) - pictures).abs().mean() for quality in (95, 10))
    assert fine < coarse


def test_a_strength_of_zero_takes_a_usual_one(digits, plain):
    assert serve(plain, digits, "median").strength == 3
    assert serve(plain, digits, "median", 5).strength == 5


def test_words_are_refused():
    tokens = registry.task("tokens")
    model = tokens.model(np.random.default_rng(0))
    for kind in ("noise", "blur"):
        with pytest.raises(UnsupportedError, match="does not fit these inputs"):
            serve(model, tokens, kind)


@pytest.mark.parametrize("kind", ["blur", "median", "jpeg"])
def test_a_filter_of_images_refuses_rows_that_are_none(toy, rng, kind):
    with pytest.raises(UnsupportedError, match=r"images \(N, C, H, W\)"):
        serve(toy.model(rng), toy, kind)


@pytest.mark.parametrize("kind", ["noise", "quantize"])
def test_the_other_filters_take_any_real_numbers(toy, rng, kind):
    served = serve(toy.model(rng), toy, kind)
    assert WhiteBox(served).logits(toy.test.inputs).shape == (64, 2)


def test_without_pillow_jpeg_is_refused_with_advice(digits, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"needs Pillow.*sealmark\[data\]"):
        serve(plain, digits, "jpeg")
    serve(plain, digits, "blur")


@pytest.mark.parametrize(
    ("kind", "strength"),
    [("sharpen", 1), ("blur", -1), ("blur", float("nan")), ("blur", float("inf")), ("median", 4), ("median", 1),
     ("median", float("inf")), ("jpeg", 0.5), ("jpeg", 96), ("noise", -0.1), ("quantize", 1), ("quantize", 2.5)],
)  # fmt: skip
def test_bad_parameters_are_refused(kind, strength):
    with pytest.raises(ParameterError, match="bad parameters of preprocess"):
        dataclasses.replace(Preprocess(), kind=kind, strength=strength)
