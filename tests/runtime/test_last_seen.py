"""What a machine remembers: the latest time, and the newest list of each owner."""

import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import (
    ClockRollbackError,
    FormatError,
    ParameterError,
    ServiceError,
    UntrustedError,
)
from sealmark.crypto.signing import SigningKey
from sealmark.formats.revocation import RevocationList, sign_revocations
from sealmark.runtime.last_seen import LastSeen, state_folder

NOON = datetime(2031, 5, 17, 12, tzinfo=UTC)
SECOND, SKEW, DAY = timedelta(seconds=1), timedelta(seconds=300), timedelta(days=1)
KEY, OTHER = SigningKey(bytes(32)), SigningKey(bytes(range(32)))


@pytest.fixture
def seen(tmp_path: Path) -> LastSeen:
    return LastSeen(tmp_path / "deep" / "state")


def test_a_clock_that_goes_on_is_remembered(seen: LastSeen) -> None:
    for day in range(3):
        seen.check_clock(NOON + day * DAY)
    assert LastSeen(seen.folder).latest() == NOON + 2 * DAY


def test_a_clock_may_go_back_by_the_skew_and_no_more(seen: LastSeen) -> None:
    seen.check_clock(NOON)
    seen.check_clock(NOON - SKEW)
    with pytest.raises(ClockRollbackError, match="2031-05-17T12:00:00Z or later"):
        seen.check_clock(NOON - SKEW - SECOND)
    assert seen.latest() == NOON


def test_a_clock_cannot_be_turned_back_in_small_steps(seen: LastSeen) -> None:
    seen.check_clock(NOON)
    seen.check_clock(NOON - SKEW)
    with pytest.raises(ClockRollbackError):
        seen.check_clock(NOON - 2 * SKEW)


def test_a_clock_cannot_be_before_a_signed_document(seen: LastSeen) -> None:
    seen.check_clock(NOON - SKEW, NOON, NOON - DAY)
    with pytest.raises(ClockRollbackError) as caught:
        seen.check_clock(NOON - SKEW, NOON + SECOND)
    assert "delete" not in str(caught.value)  # for it would not help


def test_a_time_in_a_document_is_not_taken_for_the_clocks(seen: LastSeen) -> None:
    seen.check_clock(NOON - SKEW, NOON)
    assert seen.latest() == NOON - SKEW


def test_who_deletes_the_memory_goes_back_to_the_newest_document_and_no_further(seen: LastSeen) -> None:
    seen.check_clock(NOON + DAY, NOON)
    with pytest.raises(ClockRollbackError, match="delete") as caught:
        seen.check_clock(NOON, NOON)
    assert str(seen.folder / "seen.json") in str(caught.value)
    (seen.folder / "seen.json").unlink()
    seen.check_clock(NOON, NOON)
    with pytest.raises(ClockRollbackError):
        seen.check_clock(NOON - DAY, NOON)


def test_a_time_without_a_zone_is_the_callers_mistake(seen: LastSeen) -> None:
    with pytest.raises(ParameterError, match="zone"):
        seen.check_clock(NOON.replace(tzinfo=None))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"format":"sealmark.seen.v2","latest":"2031-05-17T12:00:00Z"}',
     b'{"format":"sealmark.seen.v1","latest":"2031"}', bytes(2000)],
    ids=["empty", "a list", "no fields", "another format", "no time", "too large"],
)  # fmt: skip
def test_a_damaged_memory_is_told_and_not_believed(seen: LastSeen, data: bytes) -> None:
    seen.check_clock(NOON)
    (seen.folder / "seen.json").write_bytes(data)
    for act in (seen.latest, lambda: seen.check_clock(NOON)):
        with pytest.raises(FormatError, match="Delete"):
            act()


@given(st.binary(max_size=100))
def test_no_bytes_in_the_memory_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / "seen.json").write_bytes(data)
    with pytest.raises(FormatError):
        LastSeen(folder).latest()


def test_the_newest_list_is_kept_for_each_owner(seen: LastSeen) -> None:
    for number in (1, 3, 2):
        seen.keep_revocations(KEY.verify_key, sign_revocations(RevocationList(number), KEY))
    kept = LastSeen(seen.folder).revocations(KEY.verify_key)
    assert kept is not None
    assert kept.number == 3
    assert seen.revocations(OTHER.verify_key) is None


def test_a_list_of_another_owner_is_not_kept(seen: LastSeen) -> None:
    with pytest.raises(UntrustedError):
        seen.keep_revocations(KEY.verify_key, sign_revocations(RevocationList(1), OTHER))
    assert not seen.folder.exists()


def test_a_kept_list_that_was_changed_is_told_and_not_believed(seen: LastSeen) -> None:
    data = sign_revocations(RevocationList(3), KEY)
    seen.keep_revocations(KEY.verify_key, data)
    (path,) = seen.folder.glob("revoked-*")
    for changed in (
        data[:-1],
        data.replace(b'"sig":"', b'"sig":"A', 1),
        sign_revocations(RevocationList(9), OTHER),
    ):
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="Delete"):
            seen.revocations(KEY.verify_key)


def test_the_memory_is_private(seen: LastSeen) -> None:
    seen.check_clock(NOON)
    assert stat.S_IMODE(seen.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in seen.folder.iterdir()} == {0o600}


def test_many_at_once_lose_nothing(seen: LastSeen) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda second: seen.check_clock(NOON + second * SECOND), range(64)))
    assert seen.latest() == NOON + 63 * SECOND


def test_a_folder_that_cannot_be_is_a_failure_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match="SEALMARK_STATE"):
        LastSeen(tmp_path / "file" / "state").check_clock(NOON)


def test_a_memory_that_cannot_be_read_is_a_failure_of_the_machine(seen: LastSeen) -> None:
    (seen.folder / "seen.json").mkdir(parents=True)
    with pytest.raises(ServiceError, match=r"seen\.json"):
        seen.latest()


def test_the_folder_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEALMARK_STATE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "b"))
    assert LastSeen().folder == state_folder() == tmp_path / "a"
    monkeypatch.delenv("SEALMARK_STATE")
    assert state_folder() == tmp_path / "b" / "sealmark"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local/state/sealmark"
