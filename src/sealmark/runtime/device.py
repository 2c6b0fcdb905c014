"""Which device is this? For licenses that are bound to some.

A device says of itself what it likes: whoever runs the software can make any machine tell anything. An
id hinders the sharing of a license among honest people and honest machines; it proves nothing, and no
secret is in it. What keeps a stranger out is the licensee's identity, not his device.
"""

from __future__ import annotations

import contextlib
import hmac
import platform
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import FormatError, UnsupportedError
from sealmark.crypto.armor import armor, unarmor
from sealmark.formats.license import DEVICE

COMPONENTS = ("machine", "product", "board", "network", "processor", "disk", "model")
FEWEST = 3  # components that make an id
_SALT = 16
_SLOT = 2  # bytes of a component's hash
_SLOTS = 8
_EMPTY = bytes(_SLOT)


def components(root: Path = Path("/")) -> dict[str, str]:
    """What this machine tells of itself, under the names in `COMPONENTS`; what it hides is not there.

    On Linux that is the machine id, the product's and the board's numbers (to the administrator alone), the
    lowest permanent network address, the processor, the first disk's serial number and the machine's model;
    elsewhere it is little. These name a person's machine: keep them in memory, and show `device_id` instead.

    Args:
        root: of the file system, for tests.
    """
    dmi = root / "sys/class/dmi/id"
    found = {
        "machine": _text(root / "etc/machine-id"),
        "product": _text(dmi / "product_uuid"),
        "board": _text(dmi / "board_serial"),
        "network": min(_addresses(root), default=""),
        "processor": _processor(root),
        "disk": next(_serials(root), ""),
        "model": " ".join(filter(None, (_text(dmi / "sys_vendor"), _text(dmi / "product_name")))),
    }
    return {name: text for name, text in found.items() if text}


def device_id(components: Mapping[str, str] | None = None) -> str:
    """The text that stands for a device in a license: ``sealmark-device-v1:`` and 48 characters.

    It holds a salt and 16 bits of a hash of each component: enough to tell devices apart together, too little
    to find a number by trying. Of a network card whose maker is known, some 256 addresses remain. The salt
    comes from the machine id, so that a device has one text, and no second one narrows that down; two
    owners who compare their texts see that they mean the same device.

    Args:
        components: of the device; this one's unless given.

    Raises:
        UnsupportedError: the device tells less than three things of itself.

    Example:
        >>> mine = {"machine": "a", "network": "b", "disk": "c"}
        >>> text = device_id(mine)
        >>> matches(text, mine | {"disk": "another one"}), matches(text, {"machine": "a"})
        (True, False)
    """
    known = _known(components)
    if len(known) < FEWEST:
        raise UnsupportedError(
            "this device tells too little of itself",
            expected=f"{FEWEST} of {', '.join(COMPONENTS)}",
            found=", ".join(known) or "none",
            advice="ask the owner for a license for any device",
        )
    salt = bytes.fromhex(sha256_hex(DEVICE.encode(), known.get("machine", repr(known)).encode()))[:_SALT]
    slots = b"".join(_hash(salt, name, known.get(name, "")) for name in COMPONENTS)
    return armor(DEVICE, (salt + slots).ljust(_SALT + _SLOTS * _SLOT, b"\0"))


def matches(device: str, components: Mapping[str, str] | None = None) -> bool:
    """Whether more than half of the components in a device's id are those of a device.

    So one may change: a new disk, or another network card. By chance one component agrees in 1 of 65,536
    cases; machines that were copied from one image may agree in several.

    Args:
        device: what `device_id` gave.
        components: of the device at hand; this one's unless given.

    Raises:
        FormatError: it is no device's id.
    """
    raw, here = unarmor(DEVICE, device), _known(components)
    salt, body = raw[:_SALT], raw[_SALT:]
    slots = [body[start : start + _SLOT] for start in range(0, len(body), _SLOT)]
    listed = {name: slot for name, slot in zip(COMPONENTS, slots, strict=False) if slot != _EMPTY}
    if len(listed) < FEWEST or any(slot != _EMPTY for slot in slots[len(COMPONENTS) :]):
        raise FormatError("not a device's id", expected=f"{FEWEST} components of {len(COMPONENTS)}")
    agree = sum(hmac.compare_digest(slot, _hash(salt, name, here.get(name, ""))) for name, slot in listed.items())
    return 2 * agree > len(listed)


def _known(given: Mapping[str, str] | None) -> dict[str, str]:
    found = components() if given is None else given
    return {name: found[name] for name in COMPONENTS if found.get(name)}


def _hash(salt: bytes, name: str, text: str) -> bytes:
    if not text:
        return _EMPTY
    digest = bytes.fromhex(sha256_hex(salt, name.encode(), b"\0", text.encode()))
    return digest[:_SLOT] if digest[:_SLOT] != _EMPTY else b"\0\1"


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace").strip()
    return ""


def _addresses(root: Path) -> Iterator[str]:
    """The permanent addresses of network cards; virtual ones change from start to start."""
    for card in sorted(root.glob("sys/class/net/*")):
        if (card / "device").exists() and _text(card / "addr_assign_type") == "0":
            yield _text(card / "address")
    if root == Path("/") and not (number := uuid.getnode()) >> 40 & 1:  # the bit of a made-up address
        yield f"~{number:012x}"  # sorts after every other


def _serials(root: Path) -> Iterator[str]:
    for disk in sorted(root.glob("sys/block/*")):
        for name in ("serial", "wwid", "device/serial", "device/wwid", "device/cid"):
            if serial := _text(disk / name):
                yield serial


def _processor(root: Path) -> str:
    lines = _text(root / "proc/cpuinfo").splitlines()
    names = (
        line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "hardware"))
    )
    return next(names, platform.processor() if root == Path("/") else "")
