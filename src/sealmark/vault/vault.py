"""The owner's vault: signing key, recipient key, secrets, issued users, evidence and licenses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import UnknownNameError
from sealmark.core.files import atomic_write
from sealmark.core.secret import Secret
from sealmark.crypto.recipients import Recipient
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.envelope import sign_document, verify_document
from sealmark.formats.revocation import Revocation, RevocationList, sign_revocations
from sealmark.formats.secret import secret_from_bytes, secret_to_bytes
from sealmark.formats.times import parse_utc, utc_now, utc_text
from sealmark.vault.licensing import LicenseFolder
from sealmark.vault.records import DocumentRecord, SecretRecord, UserRecord, check_name, check_user

_COUNTER = "counter", "revocations"


class Vault(LicenseFolder):
    """The owner's vault. Made by `create`, `open` or `restore`; close it, or use it in a ``with`` block.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Vault.create(Path(folder) / "vault", passphrase="open sesame") as vault:
        ...         _ = vault.add_secret("resnet", Secret(bytes(32), {"scheme": "example", "model": "00"}))
        ...         _ = vault.issue_user("ada", secret="resnet", model="00")
        ...         [record.user for record in vault.users("resnet")]
        ['ada']
    """

    @property
    def verify_key(self) -> VerifyKey:
        """The public half of the signing key: what others trust."""
        return self.signing_key.verify_key

    @property
    def recipient(self) -> Recipient:
        """The public half of the identity: for whom others seal."""
        return self.identity.recipient

    def public(self) -> dict[str, str]:
        """What may be given to anyone, as text: ``verify`` and ``recipient``."""
        return {"verify": str(self.verify_key), "recipient": str(self.recipient)}

    def add_secret(self, name: str, secret: Secret) -> SecretRecord:
        """Keep a scheme's secret, or a lock's key.

        Raises:
            ParameterError: the name is bad or taken, or the secret is too large.
            ForgedSecretError: the secret's tensors are not the ones that it commits to.
        """
        data = secret_to_bytes(secret)
        record = SecretRecord(
            name=check_name(name),
            scheme=secret.scheme,
            commitment=secret.commitment,
            model=str(secret.facts.get("model", "")),
            created=secret.created,
        )
        self._store.add("secret", name, asdict(record), body=data)
        return record

    def secret(self, name: str) -> Secret:
        """A secret by its name.

        Raises:
            UnknownNameError: there is none.
            TamperedError: it was changed.
        """
        return secret_from_bytes(self._store.body("secret", name))

    def secrets(self) -> list[SecretRecord]:
        """What secrets there are, oldest first; nothing secret is decrypted."""
        return [SecretRecord(**info) for info in self._store.all("secret")]

    def export_secret(self, name: str, path: Path | str) -> None:
        """Write a secret to a file of its own, in the clear (mode 0600).

        Raises:
            UnknownNameError: there is none.
        """
        data = self._store.body("secret", name)
        with atomic_write(path, mode=0o600) as file:
            file.write(data)

    def publish_commitment(self, name: str, *, time: datetime | None = None) -> bytes:
        """A signed document that commits to a secret, to be published before the model is released.

        Its body is ``{commitment, model, scheme, time}``, and `verify_document` reads it.

        Args:
            name: of the secret; it is not in the document.
            time: to state; now, unless given.

        Raises:
            UnknownNameError: there is no such secret.
        """
        info = self._store.info("secret", name)
        body = {name: info[name] for name in ("commitment", "model", "scheme")}
        return sign_document("commitment", body | {"time": utc_text(time or utc_now())}, self.signing_key)

    def issue_user(
        self,
        user: str,
        *,
        secret: str,
        model: str,
        mark: Mapping[str, Any] | None = None,
        copy: str = "",
        issued: datetime | None = None,
    ) -> UserRecord:
        """Note that a user got a copy; a user has one for each secret.

        Args:
            user: 1 to 200 printable characters.
            secret: name of the secret that the copy was marked with.
            model: digest of the model before it was marked.
            mark: what tells this copy from others, as far as the secret does not; plain JSON.
            copy: digest of the user's copy.
            issued: now, unless given.

        Raises:
            ParameterError: a bad user, or one who has a copy already.
            UnknownNameError: no such secret.
            RevokedError: the user was revoked.
        """
        self._check_allowed(user)
        record = UserRecord(
            user=check_user(user),
            secret=secret,
            model=model,
            commitment=self._store.info("secret", secret)["commitment"],
            copy=copy,
            mark=dict(mark or {}),
            issued=utc_text(issued or utc_now()),
        )
        self._store.add("user", _user_key(secret, user), asdict(record), scope=secret)
        return record

    def users(self, secret: str | None = None, *, model: str | None = None) -> list[UserRecord]:
        """Who has copies, revoked users included, in the order of issue.

        Args:
            secret: only copies that were marked with this secret.
            model: only copies of the model with this digest.
        """
        records = (UserRecord(**info) for info in self._store.all("user", secret))
        return [record for record in records if model is None or record.model == model]

    def revoke_user(
        self, user: str, reason: str, *, secret: str | None = None, time: datetime | None = None
    ) -> list[UserRecord]:
        """Note that a user may no longer use their copies and licenses, and gets no others.

        What was revoked before keeps its time.

        Args:
            user: whose.
            reason: for people.
            secret: only the copy that was marked with this secret; licenses, and the user, then stay.
            time: now, unless given.

        Returns:
            The records of the user's copies, as they are now.

        Raises:
            UnknownNameError: the user has neither a copy nor a license.
        """
        stated = utc_text(time or utc_now())
        with self.transaction():
            records = [record for record in self.users(secret) if record.user == user]
            held = [] if secret is not None else self.license_records(user)
            if not (records or held):
                raise UnknownNameError("nothing was issued to this user", found=repr(user)[:120])
            for index, record in enumerate(records):
                if not record.revoked:
                    records[index] = replace(record, revoked=stated, reason=reason)
                    self._store.update("user", _user_key(record.secret, user), asdict(records[index]))
            for license in held:  # noqa: A001 - the word for the thing
                if not license.revoked:
                    self._store.update("license", license.id, vars(license) | {"revoked": stated, "reason": reason})
            if secret is None and not self._store.has("revoked", user):
                self._store.add("revoked", user, {"user": user, "time": stated, "reason": reason})
        return records

    def revoked_users(self) -> dict[str, str]:
        """Users to whom nothing is issued any more, and when and why they were revoked."""
        return {info["user"]: f"{info['time']} {info['reason']}".strip() for info in self._store.all("revoked")}

    def revocation_list(self, *, time: datetime | None = None, after: int = 0) -> bytes:
        """Sign a list of all that was revoked, to be published; its number grows with each one.

        A copy is named by its digest, a license by its id. Licenses that were renewed to less are on it with
        the time from which on their documents hold.

        Args:
            time: of issue; now, unless given.
            after: number of a list that was published already, where the vault does not know it: after it
                was restored from a backup.
        """
        with self.transaction():
            known = self._store.has(*_COUNTER)
            number = max(after, self._store.info(*_COUNTER)["number"] if known else 0) + 1
            (self._store.update if known else self._store.add)(*_COUNTER, {"number": number})
            entries = [
                Revocation(record.copy or record.commitment, parse_utc(record.revoked), record.reason)
                for record in self.users()
                if record.revoked
            ]
            for held in self.license_records():
                if held.revoked:
                    entries.append(Revocation(held.id, parse_utc(held.revoked), held.reason))
                elif held.superseded:
                    since = parse_utc(held.superseded)
                    entries.append(Revocation(held.id, since, "renewed", before=since))
        return sign_revocations(RevocationList(number, tuple(entries), time or utc_now()), self.signing_key)

    def add_evidence(
        self, data: bytes, kind: str, subject: str, *, anchors: Iterable[VerifyKey] = ()
    ) -> DocumentRecord:
        """Keep signed evidence.

        Args:
            data: of ``sign_evidence``, or of ``sign_document("evidence", ...)``.
            kind: what it is, such as ``"verification"`` or ``"accusation"``.
            subject: whom or what it is about.
            anchors: whose evidence is kept besides the owner's own.

        Raises:
            ParameterError: it is kept already.
            FormatError: not evidence.
            TamperedError: the signature does not fit.
            UntrustedError: signed by another.
        """
        verify_document(data, "evidence", [self.verify_key, *anchors])
        record = DocumentRecord(sha256_hex(data), kind, subject, utc_text(utc_now()))
        self._store.add("document", record.id, asdict(record), body=data, scope="evidence")
        return record

    def evidence(self) -> list[DocumentRecord]:
        """What evidence there is, oldest first."""
        return [DocumentRecord(**info) for info in self._store.all("document", "evidence")]

    def document(self, number: str) -> bytes:
        """A signed document by its id.

        Raises:
            UnknownNameError: there is none.
        """
        return self._store.body("document", number)

    def contents(self) -> dict[str, list[dict[str, Any]]]:
        """Everything that the vault holds, without anything secret: plain JSON for a listing."""
        parts: dict[str, Sequence[SecretRecord | UserRecord | DocumentRecord]] = {
            "secrets": self.secrets(),
            "users": self.users(),
            "evidence": self.evidence(),
        }
        listed = {name: [asdict(record) for record in records] for name, records in parts.items()}
        return listed | {"licenses": self._store.all("license")}


def _user_key(secret: str, user: str) -> str:
    return f"{secret}/{user}"  # the name of a secret has no slash
