"""User marks: issue, trace, authenticate, with a mark of keyed signs on the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sealmark.core.errors import (
    AccessError,
    ForgedSecretError,
    ModelMismatchError,
    ParameterError,
    UnsupportedError,
)
from sealmark.core.evidence import Null, Verdict
from sealmark.core.identity import Suspicion, WeightMark
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, Suspect, WeightFile, WhiteBox
from sealmark.core.weights import TensorMap, Weights, weights_of
from sealmark.stats.nulls import KeyedProjection, Permutation

USERS = [f"user-{n}" for n in range(30)]


@dataclass(frozen=True)
class Spread(WeightMark):
    """Adds the user's keyed signs to ``weight``; needs the original."""

    strength: float = 0.01
    null: Null = field(default_factory=KeyedProjection)

    @property
    def parameters(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def marker(self, secret: Secret, user: str) -> TensorMap:
        def change(name: str, tensor: Tensor) -> Tensor:
            signs = self._signs(secret, user, tensor.numel()).reshape(tensor.shape)
            return tensor + self.strength * signs if name == "weight" else tensor

        return change

    def suspicion(
        self, suspect: Suspect, secret: Secret, users: Sequence[str], original: Weights | None
    ) -> Suspicion:
        if original is None:
            raise ParameterError("an original is needed")
        change = (suspect.weights["weight"] - original["weight"]).double().reshape(-1)
        signs = torch.stack([self._signs(secret, user, len(change)).double() for user in users])
        return Suspicion((signs @ change / max(float(change.norm()), 1e-30)).numpy(), self.null, {"figure": 1})

    @staticmethod
    def _signs(secret: Secret, user: str, count: int) -> Tensor:
        return torch.from_numpy(secret.stream(f"user/{user}").signs(count)).float()


class Noting(Spread):
    def bind(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"entries": weights.info["weight"].count}, {"bias": weights["bias"]}


MARK = Spread()


def _model(seed: int = 0) -> nn.Module:
    model = nn.Linear(32, 32)
    with torch.no_grad():
        model.weight.copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)))
        model.bias.zero_()
    return model


@pytest.fixture
def original() -> nn.Module:
    return _model()


@pytest.fixture
def secret(original: nn.Module) -> Secret:
    return MARK.enroll(original, owner="ab", rng=np.random.default_rng(1))


def test_the_one_who_leaked_is_accused_and_nobody_else(original: nn.Module, secret: Secret) -> None:
    leaked = MARK.issue(original, secret, "user-7")
    assert leaked.user == "user-7"
    found = MARK.trace(WhiteBox(leaked.model), secret, USERS, original=original)
    assert found.verdict is Verdict.MATCH
    assert [entry.user for entry in found.accused] == ["user-7"]
    assert found.ranking[0] == found.accused[0]
    assert found.accused[0].p_value <= 1e-6


def test_an_unmarked_model_accuses_nobody(original: nn.Module, secret: Secret) -> None:
    for innocent in (original, _model(5)):
        found = MARK.trace(WhiteBox(innocent), secret, USERS, original=original)
        assert (found.verdict, found.accused) == (Verdict.NO_MATCH, ())


def test_a_copy_of_somebody_who_is_not_listed_accuses_nobody(original: nn.Module, secret: Secret) -> None:
    leaked = MARK.issue(original, secret, "stranger").model
    assert MARK.trace(WhiteBox(leaked), secret, USERS, original=original).verdict is Verdict.NO_MATCH


def test_two_who_average_their_copies_are_both_accused(original: nn.Module, secret: Secret) -> None:
    one, two = (MARK.issue(original, secret, user).model for user in ("user-3", "user-9"))
    mixed = _model()
    with torch.no_grad():
        mixed.weight.copy_((one.weight + two.weight) / 2)  # type: ignore[operator, arg-type]
    found = MARK.trace(WhiteBox(mixed), secret, USERS, original=original)
    assert {entry.user for entry in found.accused} == {"user-3", "user-9"}


def test_the_same_user_gets_the_same_copy_and_another_user_another(original: nn.Module, secret: Secret) -> None:
    copies = [MARK.issue(original, secret, user).model for user in ("a", "a", "b")]
    digests = [weights_of(model).digest() for model in copies]
    assert digests[0] == digests[1] != digests[2]


def test_issuing_leaves_the_original_as_it_was(original: nn.Module, secret: Secret) -> None:
    before = weights_of(original).digest()
    MARK.issue(original, secret, "a")
    assert weights_of(original).digest() == before


def test_a_file_is_marked_as_the_model_is(original: nn.Module, secret: Secret, tmp_path: Path) -> None:
    save_file(original.state_dict(), tmp_path / "m.safetensors")
    assert MARK.enroll(tmp_path / "m.safetensors", owner="ab", rng=np.random.default_rng(1)) == secret
    seen: list[str] = []
    MARK.issue_file(
        tmp_path / "m.safetensors", tmp_path / "u", secret, "user-7", progress=lambda name, _: seen.append(name)
    )
    live = MARK.issue(original, secret, "user-7").model
    assert weights_of(tmp_path / "u").digest() == weights_of(live).digest()
    assert sorted(seen) == ["bias", "weight"]
    found = MARK.trace(WeightFile(tmp_path / "u"), secret, USERS, original=tmp_path / "m.safetensors")
    assert [entry.user for entry in found.accused] == ["user-7"]


def test_the_p_value_is_corrected_for_everybody_who_was_looked_at(original: nn.Module, secret: Secret) -> None:
    suspect = WhiteBox(MARK.issue(original, secret, "user-7").model)
    alone = MARK.trace(suspect, secret, ["user-7"], original=original).ranking[0]
    among = MARK.trace(suspect, secret, USERS, original=original).ranking[0]
    assert among.log10_p == pytest.approx(alone.log10_p + math.log10(30))


def test_the_ranking_shows_twenty_and_all_who_are_accused(original: nn.Module, secret: Secret) -> None:
    found = MARK.trace(WhiteBox(_model(5)), secret, USERS, original=original, alpha=0.5)
    assert len(found.ranking) == 20
    statistics = [entry.statistic for entry in found.ranking]
    assert statistics == sorted(statistics, reverse=True)
    everybody = Spread(null=Permutation((-99.0,) * 10**4))
    found = everybody.trace(WhiteBox(_model(5)), secret, USERS, original=original, alpha=0.01)
    assert (len(found.accused), len(found.ranking)) == (30, 20)


def test_a_p_value_of_exactly_alpha_is_an_accusation(original: nn.Module, secret: Secret) -> None:
    for count in (9, 19, 99, 999):
        scheme = Spread(null=Permutation((-99.0,) * count))
        alpha = 1 / (count + 1)
        found = scheme.trace(WhiteBox(original), secret, ["a"], original=original, alpha=alpha)
        assert found.verdict is Verdict.MATCH, count
        beyond = scheme.trace(WhiteBox(original), secret, ["a"], original=original, alpha=alpha * 0.999)
        assert beyond.verdict is Verdict.INCONCLUSIVE, count


def test_a_null_that_cannot_reach_alpha_for_so_many_users_is_inconclusive(
    original: nn.Module, secret: Secret
) -> None:
    scheme, suspect = Spread(null=Permutation((99.0,) * 999)), WhiteBox(original)
    for users, verdict in ((USERS[:9], Verdict.NO_MATCH), (USERS[:11], Verdict.INCONCLUSIVE)):
        assert scheme.trace(suspect, secret, users, original=original, alpha=0.01).verdict is verdict


def test_an_accusation_is_plain_json(original: nn.Module, secret: Secret) -> None:
    suspect = WhiteBox(MARK.issue(original, secret, "user-7").model)
    found = MARK.trace(suspect, secret, USERS, original=original)
    again = json.loads(json.dumps(found.as_dict()))
    assert (again["verdict"], again["basis"], again["users"]) == ("MATCH", "bound", 30)
    assert again["accused"][0]["user"] == "user-7"
    assert (again["commitment"], again["details"]["figure"]) == (secret.commitment, 1)


def test_a_copy_is_its_users_and_nobody_elses(original: nn.Module, secret: Secret) -> None:
    suspect = WhiteBox(MARK.issue(original, secret, "user-7").model)
    evidence = MARK.authenticate(suspect, secret, "user-7", original=original)
    assert evidence.verdict is Verdict.MATCH
    assert (evidence.details["user"], evidence.queries) == ("user-7", 0)
    assert MARK.authenticate(suspect, secret, "user-8", original=original).verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("users", [[], ["a", "b", "a"]], ids=["none", "one twice"])
def test_a_bad_list_of_users_is_refused(users: list[str], original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="bad list of users"):
        MARK.trace(WhiteBox(original), secret, users, original=original)


def test_a_level_that_means_nothing_is_refused(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="alpha"):
        MARK.trace(WhiteBox(original), secret, USERS, original=original, alpha=0)
    with pytest.raises(ParameterError, match="alpha"):
        MARK.authenticate(WhiteBox(original), secret, "a", original=original, alpha=1)


def test_a_suspect_that_shows_no_weights_is_refused(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(AccessError):
        MARK.trace(BlackBox(lambda x: x), secret, USERS, original=original)


def test_a_missing_original_is_for_the_scheme_to_judge(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="an original is needed"):
        MARK.trace(WhiteBox(original), secret, USERS)


def test_another_original_is_refused(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ModelMismatchError, match="not the model that this secret was made for"):
        MARK.trace(WhiteBox(original), secret, USERS, original=_model(5))
    with pytest.raises(ModelMismatchError):
        MARK.authenticate(WhiteBox(original), secret, "a", original=_model(5))


def test_another_model_is_not_issued(secret: Secret, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError):
        MARK.issue(_model(5), secret, "a")
    save_file(_model(5).state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ModelMismatchError):
        MARK.issue_file(tmp_path / "m.safetensors", tmp_path / "u", secret, "a")
    assert not (tmp_path / "u").exists()


def test_a_user_without_a_name_gets_no_copy(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="expected a name"):
        MARK.issue(original, secret, "")


def test_a_secret_of_other_parameters_is_refused(original: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="other parameters"):
        Spread(strength=1).issue(original, secret, "a")
    with pytest.raises(ParameterError, match="other parameters"):
        Spread(strength=1).trace(WhiteBox(original), secret, USERS, original=original)


def test_the_secret_is_held_to_its_commitment(original: nn.Module, secret: Secret) -> None:
    MARK.trace(WhiteBox(original), secret, USERS, original=original, commitment=secret.commitment)
    with pytest.raises(ForgedSecretError):
        MARK.trace(WhiteBox(original), secret, USERS, original=original, commitment="0" * 64)


def test_what_the_scheme_notes_of_the_model_stands_in_the_secret(original: nn.Module) -> None:
    secret = Noting().enroll(original)
    assert secret.host == {"entries": 1024}
    assert torch.equal(secret.tensors["bias"], torch.zeros(32))


def test_a_live_original_lends_its_order_and_weights_alone_do_not(original: nn.Module, secret: Secret) -> None:
    suspect = WhiteBox(MARK.issue(original, secret, "user-7").model)
    live = MARK.trace(suspect, secret, USERS, original=original)
    stored = MARK.trace(suspect, secret, USERS, original=weights_of(original))
    assert [entry.user for entry in live.accused] == [entry.user for entry in stored.accused] == ["user-7"]
    assert "agreement" in live.details["alignment"]
    assert "alignment" not in stored.details


def test_a_suspect_that_cannot_be_aligned_is_taken_as_it_is(
    original: nn.Module, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedError("no structure")

    monkeypatch.setattr("sealmark.core.leak.align", refuse)
    suspect = WhiteBox(MARK.issue(original, secret, "user-7").model)
    found = MARK.trace(suspect, secret, USERS, original=original)
    assert [entry.user for entry in found.accused] == ["user-7"]
    assert found.details["alignment"] == {"impossible": "no structure"}
