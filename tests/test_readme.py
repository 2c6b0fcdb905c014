"""The README's commands and code run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    set_here = {"PATH": path, "SEALMARK_STATE": str(folder / ".state")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | set_here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_job_by_hand_names_the_leaker(tmp_path):
    script = "\n".join(blocks("README.md", "sh"))
    shown = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    assert shown.count("MATCH") == 5
    assert "NO_MATCH" not in shown
    assert re.search(r"accused +acme *\n", shown)
    assert "<html" in (tmp_path / "report.html").read_text("utf-8")


def test_the_page_of_licenses_runs(tmp_path):
    made = "import numpy as np; from sealmark.core.training import train_task; from sealmark.core.weights import "
    made += "save_model; from sealmark.tasks.digits import task; t = task(); "
    made += "save_model(train_task(t, rng=np.random.default_rng(0)), 'model.safetensors')"
    run([sys.executable, "-c", made], tmp_path)
    script = "export SEALMARK_PASSPHRASE=words\n" + "\n".join(blocks("docs/licenses.md", "sh"))
    shown = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    assert "refused" in shown
    assert re.search(r"accused +dora *\n", shown)
    assert re.search(r"answer +ACCEPTED", shown)
    assert re.search(r"accused +finn *\n", shown)
    assert (tmp_path / "trace.svg").is_file()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_python_in_a_document_runs(document, tmp_path):
    for code in blocks(document, "python"):
        assert run([sys.executable, "-W", "error", "-c", code], tmp_path)


def test_links_lead_somewhere():
    for document in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/adr/README.md", "examples/README.md"):
        text = (ROOT / document).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or ((ROOT / document).parent / target).exists(), (document, target)
