"""Seals: a code hidden in the weights that any change destroys and that comes off without a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sealmark.core.errors import ForgedSecretError, ParameterError, TamperedError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.integrity import CodeNull, WeightSeal
from sealmark.core.secret import Secret
from sealmark.core.task import Task
from sealmark.core.weights import TensorMap, Weights, weights_of


@dataclass(frozen=True)
class Hidden(WeightSeal):
    """Puts the code over the first 32 bytes of ``room`` and keeps these in the record."""

    offset: int = 0

    def bind(
        self, weights: Weights, model: nn.Module | None, task: Task | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if weights.info["room"].count < self.offset + 32:
            raise UnsupportedError("too little room", expected=self.offset + 32)
        return {"live": model is not None}, {"old": weights["room"][self._place]}

    def sealer(self, secret: Secret, code: bytes) -> TensorMap:
        return self._put(torch.tensor(list(code), dtype=torch.uint8))

    def opener(self, secret: Secret) -> TensorMap:
        return self._put(secret.tensors["old"])

    def read_code(self, weights: Weights, secret: Secret) -> bytes:
        return bytes(weights["room"][self._place].tolist())

    @property
    def _place(self) -> slice:
        return slice(self.offset, self.offset + 32)

    def _put(self, values: Tensor) -> TensorMap:
        def change(name: str, tensor: Tensor) -> Tensor:
            if name == "room":
                tensor[self._place] = values
            return tensor

        return change


class Net(nn.Module):
    def __init__(self, room: int = 40) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0))
        self.register_buffer("room", torch.arange(room, dtype=torch.uint8))


SEAL = Hidden()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in weights_of(Net()).items()}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def _damaged(model: nn.Module, name: str, place: int) -> nn.Module:
    with torch.no_grad():
        model.state_dict()[name][place] += 1
    return model


def test_a_sealed_model_is_intact(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), owner="ab", rng=rng)
    evidence = SEAL.check(sealed.model, sealed.secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.log10_p == pytest.approx(-256 * np.log10(2))
    assert evidence.details == {"changed": [], "channels": {}}
    assert (sealed.secret.facts["owner"], sealed.secret.host["live"]) == ("ab", True)


@pytest.mark.parametrize(("name", "place"), [("weight", 0), ("weight", 5), ("room", 32), ("room", 39)])
def test_a_change_anywhere_is_found_and_named(name: str, place: int, rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    evidence = SEAL.check(_damaged(sealed.model, name, place), sealed.secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.p_value == 1
    assert evidence.details["changed"] == [name]


class Deep(Net):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.arange(72.0).reshape(6, 2, 2, 3))
        self.table = nn.Parameter(torch.zeros(1500, 2))
        self.register_buffer("empty", torch.zeros(0, 4))


def _channels(model: nn.Module, secret: Secret) -> dict[str, list[int]]:
    evidence = SEAL.check(model, secret)
    assert evidence.verdict is Verdict.NO_MATCH
    channels: dict[str, list[int]] = evidence.details["channels"]
    return channels


def test_a_change_is_found_to_its_channels(rng: np.random.Generator) -> None:
    model, secret = (sealed := SEAL.seal(Deep(), rng=rng)).model, sealed.secret
    assert SEAL.check(model, secret).details == {"changed": [], "channels": {}}
    with torch.no_grad():
        model.get_parameter("filters")[4, 1, 0, 2] += 1
        model.get_parameter("filters")[1, 0] += 1
        model.get_parameter("table")[7, 0] = 1
        model.get_parameter("weight")[0] = 7
    assert _channels(model, secret) == {"filters": [1, 4], "table": [7]}
    assert SEAL.check(model, secret).details["changed"] == ["filters", "table", "weight"]


def test_a_tensor_that_was_changed_as_a_whole_or_in_form_lists_no_channels(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Deep(), rng=rng)
    with torch.no_grad():
        sealed.model.get_parameter("filters").mul_(2).add_(1)
    sealed.model.table = nn.Parameter(torch.zeros(1500))
    assert _channels(sealed.model, sealed.secret) == {}
    sealed.model.table = nn.Parameter(torch.zeros(3, 2))
    assert _channels(sealed.model, sealed.secret) == {}


def test_no_more_than_a_thousand_channels_of_a_tensor_are_listed(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Deep(), rng=rng)
    with torch.no_grad():
        sealed.model.get_parameter("table")[2:] += 1
    assert _channels(sealed.model, sealed.secret)["table"] == list(range(2, 1002))


def test_the_record_grows_by_four_bytes_a_channel(rng: np.random.Generator) -> None:
    tensors = SEAL.seal(Deep(), rng=rng).secret.tensors
    tags = {name: tensor.numel() for name, tensor in tensors.items() if name.startswith("channels/")}
    assert tags == {"channels/filters": 24, "channels/table": 6000, "channels/empty": 0}


def test_a_record_without_channels_still_names_the_tensor(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Deep(), rng=rng)
    facts = sealed.secret.facts
    facts["tensors"] = {"old": facts["tensors"]["old"]}
    bare = Secret(sealed.secret.reveal_seed(), facts, {"old": sealed.secret.tensors["old"]})
    with torch.no_grad():
        sealed.model.get_parameter("filters")[4, 1, 0, 2] += 1
    assert SEAL.check(sealed.model, bare).details == {"changed": ["filters"], "channels": {}}


def test_a_change_of_the_hidden_code_is_found(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    assert SEAL.check(_damaged(sealed.model, "room", 31), sealed.secret).details["changed"] == ["the code"]


def test_a_model_that_was_never_sealed_is_not_intact(rng: np.random.Generator) -> None:
    secret = SEAL.seal(Net(), rng=rng).secret
    assert SEAL.check(Net(), secret).verdict is Verdict.NO_MATCH


def test_the_record_of_another_sealing_does_not_pass(rng: np.random.Generator) -> None:
    one, other = SEAL.seal(Net(), rng=rng), SEAL.seal(Net(), rng=rng)
    assert SEAL.check(one.model, other.secret).details["changed"] == ["the code"]


def test_a_lost_or_added_tensor_is_found(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    secret = SEAL.seal_file(source, tmp_path / "sealed", rng=rng)
    tensors = dict(weights_of(tmp_path / "sealed"))
    save_file(tensors | {"more": torch.zeros(1)}, tmp_path / "added")
    save_file({"room": tensors["room"]}, tmp_path / "lost")
    assert SEAL.check(tmp_path / "added", secret).details["changed"] == ["more"]
    assert SEAL.check(tmp_path / "lost", secret).details["changed"] == ["weight"]
    assert SEAL.check(tmp_path / "sealed", secret).verdict is Verdict.MATCH


def test_sealing_leaves_the_given_model_as_it_was(rng: np.random.Generator) -> None:
    model = Net()
    sealed = SEAL.seal(model, rng=rng)
    assert weights_of(model).digest() == weights_of(Net()).digest() != weights_of(sealed.model).digest()


def test_checking_leaves_the_sealed_model_as_it_was(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    before = weights_of(sealed.model).digest()
    SEAL.check(sealed.model, sealed.secret)
    assert weights_of(sealed.model).digest() == before


def test_the_original_comes_back_bit_for_bit(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    assert weights_of(SEAL.restore(sealed.model, sealed.secret)).digest() == weights_of(Net()).digest()


def test_the_original_file_comes_back_byte_for_byte(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    names: list[str] = []

    def note(name: str, size: int) -> None:
        names.append(name)

    secret = SEAL.seal_file(source, tmp_path / "sealed", owner="ab", rng=rng, progress=note)
    SEAL.restore_file(tmp_path / "sealed", tmp_path / "opened", secret, progress=note)
    assert (tmp_path / "opened").read_bytes() == source.read_bytes() != (tmp_path / "sealed").read_bytes()
    assert sorted(names) == ["room", "room", "weight", "weight"]
    assert secret.host["live"] is False


def test_a_model_and_its_file_are_sealed_alike(source: Path, tmp_path: Path) -> None:
    live = SEAL.seal(Net(), rng=np.random.default_rng(0))
    secret = SEAL.seal_file(source, tmp_path / "sealed", rng=np.random.default_rng(0))
    assert secret.reveal_seed() == live.secret.reveal_seed()
    # the facts differ in whether the model was live, so the keyed codes do
    assert SEAL.check(live.model, secret).details["changed"] == ["the code"]


def test_what_was_changed_is_not_restored(source: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    with pytest.raises(TamperedError, match=r"changes in \['weight'\]"):
        SEAL.restore(_damaged(sealed.model, "weight", 0), sealed.secret)
    with pytest.raises(TamperedError):
        SEAL.restore_file(source, tmp_path / "opened", sealed.secret)
    assert not (tmp_path / "opened").exists()


def test_a_model_with_too_little_room_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="too little room"):
        SEAL.seal(Net(room=31))


def test_a_record_of_other_parameters_is_refused(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    for use in (Hidden(offset=8).check, Hidden(offset=8).restore):
        with pytest.raises(ParameterError, match="other parameters"):
            use(sealed.model, sealed.secret)


def test_a_forged_record_is_refused(rng: np.random.Generator) -> None:
    sealed = SEAL.seal(Net(), rng=rng)
    forged = Secret(sealed.secret.reveal_seed(), sealed.secret.facts, {"old": torch.zeros(32, dtype=torch.uint8)})
    with pytest.raises(ForgedSecretError):
        SEAL.check(sealed.model, forged)


@pytest.mark.parametrize("bits", [8, 128, 256])
def test_a_code_of_n_bits_passes_by_chance_once_in_2_to_the_n(bits: int) -> None:
    null = CodeNull(bits)
    assert null.log_p(1) == null.floor == pytest.approx(-bits * np.log(2))
    assert null.log_p(0) == 0
