"""What all schemes share: a name, parameters, and secrets that belong to both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.errors import ForgedSecretError, ParameterError
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.weights import weights_of


@dataclass(frozen=True)
class Toy(Scheme):
    bits: int = 8
    strength: float = 0.1
    layers: tuple[tuple[str, int], ...] = (("a", 1), ("b", 2))
    options: dict[str, int] = field(default_factory=lambda: {"x": 1})


SCHEME = Toy()
MODEL = nn.Linear(2, 2)


def _secret(**options: Any) -> Secret:
    return SCHEME.new_secret(weights_of(MODEL), rng=np.random.default_rng(0), **options)


def _with(secret: Secret, **facts: Any) -> Secret:
    return Secret(secret.reveal_seed(), secret.facts | facts, secret.tensors)


def test_a_scheme_is_named_after_the_file_that_it_stands_in() -> None:
    assert SCHEME.name == "test_scheme"


def test_a_scheme_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SCHEME.bits = 9  # type: ignore[misc]


def test_a_secret_is_bound_to_scheme_parameters_owner_model_host_and_payload() -> None:
    tensor = torch.tensor([1, 2])
    facts = _secret(host={"layer": "w"}, tensors={"t": tensor}, owner="ab", payload=b"\x01\xff").facts
    assert facts == {
        "scheme": "test_scheme",
        "parameters": {"bits": 8, "strength": 0.1, "layers": [["a", 1], ["b", 2]], "options": {"x": 1}},
        "owner": "ab",
        "model": weights_of(MODEL).digest(),
        "host": {"layer": "w"},
        "payload": "01ff",
        "tensors": {"t": tensor_digest(tensor)},
    }


def test_a_secret_keeps_a_copy_of_its_tensors() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    secret = _secret(tensors={"t": tensor})
    with torch.no_grad():
        tensor += 1
    assert secret.tensors["t"].tolist() == [0, 0]
    assert not secret.tensors["t"].requires_grad


def test_secrets_differ_unless_a_test_gives_the_generator() -> None:
    assert _secret() == _secret()
    assert SCHEME.new_secret(weights_of(MODEL)) != SCHEME.new_secret(weights_of(MODEL))


def test_a_scheme_accepts_its_own_secret_with_nested_parameters() -> None:
    secret = _secret(tensors={"t": torch.zeros(2)})
    SCHEME.check_secret(secret)
    SCHEME.check_secret(secret, secret.commitment)


def test_a_secret_of_another_scheme_is_refused() -> None:
    with pytest.raises(ParameterError, match="expected test_scheme, found uchida"):
        SCHEME.check_secret(_with(_secret(), scheme="uchida"))


def test_a_secret_with_other_parameters_is_refused_with_the_difference() -> None:
    with pytest.raises(ParameterError, match=r"expected \{'bits': 8\}, found \{'bits': 9\}"):
        replace(SCHEME, bits=9).check_secret(_secret())


@pytest.mark.parametrize("parameters", [{}, {"more": 1}])
def test_a_secret_with_missing_or_additional_parameters_is_refused(parameters: dict[str, int]) -> None:
    claimed = _secret().facts["parameters"] | parameters if parameters else {}
    with pytest.raises(ParameterError, match="other parameters"):
        SCHEME.check_secret(_with(_secret(), parameters=claimed))


def test_a_secret_whose_tensors_were_exchanged_is_refused() -> None:
    secret = _secret(tensors={"t": torch.zeros(2)})
    forged = Secret(secret.reveal_seed(), secret.facts, {"t": torch.ones(2)})
    with pytest.raises(ForgedSecretError, match="not the committed ones"):
        SCHEME.check_secret(forged)


def test_a_secret_that_does_not_open_the_commitment_is_refused() -> None:
    with pytest.raises(ForgedSecretError, match="does not open"):
        SCHEME.check_secret(_secret(), "0" * 64)
