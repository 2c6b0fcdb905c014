"""What the tests of endpoints share: real servers on local ports."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def live() -> SimpleNamespace:
    """What `tests/live_service.py` defines."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests/live_service.py")))
