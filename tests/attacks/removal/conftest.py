import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def small():
    """What `tests/small_networks.py` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "small_networks.py")))
