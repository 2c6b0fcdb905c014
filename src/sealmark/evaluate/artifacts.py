"""Writing what a run leaves behind: weight files, plain JSON, and what the machine was."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sealmark import __version__
from sealmark.core.files import atomic_write


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write plain values as JSON that every reader takes: what is not finite becomes null.

    Raises:
        ParameterError: the folder does not exist.
        ServiceError: the disk is full or refuses.
    """
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def finite(value: Any) -> Any:
    """The same plain value with None for NaN and infinities.

    Example:
        >>> finite({"a": [1.0, float("nan")], "b": "text"})
        {'a': [1.0, None], 'b': 'text'}
    """
    if isinstance(value, Mapping):
        return {str(name): finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """What a figure depends on besides its seeds: versions, processor, threads."""
    return {
        "sealmark": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
