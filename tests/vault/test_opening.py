"""Opening a vault: for its owner, for nobody else, and for several at once."""

import stat
import threading
from pathlib import Path

import pytest

from sealmark.core.errors import FormatError, ParameterError, ServiceError, WrongKeyError
from sealmark.core.secret import Secret
from sealmark.crypto.signing import VerifyKey
from sealmark.crypto.wrapping import unwrap, wrap
from sealmark.vault import Vault, write_key_file

MODEL = "ab" * 32


@pytest.fixture
def filled(vault: Vault) -> Vault:
    vault.add_secret("resnet", Secret(bytes(32), {"scheme": "example"}))
    return vault


def test_a_passphrase_opens_the_vault_that_it_made(tmp_path: Path) -> None:
    with Vault.create(tmp_path / "vault", passphrase="open sesame") as made:
        public = made.public()
    with Vault.open(tmp_path / "vault", passphrase="open sesame") as vault:
        assert vault.public() == public


def test_a_wrong_passphrase_does_not_open_it(tmp_path: Path) -> None:
    Vault.create(tmp_path / "vault", passphrase="open sesame").close()
    with pytest.raises(WrongKeyError):
        Vault.open(tmp_path / "vault", passphrase="open barley")


def test_a_wrong_key_file_does_not_open_it(vault: Vault, tmp_path: Path) -> None:
    write_key_file(tmp_path / "other")
    with pytest.raises(WrongKeyError):
        Vault.open(vault.path, key_file=tmp_path / "other")


def test_a_passphrase_does_not_open_a_vault_of_a_key_file(vault: Vault) -> None:
    with pytest.raises(WrongKeyError):
        Vault.open(vault.path, passphrase="open sesame")


@pytest.mark.parametrize("passphrase", [None, "open sesame"])
def test_exactly_one_thing_opens_a_vault(tmp_path: Path, key_file: Path, passphrase: str | None) -> None:
    with pytest.raises(ParameterError, match="one of the two"):
        Vault.create(tmp_path / "vault", passphrase=passphrase, key_file=passphrase and key_file)
    assert not list(tmp_path.iterdir())


def test_an_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="empty"):
        Vault.create(tmp_path / "vault", passphrase="")


def test_a_key_file_is_private_and_is_not_overwritten(key_file: Path) -> None:
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    with pytest.raises(ParameterError, match="already"):
        write_key_file(key_file)


def test_a_file_that_is_no_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("open sesame")
    with pytest.raises(FormatError):
        Vault.create(tmp_path / "vault", key_file=tmp_path / "key")


def test_a_missing_key_file_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="no such file"):
        Vault.create(tmp_path / "vault", key_file=tmp_path / "key")


def test_another_passphrase_can_replace_the_first(vault: Vault, key_file: Path) -> None:
    vault.change_opener(passphrase="open sesame")
    vault.close()
    with pytest.raises(WrongKeyError):
        Vault.open(vault.path, key_file=key_file)
    with Vault.open(vault.path, passphrase="open sesame") as again:
        assert again.verify_key == vault.verify_key


def test_a_vault_is_not_made_over_another(vault: Vault, key_file: Path) -> None:
    with pytest.raises(ParameterError, match="already"):
        Vault.create(vault.path, key_file=key_file)
    assert vault.secrets() == []


def test_a_vault_is_not_made_over_a_file(tmp_path: Path, key_file: Path) -> None:
    (tmp_path / "vault").write_text("mine")
    with pytest.raises(ParameterError, match="already"):
        Vault.create(tmp_path / "vault", key_file=key_file)


def test_a_vault_takes_the_place_of_an_empty_folder(tmp_path: Path, key_file: Path) -> None:
    (tmp_path / "vault").mkdir()
    Vault.create(tmp_path / "vault", key_file=key_file).close()


def test_of_two_who_make_the_same_vault_the_second_is_refused(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(old: Path, new: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", race)
    with pytest.raises(ParameterError, match="already"):
        Vault.create(tmp_path / "vault", key_file=key_file)
    assert not list(tmp_path.iterdir())


def test_the_folder_above_a_vault_must_exist(tmp_path: Path, key_file: Path) -> None:
    with pytest.raises(ParameterError, match="existing folder"):
        Vault.create(tmp_path / "a" / "vault", key_file=key_file)


def test_a_vault_that_is_not_there_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="sealmark init"):
        Vault.open(tmp_path, passphrase="open sesame")


def test_a_closed_vault_says_so(vault: Vault) -> None:
    vault.close()
    with pytest.raises(ParameterError, match="closed"):
        vault.secrets()


def test_only_the_owner_can_enter_the_folder(vault: Vault) -> None:
    assert stat.S_IMODE(vault.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in vault.path.iterdir()} == {0o600}


def test_two_vaults_have_different_keys(vault: Vault, tmp_path: Path, key_file: Path) -> None:
    with Vault.create(tmp_path / "other", key_file=key_file) as other:
        assert not set(other.public().values()) & set(vault.public().values())


def test_the_public_keys_are_those_that_others_use(vault: Vault) -> None:
    assert VerifyKey.parse(vault.public()["verify"]) == vault.verify_key
    stanza = wrap(bytes(32), vault.recipient, context=b"")
    assert unwrap([stanza], vault.identity, context=b"") == bytes(32)
    assert vault.public()["recipient"] == str(vault.recipient)


def test_threads_may_share_a_vault(filled: Vault, key_file: Path) -> None:
    def issue(part: int) -> None:
        for index in range(20):
            filled.issue_user(f"user-{part}-{index}", secret="resnet", model=MODEL)

    threads = [threading.Thread(target=issue, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Vault.open(filled.path, key_file=key_file) as again:
        assert len(again.users("resnet")) == 80


def test_two_who_have_a_vault_open_see_each_others_changes(filled: Vault, key_file: Path) -> None:
    with Vault.open(filled.path, key_file=key_file) as other:
        other.issue_user("ada", secret="resnet", model=MODEL)
        filled.issue_user("ben", secret="resnet", model=MODEL)
        assert [record.user for record in other.users()] == ["ada", "ben"]
    filled.check()


def test_a_vault_that_another_writer_locks_is_a_service_error(filled: Vault, key_file: Path) -> None:
    with Vault.open(filled.path, key_file=key_file, timeout=0.05) as other, filled.transaction():
        with pytest.raises(ServiceError, match="locked"):
            other.issue_user("ada", secret="resnet", model=MODEL)
        assert len(other.secrets()) == 1  # readers do not wait
