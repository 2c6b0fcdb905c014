"""Nobody is forgotten: each group has its file, and each scheme its group."""

from __future__ import annotations

import runpy
from pathlib import Path

from sealmark.core import registry

HERE = Path(__file__).parent


def test_every_scheme_is_in_a_group_that_has_a_file():
    home = runpy.run_path(str(HERE / "conftest.py"))
    groups = {home["group_of"](name) for name in registry.items("scheme")}
    assert groups == set(home["GROUPS"])
    assert all((HERE / f"test_{group}.py").is_file() for group in groups | {"attacks"})
