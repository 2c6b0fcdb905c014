"""Licenses and revocation lists: who may use which model, until when, unless it was taken back."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from sealmark.core.errors import (
    ExpiredError,
    FormatError,
    ModelMismatchError,
    ParameterError,
    RevokedError,
    SealmarkError,
    UntrustedError,
)
from sealmark.crypto.recipients import Identity
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.crypto.wrapping import stanza_from_json, unwrap, wrap
from sealmark.formats.envelope import sign_document
from sealmark.formats.license import License, Rights, read_license, sign_license
from sealmark.formats.revocation import Revocation, RevocationList, read_revocations, sign_revocations
from sealmark.formats.times import parse_utc, utc_text

FILE = json.loads((Path(__file__).parents[1] / "vectors" / "license.json").read_text())
KEY = SigningKey(bytes(32))
ANCHORS = [KEY.verify_key]
MODEL = "ab" * 32
START, END = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 12, 31, tzinfo=UTC)
LICENSE = License(
    id="7",
    user="Ada \u00c5.",
    model=MODEL,
    scheme="spread_spectrum",
    rights=Rights("trial", START, END, seats=2, features=("chat", "export")),
    wrap={"type": "example", "wrapped": "00"},
    mark="cd" * 32,
    issued=START,
)
SECOND = timedelta(seconds=1)


def outcome_of(vector: dict[str, str]) -> str:
    owner = VerifyKey(bytes.fromhex(FILE["keys"]["owner"]))
    try:
        read_license(base64.b64decode(vector["data"]), [owner], model=MODEL, now=parse_utc(vector["now"]))
    except SealmarkError as error:
        return error.code
    return "OK"


@pytest.mark.parametrize("vector", FILE["vectors"], ids=lambda vector: vector["name"])
def test_the_vector_has_its_outcome(vector: dict[str, str]) -> None:
    assert outcome_of(vector) == vector["outcome"]


def test_a_license_reads_back_with_its_issuer() -> None:
    found = read_license(sign_license(LICENSE, KEY), ANCHORS, model=MODEL, now=START)
    assert found == replace(LICENSE, issuer=KEY.kid)


def test_a_license_for_ever_holds_now() -> None:
    assert read_license(sign_license(License("7", "ada", MODEL), KEY), ANCHORS).rights == Rights()


def test_a_license_that_ended_is_refused_by_this_machines_clock() -> None:
    past = replace(LICENSE, rights=Rights(not_after=datetime(2001, 1, 1, tzinfo=UTC)))
    with pytest.raises(ExpiredError, match="2001-01-01T00:00:00Z"):
        read_license(sign_license(past, KEY), ANCHORS)


@pytest.mark.parametrize("skew", [0, 300])
def test_the_clock_may_be_wrong_by_the_skew_and_no_more(skew: int) -> None:
    data, slack = sign_license(LICENSE, KEY), timedelta(seconds=skew)
    for inside in (START - slack, END + slack):
        assert read_license(data, ANCHORS, now=inside, skew=skew).id == "7"
    for outside in (START - slack - SECOND, END + slack + SECOND):
        with pytest.raises(ExpiredError):
            read_license(data, ANCHORS, now=outside, skew=skew)


def test_a_license_for_another_model_is_refused() -> None:
    with pytest.raises(ModelMismatchError):
        read_license(sign_license(LICENSE, KEY), ANCHORS, model="00", now=START)


def test_a_license_by_a_stranger_is_refused() -> None:
    with pytest.raises(UntrustedError):
        read_license(sign_license(LICENSE, SigningKey.generate()), ANCHORS, now=START)


def test_a_time_without_a_zone_is_the_callers_mistake() -> None:
    with pytest.raises(ParameterError, match="zone"):
        read_license(sign_license(LICENSE, KEY), ANCHORS, now=datetime(2031, 6, 1))


def test_a_time_in_another_zone_is_the_same_moment() -> None:
    assert utc_text(datetime(2031, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))) == "2031-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"user": ""},
        {"model": ""},
        {"rights": Rights(seats=-1)},
        {"rights": Rights(not_before=END, not_after=START)},
    ],
    ids=["no id", "no user", "no model", "negative seats", "ends before it begins"],
)
def test_a_license_that_makes_no_sense_is_not_signed(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        sign_license(replace(LICENSE, **change), KEY)


def test_the_wrapped_key_opens_for_the_licensee_after_the_round_trip() -> None:
    identity, key = Identity.generate(), bytes(range(32))
    stanza = wrap(key, identity.recipient, context=b"model").to_json()
    found = read_license(sign_license(replace(LICENSE, wrap=stanza), KEY), ANCHORS, now=START)
    assert unwrap([stanza_from_json(found.wrap)], identity, context=b"model") == key


def test_the_wrapped_key_is_not_printed() -> None:
    assert "wrapped" not in repr(LICENSE)


REVOKED = RevocationList(3, (Revocation("7", START, "not paid"),), START)


def test_a_revocation_list_reads_back() -> None:
    assert read_revocations(sign_revocations(REVOKED, KEY), ANCHORS, seen=3) == REVOKED


def test_a_license_on_the_list_is_refused() -> None:
    with pytest.raises(RevokedError, match="not paid"):
        REVOKED.check(LICENSE)


def test_a_license_that_is_not_on_the_list_passes() -> None:
    REVOKED.check(replace(LICENSE, id="8"))


def test_an_older_list_than_the_one_seen_is_refused() -> None:
    with pytest.raises(ExpiredError, match="number 4"):
        read_revocations(sign_revocations(REVOKED, KEY), ANCHORS, seen=4)


def test_a_list_that_is_too_old_is_refused() -> None:
    data, day = sign_revocations(REVOKED, KEY), timedelta(days=1)
    assert read_revocations(data, ANCHORS, max_age=day, now=START + day).number == 3
    with pytest.raises(ExpiredError, match="too old"):
        read_revocations(data, ANCHORS, max_age=day, now=START + day + SECOND)


@pytest.mark.parametrize("revocations", [RevocationList(0), RevocationList(1, (Revocation("", START),))])
def test_a_list_that_makes_no_sense_is_not_signed(revocations: RevocationList) -> None:
    with pytest.raises(ParameterError):
        sign_revocations(revocations, KEY)


ENTRY = {"license": "7", "time": "2031-01-01T00:00:00Z", "reason": ""}
LIST = {"number": 1, "issued": "2031-01-01T00:00:00Z", "entries": [ENTRY]}


def test_the_list_of_these_tests_is_one_where_nothing_is_changed() -> None:
    assert read_revocations(sign_document("revocation", LIST, KEY), ANCHORS).number == 1


@pytest.mark.parametrize(
    "change",
    [
        {"also": 1},
        {"entries": {}},
        {"number": 0},
        {"number": True},
        {"issued": 7},
        {"entries": ["7"]},
        {"entries": [ENTRY | {"also": 1}]},
        {"entries": [ENTRY | {"license": 7}]},
        {"entries": [ENTRY | {"time": "2031"}]},
    ],
    ids=str,
)
def test_a_signed_body_that_is_not_a_revocation_list_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        read_revocations(sign_document("revocation", LIST | change, KEY), ANCHORS)
