"""The CIFAR-10 task, on a small set in the same layout."""

from __future__ import annotations

import io

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from sealmark.core import registry
from sealmark.core.errors import FormatError, ParameterError, UnsupportedError
from sealmark.core.task import Batch
from sealmark.tasks import cifar10
from sealmark.tasks._stored import SETTING, stored_images


def _write(path, images, labels):
    def png(pixels):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        return data.getvalue()

    path.parent.mkdir(exist_ok=True)
    rows = [{"bytes": png(pixels), "path": f"{i}.png"} for i, pixels in enumerate(images)]
    parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path)


@pytest.fixture
def data(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        _write(tmp_path / "cifar10" / f"{split}.parquet", images, rng.integers(0, 10, count))
    monkeypatch.setenv(SETTING, str(tmp_path))
    monkeypatch.setattr(cifar10, "_OWNER", 50)
    return tmp_path


def test_the_task_splits_the_training_rows_and_scales_pixels(data):
    task = registry.task("cifar10")
    assert (task.owner.rows, task.attacker.rows, task.test.rows) == (50, 10, 20)
    assert task.owner.inputs.shape[1:] == (3, 32, 32)
    assert -1 <= task.owner.inputs.min() < -0.98
    assert 0.98 < task.owner.inputs.max() <= 1
    model = task.model(np.random.default_rng(0))
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 1e6
    assert 0 <= task.score(model) <= 1


def test_colors_and_places_of_pixels_are_kept(tmp_path, monkeypatch):
    pixels = np.zeros((1, 4, 6, 3), np.uint8)
    pixels[0, 1, 5] = (10, 20, 30)
    _write(tmp_path / "small" / "test.parquet", pixels, [7])
    monkeypatch.setenv(SETTING, str(tmp_path))
    images, labels = stored_images("small", "test")
    assert images.shape == (1, 3, 4, 6)
    assert images[0, :, 1, 5].tolist() == [10, 20, 30]
    assert int(images.sum()) == 60
    assert labels.tolist() == [7]


def test_gray_images_get_a_channel(tmp_path, monkeypatch):
    _write(tmp_path / "gray" / "test.parquet", np.full((2, 5, 5), 9, np.uint8), [0, 1])
    monkeypatch.setenv(SETTING, str(tmp_path))
    assert stored_images("gray", "test")[0].shape == (2, 1, 5, 5)


@pytest.mark.parametrize("setting", ["", "/nowhere"])
def test_without_the_data_the_setting_is_named(setting, monkeypatch):
    monkeypatch.setenv(SETTING, setting)
    with pytest.raises(ParameterError, match=SETTING):
        registry.task("cifar10")


def test_another_file_is_a_format_error(tmp_path, monkeypatch):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "test.parquet").write_bytes(b"PAR1 nothing")
    monkeypatch.setenv(SETTING, str(tmp_path))
    with pytest.raises(FormatError, match="not an image set"):
        stored_images("odd", "test")


def test_without_the_extra_the_advice_is_to_install_it(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"sealmark\[data\]"):
        stored_images("cifar10", "test")


def test_augmentation_shifts_and_mirrors_and_keeps_labels():
    size, count = 32, 400
    images = torch.zeros(count, 3, size, size)
    images[:, :, 16, 10] = 1
    rng = np.random.default_rng(0)
    changed = cifar10.augment(Batch(images, torch.arange(count)), rng)
    assert torch.equal(changed.targets, torch.arange(count))
    where = changed.inputs[:, 0].flatten(1).argmax(1)
    rows, columns = where // size, where % size
    assert set(rows.tolist()) == set(range(12, 21))
    assert set(columns.tolist()) == set(range(6, 15)) | set(range(size - 1 - 14, size - 1 - 5))
    assert changed.inputs.sum() == images.sum()


def test_a_recipe_in_mixed_precision_trains(data):
    from dataclasses import replace

    from sealmark.core.training import train_task

    task = registry.task("cifar10")
    recipe = replace(task.recipe, epochs=1, batch_size=25)
    one, two = (train_task(task, rng=np.random.default_rng(0), recipe=recipe) for _ in range(2))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in one.parameters())
    assert torch.equal(one.fc.weight, two.fc.weight)
