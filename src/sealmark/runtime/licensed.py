"""Opening a model with a license: every check, then the weights in memory, and nothing on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from torch import nn

from sealmark.core import registry
from sealmark.core.errors import DeviceMismatchError, FormatError, ParameterError, UnsupportedError, WrongKeyError
from sealmark.core.lock import Lock
from sealmark.core.secret import Secret
from sealmark.core.weights import Weights
from sealmark.crypto.recipients import Identity, Passphrase
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.envelope import MAX_BYTES
from sealmark.formats.license import License, verify_license
from sealmark.formats.license_keys import open_keys
from sealmark.formats.revocation import read_revocations
from sealmark.formats.times import utc_now
from sealmark.runtime.device import matches
from sealmark.runtime.last_seen import LastSeen
from sealmark.runtime.licensed_copy import open_copy
from sealmark.runtime.models import load_weights

_MAX_IDENTITY = 10_000  # bytes


@dataclass(frozen=True)
class Opened:
    """A model that a license opened.

    Attributes:
        license: what was granted.
        weights: name -> tensor, in memory.
        key: of the lock, where the copy is locked besides.
    """

    license: License
    weights: Weights = field(repr=False)
    key: Secret | None = field(default=None, repr=False)

    def load_into(self, model: nn.Module, *, resize: bool = False) -> nn.Module:
        """A usable network.

        Args:
            model: of the right architecture; it takes the weights, in place.
            resize: give layers the widths that the weights have.

        Returns:
            ``model`` itself, or where the license has a lock's key what the lock makes of it.

        Raises:
            ModelMismatchError: another architecture.
        """
        load_weights(model, self.weights, resize=resize)
        return self.unlock(model)

    def unlock(self, model: nn.Module) -> nn.Module:
        """What the lock makes of a network that has the weights; the network itself where there is no lock.

        Raises:
            UnsupportedError: the license's key is of no lock.
        """
        if self.key is None:
            return model
        lock = registry.scheme_of(self.key)
        if not isinstance(lock, Lock):
            raise UnsupportedError("the license's key opens no lock", expected="a lock's key", found=lock.name)
        return lock.unlock(model, self.key)


def open(  # noqa: A001 - sealmark.open
    source: Path | str,
    license: bytes | Path | str,  # noqa: A002 - the word for the thing
    *,
    anchors: Iterable[VerifyKey],
    opener: Identity | Passphrase | Path | str | None = None,
    revocations: bytes | Path | str | None = None,
    now: datetime | None = None,
    device: Mapping[str, str] | None = None,
    memory: LastSeen | Path | str | None = None,
) -> Opened:
    """Open a model with a license.

    The checks, in this order: the documents' signatures, the model, the device, the clock, the time, the
    list of the revoked, the licensee's key, the file. A check that fails ends it; each has an error of its own,
    whose `code` tells a program the reason.

    A copy that is not sealed anybody can load without this function. A license for it is a promise; what
    stands behind it is the mark.

    Args:
        source: the copy: a sealed file, a folder of sealed shards, or plain safetensors.
        license: the signed document, or its file.
        anchors: the owners whom the caller trusts; never one who came along with the license.
        opener: the licensee's identity or passphrase, or the file of his identity. Only a license without
            keys does without.
        revocations: the newest signed list of the license's issuer, or its file. It is remembered, and applied
            to what is opened later without one.
        now: the time to judge by, from a better clock than this machine's. It is remembered: a time that has
            not come yet keeps this machine out until then.
        device: what the device says of itself; this one unless given.
        memory: what was seen before, or its folder; `sealmark.runtime.last_seen.state_folder` unless given.

    Raises:
        FormatError: no license, no list, or no model (BAD_FORMAT).
        UntrustedError: signed by none of the anchors (UNTRUSTED).
        TamperedError: changed bytes (TAMPERED).
        ModelMismatchError: the license is for another copy (MODEL_MISMATCH).
        DeviceMismatchError: for other devices (DEVICE_MISMATCH).
        ClockRollbackError: the clock was set back (CLOCK_ROLLBACK).
        NotYetValidError, ExpiredError: outside its time (NOT_YET_VALID, EXPIRED).
        StaleListError: an older list than one seen before (STALE_LIST).
        RevokedError: taken back, or replaced by a renewal (REVOKED).
        WrongKeyError: the opener is not the licensee's (WRONG_KEY).
        ParameterError: no such file, or no anchors (BAD_PARAMETER).
        UnsupportedError: the copy is not safetensors (UNSUPPORTED).
        ServiceError: the disk fails, or the memory cannot be written (SERVICE).
    """
    trusted, now = list(anchors), now or utc_now()
    seen = memory if isinstance(memory, LastSeen) else LastSeen(memory)
    granted = verify_license(_data(license, "license"), trusted)
    issuer = next(anchor for anchor in trusted if anchor.kid == granted.issuer)
    brought = None if revocations is None else _data(revocations, "revocation list")
    # an owner takes back what he issued, and nobody else's: his key alone counts for his list
    given = None if brought is None else read_revocations(brought, [issuer])
    kept = seen.revocations(issuer)
    if given and brought and (kept is None or given.number >= kept.number):
        seen.keep_revocations(issuer, brought)  # whatever becomes of this license
    with open_copy(source) as copy:
        granted.check_model(copy.model)
        _check_device(granted, device)
        seen.check_clock(now, *(document.issued for document in (granted, given, kept) if document))
        granted.check_time(now)
        if given:
            given.check_newer(kept.number if kept else 0)
        if newest := given or kept:
            newest.check(granted)
        data_key, key = _keys(granted, opener)
        return Opened(granted, copy.read(data_key), key)


def _check_device(granted: License, here: Mapping[str, str] | None) -> None:
    if granted.devices and not any(matches(device, here) for device in granted.devices):
        raise DeviceMismatchError(
            f"license {granted.id} is for other devices",
            expected=f"one of {len(granted.devices)} devices",
            found="this one",
            advice="send the owner this device's id",
        )


def _keys(
    granted: License, opener: Identity | Passphrase | Path | str | None
) -> tuple[bytes | None, Secret | None]:
    if not granted.keys:
        return None, None
    if opener is None:
        raise WrongKeyError(
            f"license {granted.id} opens for {granted.user} alone", expected="an identity", found="none"
        )
    if isinstance(opener, Path | str):
        opener = Identity.parse(_data(opener, "identity", limit=_MAX_IDENTITY).decode("utf-8", "replace"))
    return open_keys(granted, opener)


def _data(source: bytes | Path | str, what: str, *, limit: int = MAX_BYTES) -> bytes:
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if not path.is_file():
        raise ParameterError(f"no such {what}", expected="a file", found=str(source))
    if path.stat().st_size > limit:
        raise FormatError(f"the {what} is too large", expected=f"at most {limit} bytes", found=path.stat().st_size)
    return path.read_bytes()
