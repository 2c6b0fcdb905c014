"""An empty vault, and the key file that opens it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sealmark.vault import Vault, write_key_file


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    write_key_file(path)
    return path


@pytest.fixture
def vault(tmp_path: Path, key_file: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "vault", key_file=key_file) as vault:
        yield vault
