from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sealmark import __version__
from sealmark.cli import main


def imported_by(line: str) -> set[str]:
    """The top-level modules that a command imports."""
    code = f"import sys; sys.argv[1:] = {line.split()!r}\nfrom sealmark.cli.main import main\ntry: main()\n"
    code += "except SystemExit: pass\nsys.stderr.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("line", ["--help", "schemes", "attacks --json", "schemes uchida", "verify --help"])
def test_looking_around_imports_nothing_heavy(line):
    heavy = {"torch", "sklearn", "matplotlib", "scipy", "numpy", "cryptography", "jinja2"}
    assert not imported_by(line) & heavy


def test_the_import_check_sees_torch_where_it_is_used():
    assert "torch" in imported_by("keygen uchida --name a --task digits --set bits=none")


def test_help_groups_the_commands_by_what_they_answer(sealmark):
    text = sealmark("--help").stdout
    panels = re.findall(r"╭─ (\w+)", text)
    assert panels == ["Options", "Vault", "Ownership", "Authorization", "Identity", "Integrity", "Evaluate", "What"]
    ownership = text[text.index("─ Ownership") : text.index("─ Authorization")]
    assert [verb for verb in ("keygen", "embed", "verify", "lock") if verb in ownership] == [
        "keygen",
        "embed",
        "verify",
    ]


def test_every_command_has_help_of_its_own(sealmark):
    commands = [command.name or command.callback.__name__ for command in main.app.registered_commands]
    assert len(commands) == 24
    for command in commands:
        assert "Usage" in sealmark(f"{command} --help").stdout


def test_version_is_the_packages(sealmark):
    assert sealmark("--version").stdout == f"sealmark {__version__}\n"


def test_no_command_shows_the_help(sealmark):
    assert "Ownership" in sealmark("", code=2).output


@pytest.mark.parametrize("line", ["nonsense", "lock", "verify a --alpha much", "schemes --seed 1"])
def test_a_wrong_call_exits_with_2_and_says_nothing_on_stdout(sealmark, empty, line):
    result = sealmark(line, code=2)
    assert result.stdout == ""
    assert "Usage" in result.stderr


def test_an_error_of_ours_is_one_line_on_stderr(sealmark, empty):
    result = sealmark("schemes nonsense", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error [UNKNOWN_NAME]: no such scheme: expected one of activeguard,")
    assert result.stderr.count("\n") == 1


def test_an_error_with_json_is_one_object_on_stderr(sealmark, empty):
    result = sealmark("schemes nonsense --json", code=2)
    assert result.stdout == ""
    assert '{"error": {"code": "UNKNOWN_NAME", "message": "no such scheme: ' in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(sealmark, empty, monkeypatch):
    monkeypatch.setattr("sealmark.cli.listing.registry.items", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sealmark("schemes")


def test_main_runs_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sealmark", "--version"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    assert capsys.readouterr().out.startswith("sealmark ")
