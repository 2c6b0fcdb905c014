"""A vault that was damaged, edited, cut or put back: refused with a typed error, never believed."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sealmark.core.errors import (
    ArtifactError,
    FormatError,
    ParameterError,
    PolicyError,
    ServiceError,
    TamperedError,
    WrongKeyError,
)
from sealmark.core.secret import Secret
from sealmark.vault import Vault
from sealmark.vault.database import typed_errors

MODEL = "ab" * 32
USERS = ["ada", "ben", "cy"]
Contents = dict[str, list[dict[str, object]]]


@pytest.fixture
def path(tmp_path: Path, key_file: Path) -> Path:
    with Vault.create(tmp_path / "vault", key_file=key_file) as vault:
        for name in ("resnet", "vgg"):
            vault.add_secret(name, Secret(name.encode().ljust(32), {"scheme": "example", "model": MODEL}))
        for user in USERS:
            vault.issue_user(user, secret="resnet", model=MODEL)
    return tmp_path / "vault"


def edit(path: Path, statement: str) -> None:
    db = sqlite3.connect(path / "vault.db")
    with db:
        db.execute(statement)
    db.close()


def exchange(column: str, kind: str) -> str:
    return (
        f"UPDATE records SET {column} = (SELECT other.{column} FROM records AS other "  # noqa: S608
        f"WHERE other.kind = records.kind AND other.number <> records.number) WHERE kind = '{kind}'"
    )


def everything(path: Path, key_file: Path) -> Contents:
    with Vault.open(path, key_file=key_file) as vault:
        vault.check()
        return vault.contents()


def test_a_vault_that_nobody_touched_opens(path: Path, key_file: Path) -> None:
    assert [user["user"] for user in everything(path, key_file)["users"]] == USERS


@pytest.mark.parametrize(
    "statement",
    [
        exchange("info", "secret"),
        exchange("body", "secret"),
        "UPDATE records SET kind = 'document' WHERE kind = 'secret'",
        "UPDATE records SET scope = x'00' WHERE kind = 'user'",
        "UPDATE records SET info = x'00' WHERE kind = 'user'",
        "UPDATE records SET info = 'text' WHERE kind = 'user'",
        "UPDATE records SET body = NULL WHERE kind = 'secret'",
        "UPDATE records SET body = 7 WHERE kind = 'secret'",
        "DELETE FROM records WHERE number = (SELECT max(number) FROM records)",
        "DELETE FROM records WHERE kind = 'user'",
        "DELETE FROM records",
        "INSERT INTO records SELECT 99, kind, x'01', scope, info, body FROM records WHERE number = 3",
        "UPDATE header SET tally = x'00'",
        "UPDATE header SET tally = 7",
    ],
)
def test_an_edited_vault_is_refused(path: Path, key_file: Path, statement: str) -> None:
    edit(path, statement)
    with pytest.raises(TamperedError):
        everything(path, key_file)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM header",
        "UPDATE header SET public = '{}'",
        "UPDATE header SET public = 'sealmark'",
        "UPDATE header SET public = x'00'",
        "UPDATE header SET public = replace(public, 'vault.v1', 'vault.v2')",
        "UPDATE header SET public = replace(public, '\"id\"', '\"ie\"')",
        "UPDATE header SET public = replace(public, '\"salt\"', '\"SALT\"')",
        "DROP TABLE records",
        "DROP TABLE header",
    ],
)
def test_a_vault_without_its_form_is_refused(path: Path, key_file: Path, statement: str) -> None:
    edit(path, statement)
    with pytest.raises(FormatError):
        everything(path, key_file)


def test_the_header_of_another_vault_does_not_open_this_one(path: Path, key_file: Path, tmp_path: Path) -> None:
    Vault.create(tmp_path / "other", key_file=key_file).close()
    other = sqlite3.connect(tmp_path / "other" / "vault.db")
    (public,) = other.execute("SELECT public FROM header").fetchone()
    other.close()
    edit(path, f"UPDATE header SET public = '{public}'")  # noqa: S608
    with pytest.raises(TamperedError):
        everything(path, key_file)


def test_another_id_in_the_header_is_refused(path: Path, key_file: Path) -> None:
    edit(path, """UPDATE header SET public = replace(public, '"id":"', '"id":"0')""")
    with pytest.raises(WrongKeyError):
        everything(path, key_file)


def test_a_record_that_was_put_back_to_an_older_state_is_refused(path: Path, key_file: Path) -> None:
    shutil.copyfile(path / "vault.db", path / "old.db")
    with Vault.open(path, key_file=key_file) as vault:
        vault.revoke_user("ben", "leaked")
    edit_with_old = sqlite3.connect(path / "vault.db")
    with edit_with_old:
        edit_with_old.execute("ATTACH ? AS old", (str(path / "old.db"),))
        edit_with_old.execute(
            "UPDATE records SET info = (SELECT info FROM old.records AS o WHERE o.number = records.number)"
            " WHERE number IN (SELECT number FROM old.records)"
        )
    edit_with_old.close()
    with pytest.raises(TamperedError, match="older"):
        everything(path, key_file)


def test_a_body_that_was_put_back_by_itself_is_refused(path: Path, key_file: Path) -> None:
    with Vault.open(path, key_file=key_file) as vault:
        store = vault._store
        row = store._row("secret", "resnet")
        forged = store._cipher.seal(b"older", place=store._place("secret", row[1], row[2], "body"))
        with vault.transaction():
            vault._db.execute("UPDATE records SET body = ? WHERE id = ?", (forged, row[1]))
        with pytest.raises(TamperedError, match="not its own"):
            vault.secret("resnet")


def damaged(path: Path, key_file: Path, change: Callable[[bytearray], None]) -> Contents | None:
    """What a vault says whose file was changed, or None where it was refused."""
    data = bytearray((path / "vault.db").read_bytes())
    change(data)
    copy = path.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    (copy / "vault.db").write_bytes(data)
    try:
        return everything(copy, key_file)
    except (ArtifactError, PolicyError, ServiceError):
        return None


def test_a_flipped_bit_changes_nothing_or_is_refused(path: Path, key_file: Path) -> None:
    whole = everything(path, key_file)
    size = (path / "vault.db").stat().st_size
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        bit = int(rng.integers(8 * size))

        def flip(data: bytearray, bit: int = bit) -> None:
            data[bit // 8] ^= 1 << bit % 8

        found = damaged(path, key_file, flip)
        assert found in (None, whole)
        refused += found is None
    assert refused > 20  # most of a small SQLite file is empty


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_was_cut_is_refused(path: Path, key_file: Path, share: float) -> None:
    def cut(data: bytearray) -> None:
        del data[int(share * len(data)) :]

    assert damaged(path, key_file, cut) is None


def test_a_file_of_noise_is_refused(path: Path, key_file: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "vault.db").write_bytes(np.random.default_rng(1).bytes(8192))
    with pytest.raises(FormatError, match="damaged"):
        everything(path, key_file)


def test_a_schema_that_is_not_text_is_damage() -> None:
    with pytest.raises(FormatError, match="damaged"), typed_errors():
        b"\xc1".decode()


def test_a_folder_that_the_machine_refuses_is_a_service_error(
    path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ServiceError, match="Permission denied"):
        Vault.create(path.with_name("other"), key_file=key_file)
    assert [item.name for item in path.parent.iterdir()] == ["vault"]


def test_a_backup_opens_and_restores(path: Path, key_file: Path, tmp_path: Path) -> None:
    with Vault.open(path, key_file=key_file) as vault:
        vault.backup(tmp_path / "backup")
        vault.issue_user("dan", secret="resnet", model=MODEL)
        public = vault.public()
    with Vault.restore(tmp_path / "backup", tmp_path / "again", key_file=key_file) as vault:
        assert [user.user for user in vault.users()] == USERS
        assert vault.public() == public
        vault.issue_user("eve", secret="resnet", model=MODEL)


def test_a_backup_is_one_private_file(path: Path, key_file: Path, tmp_path: Path) -> None:
    with Vault.open(path, key_file=key_file) as vault:
        vault.backup(tmp_path / "backup")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["backup", "vault"]
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    assert b"sealmark-sign" not in (tmp_path / "backup").read_bytes()


def test_a_backup_while_another_writes_holds_only_what_was_finished(
    path: Path, key_file: Path, tmp_path: Path
) -> None:
    vault, writer = Vault.open(path, key_file=key_file), Vault.open(path, key_file=key_file)
    with vault, writer, writer.transaction():
        writer.issue_user("dan", secret="resnet", model=MODEL)
        vault.backup(tmp_path / "backup")
    with Vault.open(tmp_path / "backup", key_file=key_file) as found:
        assert [user.user for user in found.users()] == USERS


def test_a_damaged_backup_is_not_restored(path: Path, key_file: Path, tmp_path: Path) -> None:
    with Vault.open(path, key_file=key_file) as vault:
        vault.backup(tmp_path / "backup")
    db = sqlite3.connect(tmp_path / "backup")
    with db:
        db.execute(exchange("body", "secret"))
    db.close()
    with pytest.raises(TamperedError):
        Vault.restore(tmp_path / "backup", tmp_path / "again", key_file=key_file)
    assert not (tmp_path / "again").exists()


def test_a_backup_is_not_restored_over_a_vault(path: Path, key_file: Path, tmp_path: Path) -> None:
    with Vault.open(path, key_file=key_file) as vault:
        vault.backup(tmp_path / "backup")
    with pytest.raises(ParameterError, match="already"):
        Vault.restore(tmp_path / "backup", path, key_file=key_file)


@pytest.mark.parametrize("target", ["vault/vault.db", "missing/backup"])
def test_a_backup_needs_a_folder_of_its_own(path: Path, key_file: Path, tmp_path: Path, target: str) -> None:
    with Vault.open(path, key_file=key_file) as vault, pytest.raises(ParameterError):
        vault.backup(tmp_path / target)
    assert [user["user"] for user in everything(path, key_file)["users"]] == USERS


def test_a_full_disk_leaves_the_old_backup(
    path: Path, key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backup").write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sealmark.vault.folder.shutil.copyfileobj", full)
    with Vault.open(path, key_file=key_file) as vault, pytest.raises(ServiceError, match="No space"):
        vault.backup(tmp_path / "backup")
    assert (tmp_path / "backup").read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["backup", "vault"]
