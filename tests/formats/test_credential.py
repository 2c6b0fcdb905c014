from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from sealmark.core.credentials import Credential
from sealmark.core.errors import FormatError, ParameterError
from sealmark.formats import credential
from sealmark.formats.credential import FORMAT, HeldCredential, read_credential, write_credential

IMAGES = torch.linspace(0, 1, 12).reshape(3, 2, 2)
HELD = HeldCredential(Credential("Çelik", {"images": IMAGES, "tags": torch.arange(3)}), "example", "00")


def told(**changes: object) -> str:
    plain = {"model": "00", "scheme": "example", "user": "ada"} | changes
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def test_a_credential_comes_back_as_it_was(tmp_path):
    write_credential(HELD, tmp_path / "a")
    found = read_credential(tmp_path / "a")
    assert (found.credential.user, found.scheme, found.model) == ("Çelik", "example", "00")
    assert found.credential.tensors.keys() == {"images", "tags"}
    assert torch.equal(found.credential.tensors["images"], IMAGES)


def test_the_same_credential_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_credential(HELD, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_its_owner_alone_can_read_it(tmp_path):
    write_credential(HELD, tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_its_text_shows_no_image():
    assert "0.5" not in repr(HELD)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {FORMAT: told(), "format": "pt"},
        {"sealmark.credential.v2": told()},
        {FORMAT: "nonsense"},
        {FORMAT: "[]"},
        {FORMAT: told().replace(",", ", ")},
        {FORMAT: told(user=1)},
        {FORMAT: told(user="")},
        {FORMAT: told(more="")},
    ],
)
def test_another_file_is_refused(tmp_path, metadata):
    (tmp_path / "a").write_bytes(save({"images": IMAGES}, metadata))
    with pytest.raises(FormatError):
        read_credential(tmp_path / "a")


def test_a_file_without_tensors_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(save({}, {FORMAT: told()}))
    with pytest.raises(FormatError):
        read_credential(tmp_path / "a")


def test_every_cut_is_refused(tmp_path):
    write_credential(HELD, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for length in range(len(data)):
        (tmp_path / "b").write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_credential(tmp_path / "b")


def test_no_file_is_a_wrong_call(tmp_path):
    with pytest.raises(ParameterError, match="no such file"):
        read_credential(tmp_path / "a")


def test_too_large_a_credential_is_neither_written_nor_read(tmp_path, monkeypatch):
    write_credential(HELD, tmp_path / "a")
    monkeypatch.setattr(credential, "MAX_BYTES", 100)
    with pytest.raises(FormatError, match="too large"):
        read_credential(tmp_path / "a")
    with pytest.raises(ParameterError):
        write_credential(HELD, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_empty_credential_is_not_written(tmp_path):
    with pytest.raises(ParameterError):
        write_credential(HeldCredential(Credential("ada", {}), "example", "00"), tmp_path / "a")
