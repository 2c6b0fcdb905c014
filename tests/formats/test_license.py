"""Licenses: who may use which model, until when."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from sealmark.core.errors import (
    ExpiredError,
    ModelMismatchError,
    NotYetValidError,
    ParameterError,
    SealmarkError,
    UntrustedError,
)
from sealmark.crypto.armor import armor
from sealmark.crypto.signing import SigningKey, VerifyKey
from sealmark.formats.license import MAX_KEYS, License, Rights, read_license, sign_license, verify_license
from sealmark.formats.times import parse_utc, utc_text

FILE = json.loads((Path(__file__).parents[1] / "vectors" / "license.json").read_text())
KEY = SigningKey(bytes(32))
ANCHORS = [KEY.verify_key]
MODEL = "ab" * 32
START, END = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 12, 31, tzinfo=UTC)
DEVICE = armor("sealmark-device-v1:", bytes(range(32)))
OTHER_DEVICE = armor("sealmark-device-v1:", bytes(32))
LICENSE = License(
    id="7",
    user="Ada \u00c5.",
    model=MODEL,
    scheme="spread_spectrum",
    rights=Rights("trial", START, END, seats=2, features=("chat", "export")),
    devices=(DEVICE,),
    wrap={"type": "example", "wrapped": "00"},
    keys=b"ciphertext",
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
    with pytest.raises(NotYetValidError):
        read_license(data, ANCHORS, now=START - slack - SECOND, skew=skew)
    with pytest.raises(ExpiredError):
        read_license(data, ANCHORS, now=END + slack + SECOND, skew=skew)


def test_as_many_devices_as_seats_may_be_listed_and_any_number_where_seats_are_free() -> None:
    both = replace(LICENSE, devices=(DEVICE, OTHER_DEVICE))
    for seats in (2, 0):
        allowed = replace(both, rights=Rights(seats=seats))
        assert read_license(sign_license(allowed, KEY), ANCHORS, now=START).devices == both.devices


def test_the_largest_keys_fit() -> None:
    large = replace(LICENSE, keys=bytes(MAX_KEYS))
    assert len(read_license(sign_license(large, KEY), ANCHORS, now=START).keys) == MAX_KEYS


def test_a_license_can_be_read_whatever_its_time() -> None:
    past = replace(LICENSE, rights=Rights(not_after=datetime(2001, 1, 1, tzinfo=UTC)))
    assert verify_license(sign_license(past, KEY), ANCHORS).id == "7"


@pytest.mark.parametrize("extreme", [datetime.min, datetime.max])
def test_no_time_is_too_early_or_too_late_to_be_judged(extreme: datetime) -> None:
    at = extreme.replace(tzinfo=UTC)
    fitting = replace(LICENSE, rights=Rights(not_before=at, not_after=at))
    assert read_license(sign_license(fitting, KEY), ANCHORS, now=at).id == "7"


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
        {"rights": Rights(seats=True)},
        {"rights": Rights(not_before=END, not_after=START)},
        {"rights": Rights(seats=1), "devices": (DEVICE, OTHER_DEVICE)},
        {"devices": (DEVICE, DEVICE)},
        {"devices": ("my laptop",)},
        {"devices": (DEVICE[:-1] + "A",)},
        {"keys": b""},
        {"wrap": {}},
        {"keys": bytes(MAX_KEYS + 1)},
    ],
    ids=[
        "no id",
        "no user",
        "no model",
        "negative seats",
        "seats that are true",
        "ends before it begins",
        "more devices than seats",
        "a device twice",
        "a device that is none",
        "a mistyped device",
        "a wrapped key without keys",
        "keys without a wrapped key",
        "keys too large",
    ],
)
def test_a_license_that_makes_no_sense_is_not_signed(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        sign_license(replace(LICENSE, **change), KEY)


def test_the_keys_are_not_printed() -> None:
    assert "wrapped" not in repr(LICENSE)
    assert "ciphertext" not in repr(LICENSE)


def test_the_context_of_the_keys_is_that_of_every_renewal_and_of_nothing_else() -> None:
    renewed = replace(LICENSE, rights=Rights("full"), issued=END, devices=(DEVICE,), scheme="", mark="")
    assert renewed.context() == LICENSE.context()
    others = [replace(LICENSE, **{name: "other"}).context() for name in ("id", "user", "model")]
    assert len({LICENSE.context(), *others}) == 4
