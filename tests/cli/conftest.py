"""A desk to work at: a folder with a vault, a plain model, a marked one, and a shell that checks exit codes."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner, Result

from sealmark.cli.main import app
from sealmark.core.weights import save_model

Shell = Callable[..., Result]


def _run(line: str, *, code: int = 0, **environment: str | None) -> Result:
    """Run ``sealmark LINE`` in the current folder and insist on its exit code."""
    fixed = {"SEALMARK_KEY_FILE": "vault.key", "FORCE_COLOR": None, "COLUMNS": "100"}
    result = CliRunner(env=fixed | environment).invoke(app, shlex.split(line))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"sealmark {line}\n{result.output}"
    return result


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory, plain: nn.Module) -> Path:
    """A vault (opened by ``vault.key``) with two watermarks, and the model that carries both."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_model(plain, "plain.safetensors")
        _run("init")
        _run("keygen uchida --name mine --task digits --set bits=128")
        _run("keygen adi --name triggers --task digits")
        _run("embed --secret mine --secret triggers --task digits --out marked.safetensors")
    return folder


@pytest.fixture
def desk(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the furnished desk, and the current folder."""
    folder = tmp_path / "desk"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sealmark() -> Shell:
    """``sealmark("verify ...", code=1)``: the command line, in the current folder."""
    return _run


@pytest.fixture
def contents() -> Callable[[], dict[str, Any]]:
    """What lies in the current folder, the vault aside: to show that a failure leaves nothing behind."""

    def look() -> dict[str, Any]:
        files = [path for path in Path().rglob("*") if path.is_file() and ".sealmark" not in path.parts]
        return {str(path): path.read_bytes() for path in files}

    return look
