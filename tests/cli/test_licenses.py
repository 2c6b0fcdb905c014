from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from sealmark.cli.granting import moment
from sealmark.core import registry
from sealmark.core.errors import ParameterError
from sealmark.core.weights import save_model
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.license import read_license, verify_license
from sealmark.formats.times import utc_now
from sealmark.runtime import licensed
from sealmark.tasks.digits import task as digits_task
from sealmark.vault import Vault

PLAIN = "plain.safetensors"
ISSUE = f"issue {PLAIN} --user ada --to ada.recipient --out ada.sealed"
OPEN = "open ada.sealed --license ada.lic --identity ada.key"


@pytest.fixture(autouse=True)
def _machine(desk, monkeypatch):
    """A desk with the keys of two users, and a machine that remembers nothing yet."""
    monkeypatch.setenv("SEALMARK_STATE", str(desk / ".state"))
    monkeypatch.setattr(registry, "task", lambda name: digits_task())
    for name in ("ada", "bob"):
        identity = Identity.generate()
        Path(f"{name}.key").write_text(identity.reveal())
        Path(f"{name}.recipient").write_text(str(identity.recipient))


def anchor() -> VerifyKey:
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        return vault.verify_key


def granted(path="ada.lic"):
    return verify_license(Path(path).read_bytes(), [anchor()])


def listed(sealmark) -> list[dict]:
    return json.loads(sealmark("list --json").stdout)["licenses"]


def test_a_license_lies_beside_the_copy_and_is_for_it(sealmark):
    told = json.loads(sealmark(f"issue {PLAIN} --user ada --out ada.safetensors --json").stdout)["copies"][0]
    assert told["license"] == "ada.lic"
    found = read_license(Path("ada.lic").read_bytes(), [anchor()], model=told["digest"])
    assert (found.user, found.scheme, found.rights.not_after) == ("ada", "spread_spectrum", None)
    assert not found.keys


def test_a_license_says_what_was_granted(sealmark):
    here = sealmark("device").stdout.strip()
    grant = (
        f"--expires 2040-05-17 --starts 2026-01-01 --level gold --feature a --feature b --seats 2 --device {here}"
    )
    sealmark(f"{ISSUE} {grant}")
    rights = granted().rights
    assert rights.not_after == datetime(2040, 5, 17, 23, 59, 59, tzinfo=UTC)
    assert rights.not_before == datetime(2026, 1, 1, tzinfo=UTC)
    assert (rights.level, rights.features, rights.seats) == ("gold", ("a", "b"), 2)
    assert granted().devices == (here,)


def test_a_sealed_copy_opens_with_license_and_identity(sealmark):
    sealmark(f"{ISSUE} --expires 30d --feature export")
    told = json.loads(sealmark(f"{OPEN} --task digits --json").stdout)
    assert (told["user"], told["level"], told["features"]) == ("ada", "standard", ["export"])
    assert told["tensors"] > 2
    assert told["parameters"] > 1000
    assert told["accuracy"] > 0.9


def test_opening_writes_nothing_beside_the_memory_of_the_machine(sealmark, contents):
    sealmark(ISSUE)
    before = contents()
    text = sealmark(OPEN).stdout
    assert "never" in text
    assert {name for name in contents() if ".state" not in name} == set(before)


def test_the_copy_that_opens_is_traced_to_its_user(sealmark):
    sealmark(f"issue {PLAIN} --user bob --out bob.safetensors")
    sealmark(ISSUE)
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        key = vault.verify_key
    opened = licensed.open("ada.sealed", "ada.lic", anchors=[key], opener="ada.key")
    model = digits_task().model(np.random.default_rng(0))
    save_model(opened.load_into(model), "leak.safetensors")
    found = json.loads(sealmark(f"trace leak.safetensors --secret plain --original {PLAIN} --json").stdout)
    assert [entry["user"] for entry in found["accused"]] == ["ada"]


def test_a_plain_copy_opens_with_its_license_alone(sealmark):
    sealmark(f"issue {PLAIN} --user ada --out ada.safetensors")
    sealmark("open ada.safetensors --license ada.lic")


def test_an_anchor_opens_where_there_is_no_vault(sealmark):
    sealmark(ISSUE)
    Path("owner.key").write_text(str(anchor()))
    sealmark(f"{OPEN} --anchor owner.key --vault nowhere")
    sealmark(f"{OPEN} --anchor {anchor()} --vault nowhere")
    assert "--anchor KEY" in sealmark(f"{OPEN} --vault nowhere", code=2).stderr


def test_a_passphrase_opens_what_was_sealed_under_it(sealmark):
    line = f"issue {PLAIN} --user ada --with-passphrase --out ada.sealed"
    sealmark(line, SEALMARK_FILE_PASSPHRASE="open sesame")
    opening = "open ada.sealed --license ada.lic --with-passphrase"
    sealmark(opening, SEALMARK_FILE_PASSPHRASE="open sesame")
    assert "WRONG_KEY" in sealmark(opening, code=1, SEALMARK_FILE_PASSPHRASE="open says me").stderr


def test_issuing_under_a_passphrase_again_keeps_what_stands(sealmark):
    line = f"issue {PLAIN} --user ada --with-passphrase --out ada.sealed --json"
    sealmark(line, SEALMARK_FILE_PASSPHRASE="open sesame")
    assert not json.loads(sealmark(line, SEALMARK_FILE_PASSPHRASE="open sesame").stdout)["copies"][0]["made"]


@pytest.mark.parametrize(
    ("grant", "opening", "reason"),
    [
        ("--expires 2020-01-01", OPEN, "EXPIRED"),
        ("--starts 2040-01-01", OPEN, "NOT_YET_VALID"),
        ("", OPEN.replace("ada.key", "bob.key"), "WRONG_KEY"),
        ("", OPEN.replace(" --identity ada.key", ""), "WRONG_KEY"),
    ],
)
def test_a_refusal_names_its_reason(sealmark, grant, opening, reason):
    sealmark(f"{ISSUE} {grant}")
    error = sealmark(f"{opening} --json", code=1)
    assert error.stdout == ""
    assert json.loads(error.stderr)["error"]["code"] == reason


def test_a_license_of_another_machine_is_refused(sealmark, monkeypatch):
    sealmark(f"{ISSUE} --device {sealmark('device').stdout.strip()}")
    sealmark(OPEN)
    monkeypatch.setattr(licensed, "matches", lambda device, here: False)
    assert "DEVICE_MISMATCH" in sealmark(OPEN, code=1).stderr


def test_another_users_copy_is_refused(sealmark):
    sealmark(ISSUE)
    sealmark(f"issue {PLAIN} --user bob --to bob.recipient --out bob.sealed")
    assert "MODEL_MISMATCH" in sealmark("open bob.sealed --license ada.lic --identity ada.key", code=3).stderr


def test_a_strangers_license_is_not_trusted(sealmark):
    sealmark(ISSUE)
    sealmark("init --vault other")
    error = sealmark(f"{OPEN} --vault other", code=1).stderr
    assert "UNTRUSTED" in error


def test_a_revoked_license_opens_no_more_once_the_list_was_seen(sealmark):
    sealmark(ISSUE)
    sealmark("revoke ada --reason 'did not pay' --out list.json")
    sealmark(OPEN)
    assert "REVOKED" in sealmark(f"{OPEN} --revocations list.json", code=1).stderr
    assert "REVOKED" in sealmark(OPEN, code=1).stderr
    assert listed(sealmark)[0]["status"] == "revoked"


def test_a_renewed_license_opens_the_same_copy(sealmark):
    sealmark(f"{ISSUE} --expires 2020-01-01 --feature a")
    sealmark(OPEN, code=1)
    told = json.loads(sealmark("renew ada --expires 30d --level gold --out new.lic --json").stdout)
    assert (told["level"], told["edition"]) == ("gold", 1)
    assert json.loads(sealmark(OPEN.replace("ada.lic", "new.lic") + " --json").stdout)["features"] == ["a"]


def test_a_renewal_to_less_says_that_a_list_is_due(sealmark):
    sealmark(f"{ISSUE} --expires 60d")
    assert "publish" in sealmark(f"renew {granted().id} --expires 30d --out new.lic").stderr
    assert "publish" not in sealmark("renew ada --expires 90d --out newer.lic").stderr
    told = json.loads(sealmark("revoke --out list.json --json").stdout)
    assert [(entry["license"], entry["reason"]) for entry in told["entries"]] == [(granted().id, "renewed")]
    assert "REVOKED" in sealmark(f"{OPEN} --revocations list.json", code=1).stderr
    sealmark(OPEN.replace("ada.lic", "newer.lic"))


def test_one_license_is_revoked_by_its_id_and_the_user_stays(sealmark):
    sealmark(ISSUE)
    told = json.loads(sealmark(f"revoke {granted().id} --out list.json --json").stdout)
    assert (told["copies"], told["licenses"]) == (0, 1)
    assert "REVOKED" in sealmark(f"{OPEN} --revocations list.json", code=1).stderr
    sealmark(f"{ISSUE} --force")
    sealmark(f"{OPEN} --revocations list.json")


def test_the_number_of_a_list_goes_on_after_a_backup(sealmark):
    sealmark(ISSUE)
    assert json.loads(sealmark("revoke ada --out list.json --after 41 --json").stdout)["list"] == 42


def test_revoking_nobody_writes_the_list_or_is_refused(sealmark):
    assert "who is revoked?" in sealmark("revoke", code=2).stderr
    assert json.loads(sealmark("revoke --out list.json --json").stdout)["entries"] == []


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("renew eve --expires 30d --out new.lic", 2, "no such license"),
        ("renew ada --expires soon --out new.lic", 2, "bad time"),
        ("renew ada --expires 30d --out ada.lic", 2, "--force"),
        (f"issue {PLAIN} --user bob --expires never --out b", 2, "bad time"),
        (f"issue {PLAIN} --user bob --expires 2026-02-30 --out b", 2, "bad time"),
        (f"issue {PLAIN} --user bob --expires 2030-01-01 --starts 2031-01-01 --out b", 2, "ends before"),
        (f"issue {PLAIN} --user bob --user eve --to bob.recipient --out b", 2, "one key for several"),
        (f"issue {PLAIN} --user bob --to bob.recipient --with-passphrase --out b", 2, "one key for several"),
        (f"issue {PLAIN} --user bob --to nonsense --out b", 2, "recipient"),
        (f"issue {PLAIN} --out b", 2, "no users"),
        ("open ada.sealed --license ada.lic --identity ada.key --with-passphrase", 2, "one of --identity"),
        ("open ada.sealed --license ada.key", 3, "BAD_FORMAT"),
        ("open nothing --license ada.lic --identity ada.key", 2, "no such copy"),
    ],
)
def test_a_wrong_call_writes_nothing(sealmark, contents, line, code, said):
    sealmark(ISSUE)
    before, kept = contents(), listed(sealmark)
    assert said in sealmark(line, code=code).stderr
    assert contents() == before
    assert listed(sealmark) == kept


def test_the_list_shows_who_holds_what(sealmark):
    sealmark(f"{ISSUE} --expires 2040-01-01 --level gold")
    sealmark(f"issue {PLAIN} --user bob --expires 2020-01-01 --out bob.safetensors")
    text = sealmark("list").stdout
    assert "2040-01-01T23:59:59Z" in text
    assert "gold" in text
    assert [(each["user"], each["status"]) for each in listed(sealmark)] == [("ada", "valid"), ("bob", "expired")]
    assert "bob" not in sealmark("list --user ada").stdout


def test_a_vault_lists_and_exports_licenses(sealmark):
    sealmark(ISSUE)
    assert "licenses: 1" in sealmark("vault list").stdout
    sealmark(f"vault export --document {granted().id[:8]} --out again.lic")
    assert Path("again.lic").read_bytes() == Path("ada.lic").read_bytes()


def test_an_end_that_counts_from_now_is_the_end_of_the_new_license(sealmark):
    sealmark(ISSUE)
    told = json.loads(sealmark(f"{ISSUE.replace('ada.sealed', 'again.sealed')} --expires 2d --json").stdout)
    assert told["copies"][0]["expires"] != "never"
    assert granted("again.lic").rights.not_after - utc_now() < timedelta(days=3)
    sealmark(f"{ISSUE.replace('ada.sealed', 'third.sealed')} --expires 1d")
    assert granted("third.lic").rights.not_after < granted("again.lic").rights.not_after


def test_a_renewal_keeps_the_end_unless_another_is_named(sealmark):
    sealmark(f"{ISSUE} --expires 30d")
    end = granted().rights.not_after
    sealmark("renew ada --level premium --out new.lic")
    assert (granted("new.lic").rights.not_after, granted("new.lic").rights.level) == (end, "premium")
    sealmark("renew ada --expires never --out newer.lic")
    assert granted("newer.lic").rights.not_after is None


def test_seats_without_devices_are_refused(sealmark):
    assert "--device ID" in sealmark(f"{ISSUE} --seats 2", code=2).stderr


def test_users_whose_files_would_be_one_are_refused(sealmark, contents):
    Path("users.txt").write_text("Bolt\nbolt\n")
    before = contents()
    assert "share a file" in sealmark(f"issue {PLAIN} --users-file users.txt --out copies", code=2).stderr
    assert contents() == before


def test_a_recipient_after_a_space_is_not_taken_for_a_part_of_the_name(sealmark, contents):
    Path("users.txt").write_text(f"ada {Path('ada.recipient').read_text()}\n")
    before = contents()
    assert "a tab" in sealmark(f"issue {PLAIN} --users-file users.txt --out copies", code=2).stderr
    assert contents() == before


def test_a_missing_key_file_is_named(sealmark):
    sealmark(ISSUE)
    assert "no such verify key" in sealmark(f"{OPEN} --anchor nowhere.anchor", code=2).stderr


def test_other_rights_for_the_same_copy_ask_for_force_or_a_renewal(sealmark):
    sealmark(f"{ISSUE} --level gold")
    assert "is there already" in sealmark(f"{ISSUE} --level silver", code=2).stderr
    sealmark(f"{ISSUE} --level silver --force")
    assert granted().rights.level == "silver"
    sealmark(OPEN)


def test_ends_that_count_from_now_do_not_make_another_license(sealmark):
    sealmark(f"{ISSUE} --expires 12h")
    first = Path("ada.lic").read_bytes()
    sealmark(f"{ISSUE} --expires 13h")
    assert Path("ada.lic").read_bytes() == first


def test_a_sealed_copy_that_was_lost_opens_with_the_license_from_before(sealmark):
    sealmark(ISSUE)
    first = Path("ada.lic").read_bytes()
    Path("ada.sealed").unlink()
    Path("ada.lic").unlink()
    sealmark(ISSUE)
    assert Path("ada.lic").read_bytes() == first
    sealmark(OPEN)


def test_recipients_come_with_a_file_of_users(sealmark):
    recipient = Path("bob.recipient").read_text()
    Path("users.txt").write_text(f"ada\nbob\t{recipient}\n")
    sealmark(f"issue {PLAIN} --users-file users.txt --out copies")
    names = ["ada.lic", "ada.safetensors", "bob.lic", "bob.sealed"]
    assert sorted(path.name for path in Path("copies").iterdir()) == names
    sealmark("open copies/bob.sealed --license copies/bob.lic --identity bob.key")


def test_a_folder_of_shards_is_sealed_as_a_folder(sealmark):
    Path("parts").mkdir()
    Path(PLAIN).rename("parts/model.safetensors")
    sealmark("issue parts --user ada --to ada.recipient --out ada.sealed")
    sealmark(OPEN)


@pytest.fixture
def locked(sealmark) -> str:
    sealmark(f"lock {PLAIN} --scheme selective_encryption --task digits --name grades --out locked.safetensors")
    return "issue locked.safetensors --lock-key grades --license-only"


def test_a_locks_grade_decides_what_a_license_gives(sealmark, locked):
    sealmark(f"{locked} --user ada --to ada.recipient --level 1 --out ada.lic")
    sealmark(f"{locked} --user bob --to bob.recipient --out bob.lic")
    scores = {}
    for user in ("ada", "bob"):
        opening = f"open locked.safetensors --license {user}.lic --identity {user}.key --task digits --json"
        told = json.loads(sealmark(opening).stdout)
        assert told["lock"] == "selective_encryption"
        scores[user] = told["accuracy"]
    assert granted().rights.level == "1"
    assert scores["ada"] < scores["bob"] - 0.05


def test_a_license_of_one_grade_holds_no_key_of_a_higher_one(sealmark, locked):
    sealmark(f"{locked} --user ada --to ada.recipient --level 1 --out ada.lic")
    opened = licensed.open("locked.safetensors", "ada.lic", anchors=[anchor()], opener="ada.key")
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        assert opened.key.reveal_seed() != vault.secret("grades").reveal_seed()


def test_a_license_of_a_lock_is_not_renewed_to_another_level(sealmark, locked):
    sealmark(f"{locked} --user ada --to ada.recipient --level 1 --out ada.lic")
    assert "keeps its level" in sealmark("renew ada --level 2 --out new.lic", code=2).stderr
    sealmark("renew ada --level 1 --expires 30d --out new.lic")


def test_many_get_licenses_for_a_locked_model(sealmark, locked):
    recipient = Path("ada.recipient").read_text()
    Path("users.txt").write_text("".join(f"user{number}\t{recipient}\n" for number in range(5)))
    sealmark(f"{locked} --level 2 --users-file users.txt --out licenses")
    before = Path("licenses/user3.lic").read_bytes()
    Path("licenses/user3.lic").unlink()
    sealmark(f"{locked} --level 2 --users-file users.txt --out licenses")
    assert Path("licenses/user3.lic").read_bytes() == before
    assert len(list(Path("licenses").iterdir())) == len(listed(sealmark)) == 5


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("--user ada --out ada.lic", 2, "a key for nobody"),
        ("--user ada --to ada.recipient --level 9 --out ada.lic", 2, "no such grade"),
        ("--user ada --to ada.recipient --level gold --out ada.lic", 2, "1 to"),
        (f"--user ada --to ada.recipient --out {PLAIN}", 2, "--force"),
        ("--user ada --to ada.recipient --out no/ada.lic", 2, "existing folder"),
    ],
)
def test_a_wrong_call_for_a_locks_key_writes_nothing(sealmark, locked, contents, options, code, said):
    before = contents()
    assert said in sealmark(f"{locked} {options}", code=code).stderr
    assert contents() == before
    assert listed(sealmark) == []


def test_the_model_before_it_was_locked_is_refused(sealmark, locked):
    line = f"issue {PLAIN} --lock-key grades --user ada --to ada.recipient --out ada.lic"
    assert "not locked" in sealmark(line, code=3).stderr


def test_licenses_alone_are_of_a_lock(sealmark):
    line = f"issue {PLAIN} --license-only --user ada --to ada.recipient --out ada.lic"
    assert "--lock-key NAME" in sealmark(line, code=2).stderr


def test_a_watermarks_secret_is_no_key(sealmark, locked):
    line = "issue locked.safetensors --lock-key mine --user ada --to ada.recipient --out ada.lic"
    assert "cannot hand out keys with uchida" in sealmark(line, code=2).stderr


def test_marked_copies_of_a_locked_model_open_to_their_grade_and_a_leak_names_its_user(sealmark, locked):
    recipient = {name: Path(f"{name}.recipient").read_text() for name in ("ada", "bob")}
    Path("users.txt").write_text("".join(f"{name}\t{text}\n" for name, text in recipient.items()))
    sealmark("issue locked.safetensors --lock-key grades --users-file users.txt --out copies")
    opened = licensed.open("copies/bob.sealed", "copies/bob.lic", anchors=[anchor()], opener="bob.key")
    network = opened.load_into(digits_task().model(np.random.default_rng(0)))
    assert digits_task().score(network) > 0.9
    assert digits_task().score(network) - granted_score("copies/bob.sealed") > 0.5
    save_model(network, Path("leak.safetensors"))
    line = "trace leak.safetensors --secret locked --original locked.safetensors --json"
    assert [entry["user"] for entry in json.loads(sealmark(line).stdout)["accused"]] == ["bob"]


def granted_score(path: str) -> float:
    """Of a sealed copy with its seal off and its lock on."""
    opened = licensed.open(path, path.replace(".sealed", ".lic"), anchors=[anchor()], opener="bob.key")
    network = digits_task().model(np.random.default_rng(0))
    replace(opened, key=None).load_into(network)
    return digits_task().score(network)


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("1h", 1)])
def test_hours_count_from_now(text, hours):
    now = utc_now()
    assert moment(text, end=True, now=now) - now == timedelta(hours=hours)


@pytest.mark.parametrize(("text", "days"), [("1d", 1), ("2w", 14), ("1y", 365)])
def test_days_end_with_the_day(text, days):
    now = datetime(2031, 5, 17, 9, 30, tzinfo=UTC)
    end = moment(text, end=True, now=now)
    assert (end + timedelta(seconds=1)).time() == datetime.min.time()
    assert end.date() - now.date() == timedelta(days=days)


def test_a_time_is_taken_to_the_second_and_none_is_for_ever():
    assert moment("2031-05-17T09:30:00Z", end=True) == datetime(2031, 5, 17, 9, 30, tzinfo=UTC)
    assert moment(None, end=True) is None


@pytest.mark.parametrize("text", ["", "0d", "-1d", "99999y", "2031-13-01", "2031-05-17T09:30:00", "tomorrow", "5m"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(ParameterError, match="bad time"):
        moment(text, end=True)
