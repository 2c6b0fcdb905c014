"""Licenses in a vault: issuing, renewing, taking back, finding."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import ParameterError, RevokedError, UnknownNameError
from sealmark.core.secret import Secret
from sealmark.crypto.recipients import Passphrase, Recipient
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.license import License, Rights, sign_license, verify_license
from sealmark.formats.license_keys import add_keys, holds_lock_key
from sealmark.formats.times import utc_now, utc_text
from sealmark.vault.folder import EncryptedFolder
from sealmark.vault.records import LicenseRecord, check_user

_ID_BYTES = 8
_SECOND = timedelta(seconds=1)  # documents state times to the second


class SignedLicense(NamedTuple):
    """A license as the licensee gets it.

    Attributes:
        record: what the vault keeps of it.
        data: the signed document, to be written to a file as it is.
    """

    record: LicenseRecord
    data: bytes


class LicenseFolder(EncryptedFolder):
    """The licenses of an encrypted folder.

    Each signed document is kept, those before a renewal too; the record of a license tells how it stands now.
    """

    def issue_license(
        self,
        user: str,
        *,
        model: str,
        to: Recipient | Passphrase | None = None,
        data_key: bytes | None = None,
        key: Secret | None = None,
        scheme: str = "",
        rights: Rights = Rights(),  # noqa: B008 - frozen
        devices: Iterable[str] = (),
        mark: str = "",
        number: str | None = None,
        issued: datetime | None = None,
    ) -> SignedLicense:
        """Make, sign and keep a license; for many, do it in one `transaction`.

        Args:
            user: 1 to 200 printable characters.
            model: digest of the sealed or marked copy that it is for.
            to: the licensee, for whom the keys are wrapped; None for a license without keys.
            data_key: of the sealed copy; where nothing is sealed, a fresh one binds the license to its user.
            key: of the lock, of the level that is granted.
            scheme: public name of the lock or mark in the copy.
            rights: what is granted.
            devices: ids of the devices that it is bound to.
            mark: commitment to the mark in the copy.
            number: its id; 16 random hexadecimal digits unless given.
            issued: now, unless given.

        Raises:
            RevokedError: the user was revoked.
            ParameterError: a bad user or right, more devices than seats, an id that is taken, or keys for nobody.
        """
        self._check_allowed(user)
        made = License(
            number or secrets.token_hex(_ID_BYTES), check_user(user), model, scheme, rights, tuple(devices),
            mark=mark, issued=issued or utc_now(),
        )  # fmt: skip
        if to is not None:
            made = add_keys(made, to, data_key=data_key, key=key)
        elif data_key is not None or key is not None:
            raise ParameterError("keys for nobody", expected="to=, the licensee's recipient or passphrase")
        return self._keep(made, sign_license(made, self.signing_key))

    def renew_license(
        self,
        name: str,
        *,
        not_after: datetime | None,
        level: str | None = None,
        seats: int | None = None,
        features: Iterable[str] | None = None,
        devices: Iterable[str] | None = None,
        issued: datetime | None = None,
    ) -> SignedLicense:
        """Issue a license again, with the same id and keys, another end and other rights where given.

        The document before is as good as it was, until it ends: where the new one grants less, the next
        `revocation_list` takes the one before back.

        Args:
            name: its id, or a user who has one license only.
            not_after: the new end; None for ever.
            level: of use; as it was unless given, as all that follows.
            seats: on how many devices.
            features: further names.
            devices: ids of devices. Another level needs another key: issue a new license for a lock.
            issued: now, unless given; later than the one before in any case.

        Raises:
            UnknownNameError: no such license or user.
            RevokedError: it was revoked, or its user.
            ParameterError: the user has several licenses, rights that make no sense, or another level for a
                license that holds a lock's key.
        """
        with self.transaction():
            record = self._holding(name)
            self._check_allowed(record.user)
            old = verify_license(self.license_document(record.id), [self.signing_key.verify_key])
            if level not in (None, old.rights.level) and holds_lock_key(old):
                raise ParameterError(
                    "a license that opens a lock keeps its level",
                    expected=old.rights.level,
                    found=level,
                    advice="issue a new one of that level",
                )
            given = {"level": level, "seats": seats, "features": None if features is None else tuple(features)}
            changes = {key: value for key, value in given.items() if value is not None}
            new = replace(
                old,
                rights=replace(old.rights, not_after=not_after, **changes),  # type: ignore[arg-type]
                devices=old.devices if devices is None else tuple(devices),
                issued=max(issued or utc_now(), old.issued + _SECOND),
            )
            data = sign_license(new, self.signing_key)
            edition = record.edition + 1
            self._store.add("edition", f"{edition}/{record.id}", {}, body=data)
            replaced = utc_text(new.issued) if _grants_less(old, new) else record.superseded
            fresh = replace(_record(new, data), edition=edition, superseded=replaced)
            self._store.update("license", record.id, vars(fresh))
        return SignedLicense(fresh, data)

    def license_to_renew(self, name: str) -> LicenseRecord:
        """How the license stands that `renew_license` would renew; raises as that does."""
        return self._holding(name)

    def revoke_license(self, name: str, reason: str, *, time: datetime | None = None) -> LicenseRecord:
        """Take one license back; the next `revocation_list` says so.

        Args:
            name: its id, or a user who has one license only.
            reason: for people.
            time: now, unless given.

        Raises:
            UnknownNameError: no such license or user.
            RevokedError: it was revoked before.
            ParameterError: the user has several licenses.
        """
        with self.transaction():
            record = replace(self._holding(name), revoked=utc_text(time or utc_now()), reason=reason)
            self._store.update("license", record.id, vars(record))
        return record

    def license_record(self, number: str) -> LicenseRecord:
        """A license by its id.

        Raises:
            UnknownNameError: there is none.
        """
        return LicenseRecord.parse(self._store.info("license", number))

    def license_records(self, user: str | None = None, *, model: str | None = None) -> list[LicenseRecord]:
        """How all licenses stand, or those of one user or model, in the order of issue."""
        records = map(LicenseRecord.parse, self._store.all("license", user))
        return [record for record in records if model in (None, record.model)]

    def license_document(self, number: str, edition: int | None = None) -> bytes:
        """The signed document of a license.

        Args:
            number: its id.
            edition: 0 for the first one, 1 after the first renewal ...; the newest unless given.

        Raises:
            UnknownNameError: no such license or edition.
        """
        newest = self.license_record(number).edition if edition is None else edition
        return self._store.body("edition", f"{newest}/{number}") if newest else self._store.body("license", number)

    def add_license(self, data: bytes, *, anchors: Iterable[VerifyKey] = ()) -> LicenseRecord:
        """Keep a license that was signed elsewhere, whatever its time.

        Args:
            data: the document.
            anchors: whose licenses are kept besides the owner's own.

        Raises:
            ParameterError: the vault has one of that id.
            FormatError, TamperedError, UntrustedError: see `verify_license`.
        """
        found = verify_license(data, [self.signing_key.verify_key, *anchors])
        return self._keep(found, data).record

    def _keep(self, made: License, data: bytes) -> SignedLicense:
        record = _record(made, data)
        self._store.add("license", record.id, vars(record), body=data, scope=record.user)
        return SignedLicense(record, data)

    def _holding(self, name: str) -> LicenseRecord:
        """The license with this id, or the one of this user, if it was not revoked."""
        try:
            found = [self.license_record(name)]
        except UnknownNameError:
            found = self.license_records(name)
            found = [record for record in found if not record.revoked] or found[-1:]
        if not found:
            raise UnknownNameError(
                "no such license", expected="its id, or a user who has one", found=repr(name)[:120]
            )
        if len(found) > 1:
            ids = [record.id for record in found]
            raise ParameterError(f"{name} has several licenses", expected=f"one of {ids}", found=repr(name)[:120])
        (record,) = found
        if record.revoked:
            raise RevokedError(
                f"license {record.id} was revoked", found=f"{record.revoked} {record.reason}".strip()
            )
        return record

    def _check_allowed(self, user: str) -> None:
        if self._store.has("revoked", user):
            info = self._store.info("revoked", user)
            raise RevokedError(
                f"{user} was revoked",
                found=f"{info['time']} {info['reason']}".strip(),
                advice="issue to another user",
            )


def _record(made: License, data: bytes) -> LicenseRecord:
    rights = made.rights
    return LicenseRecord(
        id=made.id,
        user=made.user,
        model=made.model,
        scheme=made.scheme,
        level=rights.level,
        issued=utc_text(made.issued),
        not_before=utc_text(rights.not_before) if rights.not_before else "",
        not_after=utc_text(rights.not_after) if rights.not_after else "",
        seats=rights.seats,
        devices=made.devices,
        mark=made.mark,
        document=sha256_hex(data),
    )


def _grants_less(old: License, new: License) -> bool:
    """Whether the document before lets its user do what the new one does not."""
    before, after = old.rights, new.rights
    shorter = after.not_after is not None and (before.not_after is None or before.not_after > after.not_after)
    features = set(before.features) - set(after.features)
    fewer = new.devices and (not old.devices or set(old.devices) - set(new.devices))
    return bool(shorter or before.level != after.level or features or fewer)
