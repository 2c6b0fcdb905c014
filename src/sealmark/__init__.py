"""sealmark protects trained neural networks as intellectual property, from training to court."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "attach": "core.attach",
    "BlackBox": "core.suspect",
    "Evidence": "core.evidence",
    "SealmarkError": "core.errors",
    "Secret": "core.secret",
    "Verdict": "core.evidence",
    "WeightFile": "core.suspect",
    "WhiteBox": "core.suspect",
    "attack": "core.registry",
    "open": "runtime.licensed",
    "scheme": "core.registry",
    "scheme_of": "core.registry",
    "task": "core.registry",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sealmark' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sealmark.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
