"""The owner's folder: keys, secrets, issued users and signed documents, encrypted at rest."""

from sealmark.vault.export import export_all
from sealmark.vault.licensing import SignedLicense
from sealmark.vault.records import DocumentRecord, LicenseRecord, SecretRecord, UserRecord
from sealmark.vault.unlocking import write_key_file
from sealmark.vault.vault import Vault

__all__ = [
    "DocumentRecord",
    "LicenseRecord",
    "SecretRecord",
    "SignedLicense",
    "UserRecord",
    "Vault",
    "export_all",
    "write_key_file",
]
