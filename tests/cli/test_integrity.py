from __future__ import annotations

import json
from pathlib import Path

import pytest

from sealmark.core.errors import ServiceError
from sealmark.core.integrity import WeightSeal
from sealmark.core.weights import weights_of
from sealmark.vault import Vault

PLAIN = "plain.safetensors"
SEAL = f"seal {PLAIN} --out sealed.safetensors"


def flip(path: str, position: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(data)


def test_a_sealed_model_is_intact(sealmark, desk):
    sealmark(SEAL)
    found = json.loads(sealmark("check sealed.safetensors --secret sealed --json").stdout)
    assert found["verdict"] == "MATCH"
    assert found["details"]["changed"] == []


@pytest.mark.parametrize("position", [-1, -200_000])
def test_one_flipped_bit_is_found_and_located(sealmark, desk, position):
    sealmark(SEAL)
    flip("sealed.safetensors", position)
    result = sealmark("check sealed.safetensors --secret sealed", code=1)
    assert "it was changed" in result.stdout
    found = json.loads(sealmark("check sealed.safetensors --secret sealed --json", code=1).stdout)
    assert len(found["details"]["changed"]) == 1


def test_the_unsealed_model_and_another_seal_are_not_intact(sealmark, desk):
    sealmark(SEAL)
    sealmark(f"seal {PLAIN} --out other.safetensors")
    sealmark(f"check {PLAIN} --secret sealed", code=1)
    sealmark("check other.safetensors --secret sealed", code=1)


def test_restore_gives_the_original_back_bit_for_bit(sealmark, desk):
    sealmark(SEAL)
    assert Path("sealed.safetensors").read_bytes() != Path(PLAIN).read_bytes()
    sealmark("restore sealed.safetensors --secret sealed --out back.safetensors")
    assert Path("back.safetensors").read_bytes() == Path(PLAIN).read_bytes()


def test_restore_refuses_a_changed_model_and_writes_nothing(sealmark, desk, contents):
    sealmark(SEAL)
    flip("sealed.safetensors", -1)
    before = contents()
    assert "TAMPERED" in sealmark("restore sealed.safetensors --secret sealed --out b", code=3).stderr
    assert contents() == before


def test_check_keeps_signed_evidence(sealmark, desk):
    sealmark(SEAL)
    sealmark("check sealed.safetensors --secret sealed --evidence-out e.json")
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        assert vault.document(vault.evidence()[0].id) == Path("e.json").read_bytes()


def test_a_customer_checks_with_a_record_file_and_no_vault(sealmark, desk):
    sealmark(SEAL)
    sealmark("vault export --secret sealed --out record.safetensors")
    sealmark("check sealed.safetensors --secret-file record.safetensors --vault none")
    flip("sealed.safetensors", -1)
    sealmark("check sealed.safetensors --secret-file record.safetensors --vault none", code=1)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("seal nowhere.safetensors --out new", 2, "no such file"),
        ("seal vault.key --out new", 3, "safetensors"),
        (f"seal {PLAIN} --out marked.safetensors", 2, "--force"),
        (f"seal {PLAIN} --out new --name mine", 2, "already"),
        (f"seal {PLAIN} --out new --scheme uchida", 2, "one of mimosanet, reversible"),
        (f"check {PLAIN} --secret mine", 2, "cannot check with uchida"),
        (f"check {PLAIN} --secret mine --evidence-out vault.key", 2, "--force"),
        (f"check {PLAIN} --secret-file record.safetensors --vault none --evidence-out e", 2, "nothing to sign"),
        (f"restore {PLAIN} --secret mine --out new", 2, "cannot restore with uchida"),
        (f"restore {PLAIN} --out new", 2, "which secret?"),
    ],
)
def test_a_wrong_call_writes_nothing_and_keeps_no_record(sealmark, desk, contents, line, code, said):
    sealmark("vault export --secret mine --out record.safetensors")
    before, kept = contents(), sealmark("vault list --json").stdout
    assert said in sealmark(line, code=code).stderr
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept


def test_a_seal_that_rebuilds_layers_needs_the_network(sealmark, desk):
    line = f"{SEAL} --scheme mimosanet"
    assert "which network?" in sealmark(line, code=2).stderr
    sealmark(f"{line} --task digits")
    sealmark("check sealed.safetensors --secret sealed")
    sealmark("restore sealed.safetensors --secret sealed --out back.safetensors --task digits")
    assert weights_of("back.safetensors").digest() == weights_of(PLAIN).digest()
    flip("sealed.safetensors", -5)
    sealmark("check sealed.safetensors --secret sealed", code=1)
    sealmark("restore sealed.safetensors --secret sealed --out again.safetensors --task digits", code=3)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ServiceError("disk full"), 4)])
def test_an_interrupted_seal_leaves_no_file_and_no_record(sealmark, desk, contents, monkeypatch, error, code):
    real = WeightSeal.seal_file

    def stop(self, *paths, **options):
        real(self, *paths, **options)
        raise error

    before, kept = contents(), sealmark("vault list --json").stdout
    monkeypatch.setattr(WeightSeal, "seal_file", stop)
    sealmark(SEAL, code=code)
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept
