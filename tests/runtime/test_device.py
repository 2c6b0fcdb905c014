"""A device's id: it knows its device again after a repair, knows no other, and tells nobody what it is made of."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import FormatError, UnsupportedError
from sealmark.crypto.armor import armor, unarmor
from sealmark.formats.license import DEVICE
from sealmark.runtime import device
from sealmark.runtime.device import COMPONENTS, components, device_id, matches

HERE = {name: f"{name} of here" for name in COMPONENTS}
THERE = {name: f"{name} of there" for name in COMPONENTS}


def test_a_device_matches_its_own_id_and_no_other() -> None:
    assert matches(device_id(HERE), HERE)
    assert not matches(device_id(HERE), THERE)


@pytest.mark.parametrize("known", range(3, 8))
def test_less_than_half_of_the_components_may_change(known: int) -> None:
    names = COMPONENTS[:known]
    mine = {name: HERE[name] for name in names}
    for changed in range(known + 1):
        repaired = mine | {name: THERE[name] for name in names[:changed]}
        assert matches(device_id(mine), repaired) == (changed < known / 2)


def test_what_is_hidden_here_does_not_agree_and_what_is_new_does_not_matter() -> None:
    mine = {name: HERE[name] for name in COMPONENTS[:5]}
    text = device_id(mine)
    assert matches(text, HERE)
    assert matches(text, {name: HERE[name] for name in COMPONENTS[:3]})
    assert not matches(text, {name: HERE[name] for name in COMPONENTS[:2]})
    assert not matches(text, {})


def test_components_do_not_stand_in_for_each_other() -> None:
    same = dict.fromkeys(COMPONENTS, "one text")
    swapped = {name: HERE[other] for name, other in zip(COMPONENTS, reversed(COMPONENTS), strict=True)}
    assert matches(device_id(same), same)
    assert not matches(device_id(HERE), swapped)


def test_a_device_that_tells_too_little_gets_no_id() -> None:
    with pytest.raises(UnsupportedError, match="machine, product"):
        device_id({"machine": "a", "product": "b", "board": ""})
    with pytest.raises(UnsupportedError, match="none"):
        device_id({"unknown": "a"})


def test_a_device_has_one_id_also_where_it_has_no_machine_id() -> None:
    bare = {name: text for name, text in HERE.items() if name != "machine"}
    for mine in (HERE, bare):
        assert device_id(mine) == device_id(dict(reversed(mine.items())))


def test_a_component_that_two_devices_share_does_not_show() -> None:
    first, second = (unarmor(DEVICE, device_id(HERE | {"machine": name})) for name in ("one", "two"))
    pairs = zip(first[:30], second[:30], strict=True)
    assert sum(a == b for a, b in pairs) <= 3  # by chance


@given(st.binary(min_size=32, max_size=32))
def test_a_made_up_id_is_refused_or_does_not_match(raw: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert not matches(armor(DEVICE, raw), HERE)


@pytest.mark.parametrize(
    "text",
    ["", "my laptop", device_id(HERE)[:-1], device_id(HERE).replace("v1", "v2"), armor("other:", bytes(32))],
    ids=["nothing", "a name", "cut", "another version", "another kind"],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        matches(text, HERE)


def test_an_id_that_everybody_would_match_is_refused() -> None:
    with pytest.raises(FormatError, match="3 components"):
        matches(armor(DEVICE, bytes(32)), HERE)
    with pytest.raises(FormatError, match="3 components"):
        matches(armor(DEVICE, bytes(16) + unarmor(DEVICE, device_id(HERE))[16:20] + bytes(12)), HERE)


def test_a_hash_that_would_mean_nothing_there_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "sha256_hex", lambda *parts: "00" * 32)
    assert device._hash(bytes(16), "disk", "text") == b"\0\1"
    assert device._hash(bytes(16), "disk", "") == b"\0\0"


Files = Callable[[dict[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Files:
    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def test_a_machine_is_read_as_linux_shows_it(machine: Files) -> None:
    root = machine(
        {
            "etc/machine-id": "0123\n",
            "sys/class/dmi/id/product_uuid": "uuid\n",
            "sys/class/dmi/id/board_serial": "serial\n",
            "sys/class/dmi/id/sys_vendor": "ACME\n",
            "sys/class/dmi/id/product_name": "Anvil\n",
            "sys/class/net/eth1/address": "02:00:00:00:00:02\n",
            "sys/class/net/eth1/addr_assign_type": "0\n",
            "sys/class/net/eth1/device/uevent": "",
            "sys/class/net/eth0/address": "02:00:00:00:00:09\n",
            "sys/class/net/eth0/addr_assign_type": "0\n",
            "sys/class/net/eth0/device/uevent": "",
            "sys/class/net/random/address": "00:00:00:00:00:01\n",
            "sys/class/net/random/addr_assign_type": "1\n",
            "sys/class/net/random/device/uevent": "",
            "sys/class/net/virtual/address": "00:00:00:00:00:00\n",
            "sys/class/net/virtual/addr_assign_type": "0\n",
            "sys/block/loop0/size": "0\n",
            "sys/block/sda/device/wwid": "naa.5\n",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Anvil 9000\n\nprocessor\t: 1\nmodel name\t: other\n",
        }
    )
    assert components(root) == {
        "machine": "0123",
        "product": "uuid",
        "board": "serial",
        "network": "02:00:00:00:00:02",
        "processor": "Anvil 9000",
        "disk": "naa.5",
        "model": "ACME Anvil",
    }


def test_a_machine_that_hides_everything_is_read_without_a_fault(tmp_path: Path) -> None:
    assert components(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is hidden from root")
def test_what_may_not_be_read_is_not_there(machine: Files) -> None:
    root = machine({"sys/class/dmi/id/product_uuid": "uuid", "etc/machine-id": "0123"})
    (root / "sys/class/dmi/id/product_uuid").chmod(0)
    assert components(root) == {"machine": "0123"}


def test_this_machine_tells_the_same_twice() -> None:
    assert components() == components()
    assert set(components()) <= set(COMPONENTS)


@pytest.mark.parametrize(
    ("number", "found"), [(0x0200_0000_0001, {"~020000000001"}), (0x0300_0000_0001, set())], ids=["real", "made up"]
)
def test_an_address_that_python_made_up_is_not_taken(
    number: int, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uuid.getnode", lambda: number & ~(1 << 41) if not found else number)
    addresses = {text for text in device._addresses(Path("/")) if text.startswith("~")}
    assert addresses == found


def test_this_machine_is_what_ids_are_made_of_and_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "components", lambda: HERE)
    assert matches(device_id())
    assert not matches(device_id(THERE))
