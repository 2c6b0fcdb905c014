"""Licenses in a vault: issued, renewed, taken back, listed, and nothing of it lost."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import ParameterError, RevokedError, UnknownNameError, UntrustedError
from sealmark.core.secret import Secret
from sealmark.crypto.armor import armor
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import SigningKey
from sealmark.formats.license import License, Rights, sign_license, verify_license
from sealmark.formats.license_keys import open_keys
from sealmark.formats.revocation import RevocationList, read_revocations
from sealmark.vault import Vault, export_all

MODEL = "ab" * 32
START, END = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 12, 31, tzinfo=UTC)
DAY = timedelta(days=1)
PERSON = Identity(bytes(range(32)))
DATA_KEY = bytes(range(32))
LOCK_KEY = Secret(bytes(32), {"scheme": "example", "model": MODEL})
DEVICES = [armor("sealmark-device-v1:", bytes([number] * 32)) for number in range(3)]


def published(vault: Vault, after: int = 0) -> RevocationList:
    return read_revocations(vault.revocation_list(after=after), [vault.verify_key])


def read(vault: Vault, data: bytes) -> License:
    return verify_license(data, [vault.verify_key])


def test_an_issued_license_holds_what_was_granted(vault: Vault) -> None:
    rights = Rights("gold", START, END, seats=2, features=("chat",))
    made = vault.issue_license(
        "ada", model=MODEL, to=PERSON.recipient, data_key=DATA_KEY, key=LOCK_KEY, scheme="example", rights=rights,
        devices=DEVICES[:2], mark="cd" * 32, number="7", issued=START,
    )  # fmt: skip
    found = read(vault, made.data)
    assert (found.id, found.user, found.model, found.scheme) == ("7", "ada", MODEL, "example")
    assert (found.rights, found.devices, found.mark, found.issued) == (rights, tuple(DEVICES[:2]), "cd" * 32, START)
    assert open_keys(found, PERSON) == (DATA_KEY, LOCK_KEY)


def test_its_record_is_listed_and_its_document_comes_back(vault: Vault, key_file: Path) -> None:
    made = vault.issue_license("ada", model=MODEL, rights=Rights(not_after=END), devices=DEVICES, issued=START)
    vault.close()
    with Vault.open(vault.path, key_file=key_file) as again:
        assert again.license_records() == [made.record] == [again.license_record(made.record.id)]
        assert again.license_document(made.record.id) == made.data
    assert made.record.document == sha256_hex(made.data)
    assert (made.record.not_before, made.record.not_after) == ("", "2031-12-31T00:00:00Z")
    assert made.record.devices == tuple(DEVICES)


def test_licenses_get_ids_of_their_own(vault: Vault) -> None:
    ids = {vault.issue_license("ada", model=MODEL).record.id for _ in range(5)}
    assert len(ids) == 5
    assert all(len(number) == 16 for number in ids)


def test_an_id_is_given_once(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7")
    with pytest.raises(ParameterError, match="already"):
        vault.issue_license("ben", model=MODEL, number="7")
    assert [record.user for record in vault.license_records()] == ["ada"]


def test_licenses_are_listed_by_user_and_by_model_in_the_order_of_issue(vault: Vault) -> None:
    for number, (user, model) in enumerate([("ben", MODEL), ("ada", MODEL), ("ada", "00")]):
        vault.issue_license(user, model=model, number=str(number))
    assert [record.id for record in vault.license_records()] == ["0", "1", "2"]
    assert [record.id for record in vault.license_records("ada")] == ["1", "2"]
    assert [record.id for record in vault.license_records("ada", model="00")] == ["2"]
    assert vault.license_records("cy") == []


def test_a_bad_user_gets_no_license(vault: Vault) -> None:
    with pytest.raises(ParameterError, match="bad user"):
        vault.issue_license("a\0", model=MODEL)


def test_more_devices_than_seats_are_refused_and_nothing_is_kept(vault: Vault) -> None:
    with pytest.raises(ParameterError, match="seats"):
        vault.issue_license("ada", model=MODEL, rights=Rights(seats=2), devices=DEVICES)
    assert vault.license_records() == []


@pytest.mark.parametrize("keys", [{"data_key": DATA_KEY}, {"key": LOCK_KEY}], ids=["data key", "lock's key"])
def test_keys_are_wrapped_for_somebody(vault: Vault, keys: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match="nobody"):
        vault.issue_license("ada", model=MODEL, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "status"),
    [
        (START - DAY, "not yet valid"),
        (START, "valid"),
        (END, "valid"),
        (END + DAY, "expired"),
    ],
)
def test_a_record_tells_how_the_license_stands(vault: Vault, now: datetime, status: str) -> None:
    record = vault.issue_license("ada", model=MODEL, rights=Rights("x", START, END)).record
    assert record.status(now) == status
    assert replace(record, revoked="2031-01-01T00:00:00Z").status(now) == "revoked"


def test_a_license_without_an_end_is_valid_now(vault: Vault) -> None:
    assert vault.issue_license("ada", model=MODEL).record.status() == "valid"


def test_a_renewal_has_the_same_id_and_keys_and_another_end(vault: Vault) -> None:
    old = vault.issue_license(
        "ada", model=MODEL, to=PERSON.recipient, data_key=DATA_KEY, key=LOCK_KEY, issued=START
    )
    new = vault.renew_license(old.record.id, not_after=END, issued=START + DAY)
    found = read(vault, new.data)
    assert (found.id, found.rights, found.issued) == (old.record.id, Rights(not_after=END), START + DAY)
    assert open_keys(found, PERSON) == (DATA_KEY, LOCK_KEY)
    assert vault.license_records() == [new.record]
    assert (new.record.edition, new.record.document) == (1, sha256_hex(new.data))


def test_a_renewal_changes_the_rights_that_are_given_and_leaves_the_others(vault: Vault) -> None:
    rights = Rights("gold", START, END, seats=2, features=("chat",))
    vault.issue_license("ada", model=MODEL, rights=rights, devices=DEVICES[:1], number="7")
    assert read(vault, vault.renew_license("7", not_after=None).data).rights == replace(rights, not_after=None)
    made = vault.renew_license(
        "7", not_after=END, level="silver", seats=3, features=["export"], devices=DEVICES
    )  # fmt: skip
    found = read(vault, made.data)
    assert found.rights == Rights("silver", START, END, seats=3, features=("export",))
    assert found.devices == tuple(DEVICES)


def test_no_document_is_lost_by_a_renewal(vault: Vault) -> None:
    made = [vault.issue_license("ada", model=MODEL, number="7").data]
    made += [vault.renew_license("7", not_after=END + number * DAY).data for number in range(2)]
    assert [vault.license_document("7", edition) for edition in range(3)] == made
    assert vault.license_document("7") == made[-1]
    with pytest.raises(UnknownNameError):
        vault.license_document("7", 3)


def test_each_renewal_is_later_than_the_document_before(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7", issued=START)
    times = [vault.renew_license("7", not_after=END, issued=START).record.issued for _ in range(2)]
    assert times == ["2031-01-01T00:00:01Z", "2031-01-01T00:00:02Z"]


def test_a_user_with_one_license_is_named_by_it(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7")
    assert vault.renew_license("ada", not_after=END).record.id == "7"


def test_a_user_with_several_licenses_is_asked_which(vault: Vault) -> None:
    for number in ("7", "8"):
        vault.issue_license("ada", model=MODEL, number=number)
    with pytest.raises(ParameterError, match=r"'7', '8'"):
        vault.renew_license("ada", not_after=END)
    vault.revoke_license("7", "lost")
    assert vault.renew_license("ada", not_after=END).record.id == "8"


def test_an_unknown_license_is_the_callers_mistake(vault: Vault) -> None:
    for act in (vault.license_record, vault.license_document, lambda name: vault.revoke_license(name, "")):
        with pytest.raises(UnknownNameError):
            act("7")
    with pytest.raises(UnknownNameError):
        vault.renew_license("7", not_after=None)


def test_a_revoked_license_is_not_renewed(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7")
    record = vault.revoke_license("7", "not paid", time=START)
    assert (record.revoked, record.reason, record.status()) == ("2031-01-01T00:00:00Z", "not paid", "revoked")
    for name in ("7", "ada"):
        with pytest.raises(RevokedError, match="not paid"):
            vault.renew_license(name, not_after=END)
    assert vault.license_records() == [record]


def test_a_license_is_revoked_once(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7")
    record = vault.revoke_license("7", "first", time=START)
    with pytest.raises(RevokedError, match="first"):
        vault.revoke_license("7", "second")
    assert vault.license_record("7") == record


def test_who_lost_one_license_may_get_another(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL, number="7")
    vault.revoke_license("7", "device stolen")
    assert vault.issue_license("ada", model=MODEL).record.status() == "valid"


def test_a_revoked_user_has_no_license_left_and_gets_none(vault: Vault) -> None:
    vault.add_secret("resnet", LOCK_KEY)
    for number in ("7", "8"):
        vault.issue_license("ada", model=MODEL, number=number)
    vault.issue_license("ben", model=MODEL, number="9")
    vault.revoke_license("7", "lost", time=START)
    assert vault.revoke_user("ada", "leaked", time=START + DAY) == []
    assert [record.reason for record in vault.license_records()] == ["lost", "leaked", ""]
    assert vault.revoked_users() == {"ada": "2031-01-02T00:00:00Z leaked"}
    with pytest.raises(RevokedError, match="leaked"):
        vault.issue_license("ada", model=MODEL)
    with pytest.raises(RevokedError, match="leaked"):
        vault.issue_user("ada", secret="resnet", model=MODEL)
    assert vault.renew_license("ben", not_after=END).record.status(START) == "valid"


def test_a_revoked_users_license_from_elsewhere_is_not_renewed(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL)
    vault.revoke_user("ada", "leaked")
    vault.add_license(sign_license(License("8", "ada", MODEL), vault.signing_key))
    with pytest.raises(RevokedError, match="leaked"):
        vault.renew_license("8", not_after=END)


def test_revoking_a_user_again_keeps_the_first_time(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL)
    vault.revoke_user("ada", "first", time=START)
    vault.revoke_user("ada", "second")
    assert vault.revoked_users() == {"ada": "2031-01-01T00:00:00Z first"}
    assert vault.license_records()[0].reason == "first"


def test_taking_back_one_copy_leaves_the_licenses(vault: Vault) -> None:
    vault.add_secret("resnet", LOCK_KEY)
    vault.issue_user("ada", secret="resnet", model=MODEL)
    vault.issue_license("ada", model=MODEL)
    vault.revoke_user("ada", "leaked", secret="resnet")
    assert vault.license_records()[0].status() == "valid"
    assert vault.revoked_users() == {}


def test_the_list_names_what_was_taken_back_and_nothing_else(vault: Vault) -> None:
    vault.add_secret("resnet", LOCK_KEY)
    for user, copy in (("ada", "cd" * 32), ("ben", "ef" * 32)):
        vault.issue_user(user, secret="resnet", model=MODEL, copy=copy)
        vault.issue_license(user, model=copy, number=f"of {user}")
    assert published(vault).entries == ()
    vault.revoke_user("ada", "leaked", time=START)
    found = [(entry.license, entry.time, entry.reason, entry.before) for entry in published(vault).entries]
    assert found == [("cd" * 32, START, "leaked", None), ("of ada", START, "leaked", None)]


def test_each_list_has_a_larger_number_also_after_the_vault_was_restored(vault: Vault, key_file: Path) -> None:
    assert [published(vault).number for _ in range(3)] == [1, 2, 3]
    vault.close()
    with Vault.open(vault.path, key_file=key_file) as again:
        assert [published(again, after=9).number, published(again, after=2).number] == [10, 11]


def test_the_list_states_its_time(vault: Vault) -> None:
    assert read_revocations(vault.revocation_list(time=START), [vault.verify_key]).issued == START


WIDE = Rights("gold", None, END, 3, ("chat", "export"))


@pytest.mark.parametrize(
    "less",
    [
        {"not_after": END - DAY},
        {"not_after": END, "level": "silver"},
        {"not_after": END, "features": ["chat"]},
        {"not_after": END, "devices": DEVICES[:1]},
    ],
    ids=["a sooner end", "another level", "fewer features", "fewer devices"],
)
def test_a_renewal_to_less_takes_the_license_before_back(vault: Vault, less: dict[str, object]) -> None:
    old = vault.issue_license("ada", model=MODEL, rights=WIDE, devices=DEVICES[:2], issued=START)
    new = vault.renew_license("ada", **less, issued=START + DAY)  # type: ignore[arg-type]
    (entry,) = published(vault).entries
    assert entry.hits(read(vault, old.data))
    assert not entry.hits(read(vault, new.data))
    assert new.record.status(START + DAY) == "valid"


@pytest.mark.parametrize(
    "more",
    [
        {"not_after": None},
        {"not_after": END, "features": ["chat", "export", "edit"]},
        {"not_after": END, "devices": DEVICES},
        {"not_after": END, "devices": []},
    ],
    ids=["no end", "more features", "more devices", "any device"],
)
def test_a_renewal_to_more_leaves_the_license_before_alone(vault: Vault, more: dict[str, object]) -> None:
    vault.issue_license("ada", model=MODEL, rights=WIDE, devices=DEVICES[:2])
    vault.renew_license("ada", **more)  # type: ignore[arg-type]
    assert published(vault).entries == ()


def test_binding_a_free_license_to_a_device_takes_the_free_one_back(vault: Vault) -> None:
    vault.issue_license("ada", model=MODEL)
    vault.renew_license("ada", not_after=None, devices=DEVICES[:1])
    assert len(published(vault).entries) == 1


def test_what_was_taken_back_stays_so_after_the_next_renewal(vault: Vault) -> None:
    made = [vault.issue_license("ada", model=MODEL, rights=Rights(not_after=END), issued=START)]
    for number, end in enumerate((END - 2 * DAY, END - DAY), 1):
        made.append(vault.renew_license("ada", not_after=end, issued=START + number * DAY))
    found = published(vault)
    hits = [any(entry.hits(read(vault, item.data)) for entry in found.entries) for item in made]
    assert hits == [True, False, False]


def test_a_license_that_was_signed_elsewhere_is_kept_whatever_its_time(vault: Vault) -> None:
    past = License("7", "ada", MODEL, rights=Rights(not_after=datetime(2001, 1, 1, tzinfo=UTC)))
    data = sign_license(past, vault.signing_key)
    record = vault.add_license(data)
    assert vault.license_records() == [record]
    assert (record.status(), vault.license_document("7")) == ("expired", data)


def test_a_license_of_a_stranger_is_kept_only_on_request(vault: Vault) -> None:
    partner = SigningKey.generate()
    data = sign_license(License("7", "ada", MODEL), partner)
    with pytest.raises(UntrustedError):
        vault.add_license(data)
    assert vault.add_license(data, anchors=[partner.verify_key]).user == "ada"


def test_every_edition_is_exported(vault: Vault, tmp_path: Path) -> None:
    made = [vault.issue_license("ada", model=MODEL, devices=DEVICES), vault.renew_license("ada", not_after=END)]
    export_all(vault, tmp_path / "out")
    for item in made:
        assert (tmp_path / f"out/documents/{sha256_hex(item.data)}.json").read_bytes() == item.data
    assert json.loads((tmp_path / "out/contents.json").read_text())["licenses"] == vault.contents()["licenses"]


def test_nobody_without_the_key_reads_who_has_a_license(vault: Vault) -> None:
    vault.issue_license("a-very-visible-user", model=MODEL, number="a-very-visible-number")
    vault.close()
    stored = b"".join(path.read_bytes() for path in vault.path.iterdir())
    assert b"visible" not in stored
    assert MODEL.encode() not in stored


def test_five_hundred_licenses_with_keys_are_soon_made_in_one_transaction(vault: Vault) -> None:
    start = time.process_time()
    with vault.transaction():
        for number in range(500):
            vault.issue_license(f"user-{number}", model=MODEL, to=PERSON.recipient, data_key=DATA_KEY)
    assert time.process_time() - start < 5  # ten times what it takes; benchmarks/licenses.py says how long
    assert len({record.id for record in vault.license_records()}) == 500
    assert open_keys(read(vault, vault.license_document(vault.license_records()[-1].id)), PERSON)[0] == DATA_KEY
