from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from sealmark.cli.keeping import ask_passphrase, stem
from sealmark.core.errors import ParameterError
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.envelope import verify_document
from sealmark.formats.secret import read_secret
from sealmark.vault import Vault

PW = {"SEALMARK_KEY_FILE": None, "SEALMARK_PASSPHRASE": "open sesame"}


def test_init_makes_a_vault_and_prints_its_public_keys(sealmark, empty):
    made = json.loads(sealmark("init --json").stdout)
    assert VerifyKey.parse(made["verify"])
    assert made["recipient"].startswith("sealmark-recipient-v1:")
    assert stat.S_IMODE(Path("vault.key").stat().st_mode) == 0o600
    assert json.loads(sealmark("vault list --json").stdout)["secrets"] == []


def test_init_refuses_a_folder_that_holds_something(sealmark, desk):
    before = sealmark("vault list --json").stdout
    assert "is there already" in sealmark("init", code=2).stderr
    assert sealmark("vault list --json").stdout == before


def test_init_that_fails_leaves_no_key_file(sealmark, empty, contents):
    sealmark("init --vault no/such/folder", code=2)
    assert contents() == {}


def test_a_passphrase_from_the_environment_opens_the_vault(sealmark, empty):
    sealmark("init", **PW)
    sealmark("vault list", **PW)
    assert "WRONG_KEY" in sealmark("vault list", code=1, **PW | {"SEALMARK_PASSPHRASE": "guess"}).stderr


def test_a_passphrase_from_a_file_opens_the_vault(sealmark, empty):
    Path("pw.txt").write_text("open sesame\nand nothing else\n")
    sealmark("init --passphrase-file pw.txt", SEALMARK_KEY_FILE=None)
    sealmark("vault list", **PW)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vault list --passphrase-file pw.txt --key-file vault.key", "not both"),
        ("vault list --passphrase-file nowhere.txt", "no such file"),
        ("vault list --passphrase-file pw.bin", "not text"),
        ("vault list", "nobody to ask"),
        ("vault list --vault elsewhere", "sealmark init"),
        ("vault list --key-file nowhere.key", "no such file"),
    ],
)
def test_a_vault_that_nothing_opens_is_refused_with_advice(sealmark, desk, line, said):
    Path("pw.txt").write_text("open sesame")
    Path("pw.bin").write_bytes(b"\xff\xfe")
    assert said in sealmark(line, code=2, SEALMARK_KEY_FILE=None).stderr


def test_a_wrong_key_file_is_refused_as_a_wrong_key(sealmark, desk):
    sealmark("init --vault other --key-file other.key")
    assert "WRONG_KEY" in sealmark("vault list --key-file other.key", code=1).stderr


def test_a_damaged_vault_is_a_bad_artifact(sealmark, desk):
    Path(".sealmark/vault.db").write_bytes(b"SQLite format 3\0" + bytes(4096))
    sealmark("vault list", code=3)


def test_a_person_at_the_keyboard_is_asked(monkeypatch):
    asked = {}
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("typer.prompt", lambda text, **options: asked.update(options, text=text) or "typed")
    assert ask_passphrase("Passphrase", "NO_SUCH", new=True) == "typed"
    assert asked == {"text": "Passphrase", "hide_input": True, "confirmation_prompt": True, "err": True}


def test_list_shows_what_is_there_and_nothing_secret(sealmark, desk):
    seed = (
        sealmark("vault export --secret mine --out mine.safetensors")
        and read_secret("mine.safetensors").reveal_seed()
    )
    listed = sealmark("vault list --json").stdout + sealmark("vault list").stdout
    assert "mine" in listed
    assert "uchida" in listed
    assert seed.hex() not in listed


def test_commitment_prints_it_and_writes_it_signed(sealmark, desk):
    value = sealmark("vault commitment mine --out c.json").stdout.strip()
    anchor = VerifyKey.parse(json.loads(sealmark("vault list --json").stdout)["public"]["verify"])
    assert verify_document(Path("c.json").read_bytes(), "commitment", [anchor])["commitment"] == value


def test_commitment_of_an_unknown_secret_is_refused_and_writes_nothing(sealmark, desk, contents):
    before = contents()
    sealmark("vault commitment nobodys --out c.json", code=2)
    assert contents() == before


def test_export_of_one_secret_can_be_read_back(sealmark, desk):
    sealmark("vault export --secret mine --out mine.safetensors")
    assert read_secret("mine.safetensors").commitment == sealmark("vault commitment mine").stdout.strip()
    assert stat.S_IMODE(Path("mine.safetensors").stat().st_mode) == 0o600


def test_public_keys_are_printed_and_written_for_others(sealmark, desk):
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        recipient, verify = str(vault.recipient), str(vault.verify_key)
    assert sealmark("vault recipient").stdout.split() == [recipient]
    assert json.loads(sealmark("vault verify-key --json").stdout) == {"verify": verify}
    sealmark("vault verify-key --out owner.anchor")
    assert Path("owner.anchor").read_text() == f"{verify}\n"
    assert "--force" in sealmark("vault recipient --out owner.anchor", code=2).stderr


def test_export_of_the_identity_opens_what_is_for_this_recipient(sealmark, desk):
    sealmark("vault export --identity --out me.txt")
    recipient = json.loads(sealmark("vault list --json").stdout)["public"]["recipient"]
    assert str(Identity.parse(Path("me.txt").read_text()).recipient) == recipient
    assert stat.S_IMODE(Path("me.txt").stat().st_mode) == 0o600


def test_export_of_a_document_takes_the_start_of_its_id(sealmark, desk):
    number = json.loads(sealmark("verify marked.safetensors --secret mine --json").stdout)["evidence"]
    sealmark(f"vault export --document {number[:8]} --out e.json")
    assert b"payload" in Path("e.json").read_bytes()
    assert "fits 0" in sealmark("vault export --document zzz --out f.json", code=2).stderr


def test_export_of_everything_makes_a_folder(sealmark, desk):
    sealmark("vault export --out everything")
    assert Path("everything/secrets/mine.safetensors").is_file()


def test_export_of_two_things_at_once_is_refused(sealmark, desk):
    assert "at most one" in sealmark("vault export --secret mine --identity --out a", code=2).stderr


def test_a_backup_is_restored_whole(sealmark, desk):
    before = sealmark("vault list --json").stdout
    sealmark("vault backup --out backup.db")
    sealmark("vault restore backup.db --vault again")
    assert sealmark("vault list --json --vault again").stdout == before


def test_a_damaged_backup_is_refused_and_no_vault_appears(sealmark, desk):
    sealmark("vault backup --out backup.db")
    data = bytearray(Path("backup.db").read_bytes())
    data[-5000:-4000] = bytes(1000)
    Path("backup.db").write_bytes(data)
    sealmark("vault restore backup.db --vault again", code=3)
    assert not Path("again").exists()


def test_rekey_changes_what_opens_the_vault(sealmark, desk):
    Path("pw.txt").write_text("open sesame")
    sealmark("vault rekey --new-passphrase-file pw.txt")
    sealmark("vault list", **PW)
    sealmark("vault list", code=1)


def test_names_of_models_become_names_in_the_vault():
    assert stem(Path("x/Résumé model.sealed")) == "R_sum__model"
    assert stem(Path("x/...")) == "model"


def test_a_missing_terminal_is_said_with_the_variable(monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setattr("sys.stdin", type("Pipe", (), {"isatty": lambda self: False})())
    with pytest.raises(ParameterError, match="Set NO_SUCH"):
        ask_passphrase("Passphrase", "NO_SUCH")
