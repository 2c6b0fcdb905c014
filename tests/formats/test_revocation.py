"""Revocation lists: what was taken back, and which list is the newer one."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sealmark.core.errors import ParameterError, RevokedError, SealmarkError, StaleListError
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.license import License
from sealmark.formats.revocation import Revocation, RevocationList, read_revocations, sign_revocations

FILE = json.loads((Path(__file__).parents[1] / "vectors" / "revocation.json").read_text())
KEY = SigningKey(bytes(32))
ANCHORS = [KEY.verify_key]
START = datetime(2031, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LICENSE = License("7", "ada", "ab" * 32, issued=START)


def outcome_of(vector: dict[str, str]) -> str:
    owner = VerifyKey(bytes.fromhex(FILE["keys"]["owner"]))
    try:
        read_revocations(base64.b64decode(vector["data"]), [owner], seen=3).check(LICENSE)
    except SealmarkError as error:
        return error.code
    return "OK"


@pytest.mark.parametrize("vector", FILE["vectors"], ids=lambda vector: vector["name"])
def test_the_vector_has_its_outcome(vector: dict[str, str]) -> None:
    assert outcome_of(vector) == vector["outcome"]


REVOKED = RevocationList(3, (Revocation("7", START, "not paid"),), START)


def test_a_revocation_list_reads_back() -> None:
    assert read_revocations(sign_revocations(REVOKED, KEY), ANCHORS, seen=3) == REVOKED


def test_a_license_on_the_list_is_refused() -> None:
    with pytest.raises(RevokedError, match="not paid"):
        REVOKED.check(LICENSE)


def test_a_license_that_is_not_on_the_list_passes() -> None:
    REVOKED.check(replace(LICENSE, id="8"))


def test_an_older_list_than_the_one_seen_is_refused() -> None:
    with pytest.raises(StaleListError, match="number 4"):
        read_revocations(sign_revocations(REVOKED, KEY), ANCHORS, seen=4)


def test_a_list_that_is_too_old_is_refused() -> None:
    data, day = sign_revocations(REVOKED, KEY), timedelta(days=1)
    assert read_revocations(data, ANCHORS, max_age=day, now=START + day).number == 3
    with pytest.raises(StaleListError, match="too old"):
        read_revocations(data, ANCHORS, max_age=day, now=START + day + SECOND)


@pytest.mark.parametrize("revocations", [RevocationList(0), RevocationList(1, (Revocation("", START),))])
def test_a_list_that_makes_no_sense_is_not_signed(revocations: RevocationList) -> None:
    with pytest.raises(ParameterError):
        sign_revocations(revocations, KEY)


def test_a_license_that_was_replaced_is_refused_and_its_renewal_passes() -> None:
    entry = Revocation("7", START, "renewed", before=START + SECOND)
    found = read_revocations(sign_revocations(RevocationList(1, (entry,), START), KEY), ANCHORS)
    assert found.entries == (entry,)
    with pytest.raises(RevokedError, match="replaced"):
        found.check(LICENSE)
    found.check(replace(LICENSE, issued=START + SECOND))
