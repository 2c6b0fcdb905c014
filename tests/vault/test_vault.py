"""The owner's vault: what goes in comes out, for the owner and for nobody else."""

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from sealmark.core.errors import (
    ForgedSecretError,
    ParameterError,
    UnknownNameError,
    UntrustedError,
)
from sealmark.core.secret import Secret, tensor_digest
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import SigningKey
from sealmark.formats.envelope import sign_document, verify_document
from sealmark.formats.secret import read_secret
from sealmark.vault import Vault, export_all

MODEL = "ab" * 32
PAST = datetime(2001, 1, 1, tzinfo=UTC)
IMAGES = torch.arange(6.0)
SECRET = Secret(
    bytes(range(32)),
    {"scheme": "example", "model": MODEL, "tensors": {"images": tensor_digest(IMAGES)}},
    {"images": IMAGES},
    created="2031-01-01T00:00:00Z",
)


@pytest.fixture
def vault(vault: Vault) -> Vault:
    vault.add_secret("resnet", SECRET)
    return vault


def reopened(vault: Vault, key_file: Path) -> Vault:
    vault.close()
    return Vault.open(vault.path, key_file=key_file)


def test_a_secret_comes_back(vault: Vault, key_file: Path) -> None:
    with reopened(vault, key_file) as again:
        found = again.secret("resnet")
    assert found == SECRET
    assert torch.equal(found.tensors["images"], IMAGES)


def test_secrets_are_listed_without_being_decrypted(vault: Vault) -> None:
    (record,) = vault.secrets()
    assert (record.name, record.scheme, record.commitment) == ("resnet", "example", SECRET.commitment)
    assert (record.model, record.created) == (MODEL, SECRET.created)


def test_two_secrets_of_one_name_are_refused(vault: Vault) -> None:
    with pytest.raises(ParameterError, match="already"):
        vault.add_secret("resnet", SECRET)
    assert len(vault.secrets()) == 1


def test_a_secret_that_is_not_its_own_is_refused(vault: Vault) -> None:
    with pytest.raises(ForgedSecretError):
        vault.add_secret("forged", Secret(bytes(32), {"scheme": "example"}, {"a": IMAGES}))


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", ".hidden", "a b", "a\0", "x" * 101, "a\n"])
def test_a_name_that_is_no_file_name_is_refused(vault: Vault, name: str) -> None:
    with pytest.raises(ParameterError, match="bad name"):
        vault.add_secret(name, SECRET)


def test_an_unknown_secret_is_the_callers_mistake(vault: Vault) -> None:
    with pytest.raises(UnknownNameError, match="vgg"):
        vault.secret("vgg")


def test_an_exported_secret_is_a_private_secret_file(vault: Vault, tmp_path: Path) -> None:
    vault.export_secret("resnet", tmp_path / "resnet.safetensors")
    assert read_secret(tmp_path / "resnet.safetensors") == SECRET
    assert stat.S_IMODE((tmp_path / "resnet.safetensors").stat().st_mode) == 0o600


def test_a_published_commitment_is_signed_and_does_not_tell_the_name(vault: Vault) -> None:
    body = verify_document(vault.publish_commitment("resnet", time=PAST), "commitment", [vault.verify_key])
    assert body == {
        "commitment": SECRET.commitment,
        "model": MODEL,
        "scheme": "example",
        "time": "2001-01-01T00:00:00Z",
    }


def test_an_issued_user_is_listed(vault: Vault, key_file: Path) -> None:
    made = vault.issue_user("ada", secret="resnet", model=MODEL, mark={"index": 3}, copy="cd" * 32, issued=PAST)
    with reopened(vault, key_file) as again:
        assert again.users() == [made]
    assert (made.commitment, made.issued, made.revoked) == (SECRET.commitment, "2001-01-01T00:00:00Z", "")


def test_users_are_listed_by_secret_and_by_model(vault: Vault) -> None:
    vault.add_secret("vgg", SECRET)
    vault.issue_user("ada", secret="resnet", model=MODEL)
    vault.issue_user("ben", secret="resnet", model="00")
    vault.issue_user("ada", secret="vgg", model=MODEL)
    assert [user.user for user in vault.users("resnet")] == ["ada", "ben"]
    assert [user.secret for user in vault.users(model=MODEL)] == ["resnet", "vgg"]
    assert vault.users("alexnet") == []


def test_a_user_has_one_copy_for_each_secret(vault: Vault) -> None:
    vault.issue_user("ada", secret="resnet", model=MODEL)
    with pytest.raises(ParameterError, match="already"):
        vault.issue_user("ada", secret="resnet", model="00")


def test_a_copy_needs_a_secret_that_is_there(vault: Vault) -> None:
    with pytest.raises(UnknownNameError, match="vgg"):
        vault.issue_user("ada", secret="vgg", model=MODEL)


def test_a_mark_that_is_not_plain_json_is_refused(vault: Vault) -> None:
    with pytest.raises(ParameterError, match="plain JSON"):
        vault.issue_user("ada", secret="resnet", model=MODEL, mark={"bits": {1}})


@pytest.mark.parametrize("user", ["", " ", "a\nb", "\x1b[31m", "x" * 201])
def test_a_user_that_nobody_can_read_is_refused(vault: Vault, user: str) -> None:
    with pytest.raises(ParameterError, match="bad user"):
        vault.issue_user(user, secret="resnet", model=MODEL)


@pytest.mark.parametrize("user", ["ada@example.com", "\u00c5sa & S\u00f8n / \u6f22\u5b57", "../../etc", "x" * 200])
def test_any_readable_user_is_taken(vault: Vault, user: str) -> None:
    vault.issue_user(user, secret="resnet", model=MODEL)
    assert [record.user for record in vault.users("resnet")] == [user]


def test_a_revoked_user_stays_listed_with_time_and_reason(vault: Vault) -> None:
    vault.issue_user("ada", secret="resnet", model=MODEL)
    vault.issue_user("ben", secret="resnet", model=MODEL)
    vault.revoke_user("ada", "leaked", time=PAST)
    ada, ben = vault.users()
    assert (ada.revoked, ada.reason) == ("2001-01-01T00:00:00Z", "leaked")
    assert (ben.revoked, ben.reason) == ("", "")


def test_a_second_revocation_keeps_the_time_of_the_first(vault: Vault) -> None:
    vault.issue_user("ada", secret="resnet", model=MODEL)
    first = vault.revoke_user("ada", "leaked", time=PAST)
    assert vault.revoke_user("ada", "again") == first == vault.users()


def test_one_copy_of_a_user_can_be_revoked_by_itself(vault: Vault) -> None:
    vault.add_secret("vgg", SECRET)
    vault.issue_user("ada", secret="resnet", model=MODEL)
    vault.issue_user("ada", secret="vgg", model=MODEL)
    vault.revoke_user("ada", "leaked", secret="vgg")
    assert [bool(record.revoked) for record in vault.users()] == [False, True]


def test_revoking_a_user_without_a_copy_is_the_callers_mistake(vault: Vault) -> None:
    with pytest.raises(UnknownNameError, match="ada"):
        vault.revoke_user("ada", "leaked")


def test_evidence_is_kept_and_comes_back(vault: Vault) -> None:
    data = sign_document("evidence", {"accused": ["ada"]}, vault.signing_key)
    record = vault.add_evidence(data, "accusation", "ada")
    assert vault.evidence() == [record]
    assert vault.document(record.id) == data
    assert (record.kind, record.subject, vault.license_records()) == ("accusation", "ada", [])


def test_the_same_evidence_is_kept_once(vault: Vault) -> None:
    data = sign_document("evidence", {}, vault.signing_key)
    vault.add_evidence(data, "verification", "a")
    with pytest.raises(ParameterError, match="already"):
        vault.add_evidence(data, "verification", "b")


def test_evidence_of_a_stranger_is_kept_only_on_request(vault: Vault) -> None:
    auditor = SigningKey.generate()
    data = sign_document("evidence", {}, auditor)
    with pytest.raises(UntrustedError):
        vault.add_evidence(data, "verification", "a")
    vault.add_evidence(data, "verification", "a", anchors=[auditor.verify_key])
    assert len(vault.evidence()) == 1


def test_the_contents_hold_nothing_secret(vault: Vault) -> None:
    vault.issue_user("ada", secret="resnet", model=MODEL)
    vault.add_evidence(sign_document("evidence", {}, vault.signing_key), "verification", "a")
    text = json.dumps(vault.contents())
    assert {name: len(items) for name, items in vault.contents().items()} == {
        "secrets": 1,
        "users": 1,
        "evidence": 1,
        "licenses": 0,
    }
    assert SECRET.reveal_seed().hex() not in text


def test_nothing_that_has_a_name_can_be_read_without_the_key(vault: Vault) -> None:
    vault.issue_user("a-very-visible-user", secret="resnet", model=MODEL)
    vault.close()
    stored = b"".join(path.read_bytes() for path in vault.path.iterdir())
    assert b"hpke" in stored or b"argon2id" in stored  # the header is readable
    for hidden in (b"visible", b"resnet", MODEL.encode(), b"example", SECRET.reveal_seed(), b"sealmark-sign"):
        assert hidden not in stored


def test_everything_can_be_exported(vault: Vault, tmp_path: Path) -> None:
    vault.issue_user("ada", secret="resnet", model=MODEL)
    data = sign_document("evidence", {}, vault.signing_key)
    record = vault.add_evidence(data, "verification", "a")
    export_all(vault, tmp_path / "out")
    assert read_secret(tmp_path / "out/secrets/resnet.safetensors") == SECRET
    assert (tmp_path / f"out/documents/{record.id}.json").read_bytes() == data
    assert json.loads((tmp_path / "out/contents.json").read_text()) == vault.contents()
    keys = json.loads((tmp_path / "out/keys.json").read_text())
    assert SigningKey.parse(keys["signing"]) == vault.signing_key
    assert Identity.parse(keys["identity"]).recipient == vault.recipient


def test_an_export_takes_nothings_place(vault: Vault, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ParameterError, match="already"):
        export_all(vault, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_transaction_is_undone_as_a_whole(vault: Vault, key_file: Path) -> None:
    def issue() -> None:
        with vault.transaction():
            vault.issue_user("ada", secret="resnet", model=MODEL)
            raise OSError("the caller's own")

    with pytest.raises(OSError, match="the caller's own"):
        issue()
    with reopened(vault, key_file) as again:
        assert again.users() == []


def test_a_thing_too_large_is_refused(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealmark.vault.store.MAX_BODY", 100)
    with pytest.raises(ParameterError, match="too large"):
        vault.add_secret("vgg", SECRET)


def test_ten_thousand_users_fit_in_one_transaction(vault: Vault, key_file: Path) -> None:
    with vault.transaction():
        for index in range(10_000):
            vault.issue_user(f"user-{index}", secret="resnet", model=MODEL, mark={"index": index})
    with reopened(vault, key_file) as again:
        assert [record.mark["index"] for record in again.users("resnet")] == list(range(10_000))
