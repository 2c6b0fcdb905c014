"""Secret files: what is written reads back, and what does not belong together is refused."""

import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sealmark.core.errors import (
    ArtifactError,
    ForgedSecretError,
    FormatError,
    ParameterError,
    SealmarkError,
    ServiceError,
)
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.weights import DTYPES
from sealmark.formats import secret as module
from sealmark.formats.secret import read_secret, secret_from_bytes, secret_to_bytes, write_secret

FILE = json.loads((Path(__file__).parents[1] / "vectors" / "secret.json").read_text())
SEED = bytes(range(32))


def make(tensors: dict[str, torch.Tensor] | None = None, **facts: Any) -> Secret:
    tensors = tensors or {}
    facts = {"scheme": "example", "parameters": {"bits": 8}, "model": "ab" * 32} | facts
    if tensors:
        facts["tensors"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return Secret(SEED, facts, tensors, created="2031-01-01T00:00:00Z")


def outcome_of(data: bytes) -> str:
    try:
        secret_from_bytes(data)
    except SealmarkError as error:
        return error.code
    return "OK"


@pytest.mark.parametrize("vector", FILE["vectors"], ids=lambda vector: vector["name"])
def test_the_vector_has_its_outcome(vector: dict[str, str]) -> None:
    assert outcome_of(base64.b64decode(vector["data"])) == vector["outcome"]


def test_we_write_the_bytes_that_the_script_made_by_another_route() -> None:
    tensors = {
        "images": torch.tensor(list(b"abc"), dtype=torch.uint8),
        "labels": torch.tensor(list(b"defgh"), dtype=torch.uint8),
    }
    assert secret_to_bytes(make(tensors)) == base64.b64decode(FILE["vectors"][0]["data"])


def test_a_secret_reads_back_from_its_file(tmp_path: Path) -> None:
    tensors = {"images": torch.arange(12.0).reshape(3, 4), "empty": torch.empty(0, 2), "one": torch.tensor(1.5)}
    secret = make(tensors)
    write_secret(secret, tmp_path / "a")
    found = read_secret(tmp_path / "a")
    assert (found, found.facts, found.created) == (secret, secret.facts, secret.created)
    assert found.reveal_seed() == SEED
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("code", DTYPES)
def test_a_tensor_of_every_type_reads_back(code: str) -> None:
    secret = make({"a": torch.tensor([0, 1, 1]).to(DTYPES[code]), "b": torch.ones(3, dtype=torch.uint8)})
    assert secret_from_bytes(secret_to_bytes(secret)) == secret


def test_a_tensor_that_is_not_contiguous_reads_back() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    found = secret_from_bytes(secret_to_bytes(make({"a": tensor})))
    assert torch.equal(found.tensors["a"], tensor)


def test_other_tools_read_tensors_and_description(tmp_path: Path) -> None:
    write_secret(make({"a": torch.arange(3.0)}), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(3.0))
        assert file.metadata()["scheme"] == "example"


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    write_secret(make(), tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_the_same_secret_is_the_same_bytes() -> None:
    tensors = {"b": torch.ones(1), "a": torch.ones(2, dtype=torch.float64)}
    assert secret_to_bytes(make(tensors)) == secret_to_bytes(make(dict(reversed(tensors.items()))))


def test_every_flipped_bit_of_a_file_is_refused() -> None:
    data = secret_to_bytes(make({"a": torch.arange(2.0)}))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FormatError, ForgedSecretError)):
            secret_from_bytes(bytes(changed))


def test_every_truncation_of_a_file_is_refused() -> None:
    data = secret_to_bytes(make({"a": torch.arange(2.0)}))
    for size in range(len(data)):
        with pytest.raises(ArtifactError):
            secret_from_bytes(data[:size])


def test_a_secret_whose_tensors_are_not_the_committed_ones_is_not_written(tmp_path: Path) -> None:
    secret = Secret(SEED, {"scheme": "example"}, {"a": torch.ones(1)})
    with pytest.raises(ForgedSecretError):
        write_secret(secret, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_a_type_without_a_name_is_not_written() -> None:
    with pytest.raises(ParameterError, match="complex64"):
        secret_to_bytes(make({"a": torch.ones(1, dtype=torch.complex64)}))


def test_a_tensor_with_the_name_of_the_metadata_is_not_written() -> None:
    with pytest.raises(ParameterError, match="__metadata__"):
        secret_to_bytes(make({"__metadata__": torch.ones(1)}))


def test_a_time_that_is_not_text_is_not_written() -> None:
    with pytest.raises(ParameterError, match="time"):
        secret_to_bytes(Secret(SEED, {"scheme": "example"}, created="\ud800"))


def test_more_tensors_than_a_reader_takes_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENSORS", 1)
    with pytest.raises(ParameterError, match="too large"):
        secret_to_bytes(make({"a": torch.ones(1), "b": torch.ones(1)}))


def test_more_tensors_than_the_cap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = secret_to_bytes(make({"a": torch.ones(1), "b": torch.ones(1)}))
    monkeypatch.setattr(module, "MAX_TENSORS", 1)
    with pytest.raises(FormatError, match="too many"):
        secret_from_bytes(data)


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="no such file"):
        read_secret(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_secret(make(), tmp_path / "a")
    old = (tmp_path / "a").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServiceError, match="No space"):
        write_secret(make(scheme="other"), tmp_path / "a")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [old]


def test_a_secret_without_tensors_is_read_without_torch() -> None:
    code = (
        "import sys; from sealmark.core.secret import Secret; from sealmark.formats.secret import *;"
        "secret_from_bytes(secret_to_bytes(Secret(bytes(32), {'scheme': 'example'})));"
        "import sealmark.vault, sealmark.formats.evidence, sealmark.formats.license, sealmark.formats.revocation;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("fact", ["host", "parameters"])
def test_facts_that_are_no_objects_are_refused(fact: str) -> None:
    text = '{"%s":"text","scheme":"x"}' % fact  # noqa: UP031
    with pytest.raises(FormatError, match="objects under"):
        module._facts(text)
