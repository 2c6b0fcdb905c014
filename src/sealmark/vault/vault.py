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
from sealmark.formats.secret import secret_from_bytes, secret_to_bytes
from sealmark.formats.times import utc_now, utc_text
from sealmark.vault.folder import EncryptedFolder
from sealmark.vault.records import DocumentRecord, SecretRecord, UserRecord, check_name, check_user


class Vault(EncryptedFolder):
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
        """
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
        """Note that a user may no longer use their copies. What was revoked before keeps its time.

        Args:
            user: whose.
            reason: for people.
            secret: only the copy that was marked with this secret.
            time: now, unless given.

        Returns:
            The user's records, as they are now.

        Raises:
            UnknownNameError: the user has no copy.
        """
        stated = utc_text(time or utc_now())
        with self.transaction():
            records = [record for record in self.users(secret) if record.user == user]
            if not records:
                raise UnknownNameError("no copy was issued to this user", found=repr(user)[:120])
            for index, record in enumerate(records):
                if not record.revoked:
                    records[index] = replace(record, revoked=stated, reason=reason)
                    self._store.update("user", _user_key(record.secret, user), asdict(records[index]))
        return records

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
        return self._add_document(data, "evidence", kind, subject)

    def evidence(self) -> list[DocumentRecord]:
        """What evidence there is, oldest first."""
        return [DocumentRecord(**info) for info in self._store.all("document", "evidence")]

    def add_license(self, data: bytes, *, anchors: Iterable[VerifyKey] = ()) -> DocumentRecord:
        """Keep a signed license, whatever its time; raises as `add_evidence`."""
        body = verify_document(data, "license", [self.verify_key, *anchors])
        return self._add_document(data, "license", "license", str(body.get("user", "")))

    def licenses(self) -> list[DocumentRecord]:
        """What licenses there are, oldest first."""
        return [DocumentRecord(**info) for info in self._store.all("document", "license")]

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
            "licenses": self.licenses(),
        }
        return {name: [asdict(record) for record in records] for name, records in parts.items()}

    def _add_document(self, data: bytes, scope: str, kind: str, subject: str) -> DocumentRecord:
        record = DocumentRecord(sha256_hex(data), kind, subject, utc_text(utc_now()))
        self._store.add("document", record.id, asdict(record), body=data, scope=scope)
        return record


def _user_key(secret: str, user: str) -> str:
    return f"{secret}/{user}"  # the name of a secret has no slash
