"""Secrets: derived, committed, and hard to leak by accident."""

from __future__ import annotations

import copy
import hashlib
import hmac
import io
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.secret import Secret, draw_seed, tensor_digest
from sealmark.core.weights import DTYPES

SEED = bytes(range(32))
TENSOR = torch.arange(6.0).reshape(2, 3)
FACTS: dict[str, Any] = {
    "scheme": "toy",
    "parameters": {"bits": 8},
    "owner": "ab",
    "model": "cd",
    "host": {"layer": "0.weight"},
    "payload": "",
    "tensors": {"record": tensor_digest(TENSOR)},
}


def _secret(seed: bytes = SEED, **facts: Any) -> Secret:
    return Secret(seed, FACTS | facts, {"record": TENSOR})


def test_a_secret_is_the_same_after_its_parts_were_stored_and_read() -> None:
    secret = _secret()
    facts = json.loads(json.dumps(secret.facts))
    again = Secret(secret.reveal_seed(), facts, secret.tensors, created=secret.created)
    again.check(secret.commitment)
    assert again == secret
    assert hash(again) == hash(secret)
    assert again.key("x") == secret.key("x")


def test_the_secret_tells_its_scheme_and_host() -> None:
    assert _secret().scheme == "toy"
    assert _secret().host == {"layer": "0.weight"}
    assert Secret(SEED, {}).scheme == ""
    assert Secret(SEED, {}).host == {}


def test_changing_the_copy_of_the_facts_changes_nothing() -> None:
    secret = _secret()
    secret.facts["host"]["layer"] = "another"
    assert secret.host == {"layer": "0.weight"}


def test_the_tensors_cannot_be_exchanged() -> None:
    with pytest.raises(TypeError):
        _secret().tensors["record"] = TENSOR  # type: ignore[index]


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ParameterError, match="expected 32 bytes"):
        Secret(bytes(length), {})


@pytest.mark.parametrize("value", [b"bytes", float("nan"), {1: 2, "1": 3}])
def test_facts_that_are_not_plain_json_are_refused(value: object) -> None:
    with pytest.raises(ParameterError, match="plain JSON"):
        Secret(SEED, {"host": value})


def test_keys_follow_rfc_5869_over_seed_facts_and_label() -> None:
    facts = json.dumps(FACTS, sort_keys=True, separators=(",", ":")).encode()
    extracted = hmac.digest(hashlib.sha256(facts).digest(), SEED, "sha256")
    expected = hmac.digest(extracted, b"sealmark/stream/v1\0labels\x01", "sha256")
    assert _secret().key("labels") == expected


def test_a_stream_is_keyed_by_its_label() -> None:
    secret = _secret()
    assert np.array_equal(secret.stream("a").raw(64), secret.stream("a").raw(64))
    assert not np.array_equal(secret.stream("a").raw(64), secret.stream("b").raw(64))


def test_another_seed_gives_another_stream() -> None:
    assert _secret(bytes(32)).key("a") != _secret().key("a")


@pytest.mark.parametrize("fact", sorted(FACTS))
def test_another_fact_gives_another_stream_and_another_commitment(fact: str) -> None:
    other = _secret(**{fact: {"changed": 1} if fact in ("host", "parameters") else "changed"})
    assert other.key("a") != _secret().key("a")
    assert other.commitment != _secret().commitment
    assert other != _secret()


@pytest.mark.parametrize("fact", ["host", "parameters"])
def test_facts_of_a_wrong_form_are_refused(fact: str) -> None:
    with pytest.raises(ParameterError, match="objects under"):
        _secret(**{fact: "text"})


def test_a_missing_host_fact_tells_a_forged_secret() -> None:
    with pytest.raises(ForgedSecretError, match="carriers"):
        _secret(host={"layer": "fc"}).host["carriers"]


def test_streams_of_different_labels_are_uncorrelated() -> None:
    secret, count = _secret(), 1 << 16
    signs = [secret.stream(f"user/{n}").signs(count).astype(float) for n in range(6)]
    correlations = np.corrcoef(signs)[np.triu_indices(6, 1)] * np.sqrt(count)
    assert np.abs(correlations).max() < 5  # 15 standard normals: p = 9e-6


def test_the_commitment_is_sha256_of_seed_and_facts_with_a_prefix_of_its_own() -> None:
    facts = json.dumps(FACTS, sort_keys=True, separators=(",", ":")).encode()
    assert _secret().commitment == hashlib.sha256(b"sealmark/commitment/v1\0" + SEED + facts).hexdigest()
    assert _secret(bytes(32)).commitment != _secret().commitment


def test_the_commitment_never_changes_between_versions() -> None:
    golden = "773534a37ee5"
    assert Secret(bytes(32), {"scheme": "example"}).commitment.startswith(golden)


def test_the_time_of_creation_is_not_committed() -> None:
    assert Secret(SEED, {}, created="2020-01-01").commitment == Secret(SEED, {}).commitment


def test_a_sound_secret_passes_with_and_without_its_commitment() -> None:
    _secret().check()
    _secret().check(_secret().commitment)


@pytest.mark.parametrize(
    "tensors",
    [{"record": TENSOR + 1}, {}, {"record": TENSOR, "more": TENSOR}, {"another": TENSOR}],
    ids=["changed", "missing", "added", "renamed"],
)
def test_tensors_that_are_not_the_committed_ones_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ForgedSecretError, match="not the committed ones"):
        Secret(SEED, FACTS, tensors).check()


def test_a_tensor_changed_in_place_is_refused() -> None:
    tensor = TENSOR.clone()
    secret = Secret(SEED, FACTS, {"record": tensor})
    secret.check()
    tensor[0, 0] = 9
    with pytest.raises(ForgedSecretError, match=r"differences in \['record'\]"):
        secret.check()


def test_a_digest_that_is_no_text_is_refused() -> None:
    with pytest.raises(ForgedSecretError):
        Secret(SEED, FACTS | {"tensors": {"record": ["x"]}}, {"record": TENSOR}).check()


@pytest.mark.parametrize("commitment", ["", "0" * 64, "é"])
def test_a_secret_that_does_not_open_the_commitment_is_refused(commitment: str) -> None:
    with pytest.raises(ForgedSecretError, match="does not open the commitment"):
        _secret().check(commitment)


def test_repr_shows_the_commitment_and_no_byte_of_the_seed() -> None:
    secret = _secret()
    shown = f"{secret} {secret!r} {[secret]}"
    assert secret.commitment[:12] in shown
    assert SEED.hex()[:8] not in shown
    assert repr(SEED)[2:10] not in shown


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_cannot_be_pickled(protocol: int) -> None:
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(_secret(), protocol)


def test_a_model_that_holds_a_secret_cannot_be_saved_by_torch() -> None:
    with pytest.raises(UnsupportedError):
        torch.save({"secret": _secret()}, io.BytesIO())


def test_a_copy_of_a_secret_is_the_secret_itself() -> None:
    secret = _secret()
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_a_secret_equals_nothing_of_another_type() -> None:
    assert _secret() != _secret().commitment


def test_what_follows_from_a_secret_is_computed_once() -> None:
    secret, calls = _secret(), []
    for _ in range(3):
        assert secret.memo("x", lambda: calls.append(1) or "made") == "made"
    assert secret.memo("y", lambda: "other") == "other"
    assert calls == [1]


def test_a_drawn_seed_comes_from_the_system_unless_a_test_gives_a_generator() -> None:
    assert draw_seed() != draw_seed()
    assert len(draw_seed()) == 32
    assert draw_seed(np.random.default_rng(7)) == draw_seed(np.random.default_rng(7))


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (0, 2), ()], ids=str)
def test_the_digest_is_sha256_of_type_shape_and_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    raw = bytes(n % 2 for n in range(count * dtype.itemsize))
    tensor = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)].view(dtype).reshape(shape)
    header = f'["{str(dtype)[6:]}",[{",".join(map(str, shape))}]]\0'
    assert tensor_digest(tensor) == hashlib.sha256(header.encode() + raw).hexdigest()


@given(st.integers(0, 5), st.sampled_from([torch.float16, torch.bfloat16, torch.int32]))
def test_a_tensor_of_another_content_type_or_shape_has_another_digest(place: int, dtype: torch.dtype) -> None:
    changed = TENSOR.clone()
    changed.view(-1)[place] += 1
    others = [changed, TENSOR.to(dtype), TENSOR.reshape(3, 2), TENSOR.reshape(6)]
    assert tensor_digest(TENSOR) not in {tensor_digest(other) for other in others}


def test_the_digest_sees_values_and_neither_strides_nor_gradients() -> None:
    assert tensor_digest(TENSOR.t().contiguous().t()) == tensor_digest(TENSOR)
    assert tensor_digest(TENSOR.clone().requires_grad_()) == tensor_digest(TENSOR)


def test_the_digest_never_changes_between_versions() -> None:
    golden = "9f8a6873fa6e"
    assert tensor_digest(TENSOR).startswith(golden)


def test_a_secret_needs_no_torch_until_it_has_tensors() -> None:
    code = (
        "import sys; from sealmark.core.secret import Secret;"
        "s = Secret(bytes(32), {}); s.check(s.commitment); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_was_committed_cannot_be_learned_again():
    committed = torch.arange(3)
    secret = Secret(
        bytes(32), {"scheme": "x", "tensors": {"inputs": tensor_digest(committed)}}, {"inputs": committed}
    )
    secret.check()
    with pytest.raises(ForgedSecretError, match="learned again"):
        secret.with_learned({"inputs": committed + 1}).check()
