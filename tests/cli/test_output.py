from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sealmark.cli.output import Output, byte_progress, epoch_progress, facts, listing, size_of, tensor_progress
from sealmark.cli.staging import staged, write_out
from sealmark.core.errors import ParameterError, ServiceError


def test_figures_without_a_bound_stay_strict_json(capsys):
    Output(json=True).product({"log10_p": -math.inf})
    assert json.loads(capsys.readouterr().out) == {"log10_p": {"$float": "-inf"}}


def test_text_of_users_is_printed_as_it_is(capsys):
    Output().product({}, facts({"user": "[bold]:smile:"}), listing(["user"], [["[red]eve"]]), "[i]")
    out = capsys.readouterr().out
    assert "[bold]:smile:" in out
    assert "[red]eve" in out
    assert "[i]" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_and_nowhere_else(capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("TERM", "xterm")
    with tensor_progress("locking", 100) as step:
        step("weight", 40)
    with byte_progress("unlocking") as done:
        done(30, 100)
        done(100, 100)
    with epoch_progress("embedding") as epoch:
        epoch(1, 2, 0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("locking" in captured.err) is terminal
    assert ("100/100" in captured.err) is terminal
    assert ("1/2" in captured.err) is terminal


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"45")
    assert size_of(tmp_path) == 5
    assert size_of(tmp_path / "nowhere") == 0


def test_a_staged_file_appears_when_the_block_ends_well(tmp_path):
    with staged(tmp_path / "a", force=False) as work:
        work.write_text("new")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_staged_output_is_gone_when_the_block_fails(tmp_path, kind):
    def fail(work: Path) -> None:
        if kind == "folder":
            work.mkdir()
            work = work / "part"
        work.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a", force=False) as work:
        fail(work)
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_stands_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a", force=True) as work:
        work.write_text(str(1 / 0))
    assert (tmp_path / "a").read_text() == "old"


def test_an_output_that_cannot_be_put_in_place_is_a_service_error(tmp_path):
    with pytest.raises(ServiceError, match="cannot write"), staged(tmp_path / "a", force=False):
        pass  # nothing was written


def test_a_small_file_is_not_overwritten_without_force(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ParameterError, match="--force"):
        write_out(tmp_path / "a", b"new", force=False)
    write_out(tmp_path / "a", b"new", force=True)
    assert (tmp_path / "a").read_bytes() == b"new"
