"""Taking everything out of a vault, in the clear."""

from __future__ import annotations

import json
from pathlib import Path

from sealmark.core.canonical import sha256_hex
from sealmark.core.files import atomic_write
from sealmark.vault.database import new_folder
from sealmark.vault.vault import Vault


def export_all(vault: Vault, path: Path | str) -> None:
    """Write all that a vault holds to a new folder, readable without it: guard that folder.

    ``contents.json`` lists everything, ``secrets/NAME.safetensors`` are secret files, ``documents/SHA256.json``
    are signed documents, ``keys.json`` has the private keys as text. All files have mode 0600.

    Raises:
        ParameterError: something is there already.
        ServiceError: the disk is full; nothing is left behind.
    """
    with vault.transaction(), new_folder(Path(path)) as folder:
        contents = vault.contents()
        keys = {"signing": vault.signing_key.reveal(), "identity": vault.identity.reveal()}
        (folder / "secrets").mkdir()
        (folder / "documents").mkdir()
        for record in contents["secrets"]:
            vault.export_secret(record["name"], folder / "secrets" / f"{record['name']}.safetensors")
        for record in contents["evidence"]:
            _write(folder / "documents" / f"{record['id']}.json", vault.document(record["id"]))
        for record in contents["licenses"]:
            for edition in range(record["edition"] + 1):
                data = vault.license_document(record["id"], edition)
                _write(folder / "documents" / f"{sha256_hex(data)}.json", data)
        _write(folder / "contents.json", json.dumps(contents, indent=1, ensure_ascii=False).encode())
        _write(folder / "keys.json", json.dumps(keys, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path, mode=0o600) as file:
        file.write(data)
