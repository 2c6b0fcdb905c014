"""Image sets that lie outside the package, in the folder that ``SEALMARK_DATA`` names."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sealmark.core.errors import FormatError, ParameterError, UnsupportedError

SETTING = "SEALMARK_DATA"


def stored_images(name: str, split: str) -> tuple[Tensor, Tensor]:
    """One split of an image set in the Hugging Face layout, ``NAME/SPLIT.parquet``.

    Args:
        name: folder of the set, such as ``cifar10``.
        split: ``train`` or ``test``.

    Returns:
        Images (N, C, H, W) uint8, labels (N,) int64.

    Raises:
        ParameterError: the setting is missing, or the folder lacks that file.
        UnsupportedError: the extra ``data`` is not installed.
        FormatError: not such a file.
    """
    folder = os.environ.get(SETTING, "")
    path = Path(folder) / name / f"{split}.parquet"
    if not folder or not path.is_file():
        raise ParameterError(
            f"{name} lies outside the package",
            expected=f"{SETTING} to name a folder with {name}/{split}.parquet",
            found=folder or "no such setting",
            advice="get the standard data set in the Hugging Face layout",
        )
    try:
        import pyarrow
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedError(
            "reading image sets needs an extra", found=error, advice='pip install "sealmark[data]"'
        ) from None
    try:
        table = parquet.read_table(path, columns=["image", "label"])
        encoded = (entry["bytes"] for entry in table["image"].to_pylist())
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded])
        labels = table["label"].to_numpy().astype(np.int64)
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise FormatError(
            f"{path}: not an image set", expected="columns image.bytes and label", found=error
        ) from None
    images = torch.from_numpy(pixels)
    first = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return first.contiguous(), torch.from_numpy(labels)
