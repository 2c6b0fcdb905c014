"""Verdicts about suspects that are aligned to an original first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import AlignedNull, Basis, Score, Verdict
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, BlackBox, Suspect, WeightFile, WhiteBox, aligned
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task
from sealmark.core.weights import TensorMap, save_model
from sealmark.stats.calibration import super_uniformity
from sealmark.stats.nulls import Binomial

RECIPE = Recipe(epochs=20, batch_size=16, rate=0.1)


@dataclass(frozen=True)
class Signs(Watermark):
    """Keyed signs in the sums of the columns of the second layer, which read the hidden units."""

    separable: bool = True
    access = Access.WEIGHTS

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"units": model.get_parameter("2.weight").shape[1]}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        return {"signs": torch.from_numpy(secret.stream("signs").signs(secret.host["units"])).float()}

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        sums = model.get_parameter("2.weight").sum(0)
        return (0.3 - sums * self.derive(secret)["signs"]).relu().sum()

    def blind(self, secret: Secret) -> TensorMap | None:
        if not self.separable:
            return None
        return lambda name, tensor: tensor - tensor.mean(0) if name == "2.weight" else tensor

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        read = suspect.weights["2.weight"].sum(0).sign()
        count = secret.host["units"]
        return Score(int((read == self.derive(secret)["signs"]).sum()), Binomial(count, 0.5), {"read": count})


MARK = Signs()


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 2))


@pytest.fixture(scope="module")
def wide() -> Task:
    inputs = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))
    rows = Batch(inputs, (inputs[:, 0] > 0).long())
    parts = (rows.take(slice(i, i + 64)) for i in (0, 64, 128))
    return Task("wide", _wide, *parts, classes=2, chance=0.5, recipe=RECIPE)


@pytest.fixture(scope="module")
def start(wide: Task) -> nn.Module:
    return wide.model(np.random.default_rng(0))


@pytest.fixture(scope="module")
def secret(start: nn.Module) -> Secret:
    return MARK.keygen(start, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(start: nn.Module, secret: Secret, wide: Task) -> nn.Module:
    return MARK.embed(start, secret, wide, rng=np.random.default_rng(2)).model


def _rewritten(model: nn.Module, seed: int = 0) -> nn.Module:
    rng = np.random.default_rng(seed)
    order, scale = torch.from_numpy(rng.permutation(48)), torch.from_numpy(rng.uniform(0.2, 5, 48)).float()
    twin = _wide()
    with torch.no_grad():
        twin[0].weight.copy_((model[0].weight * scale[:, None])[order])
        twin[0].bias.copy_((model[0].bias * scale)[order])
        twin[2].weight.copy_((model[2].weight / scale)[:, order])
        twin[2].bias.copy_(model[2].bias)
    return twin


def test_a_rewrite_hides_the_mark_and_the_marked_original_brings_it_back(marked: nn.Module, secret: Secret) -> None:
    suspect = _rewritten(marked)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(suspect(inputs), marked(inputs), rtol=1e-4, atol=1e-4)
    assert MARK.verify(WhiteBox(suspect), secret).verdict is Verdict.NO_MATCH
    found = MARK.verify(WhiteBox(suspect), secret, original=marked)
    assert found.verdict is Verdict.MATCH
    assert found.basis is Basis.ALIGNED
    assert found.null == "Bin(48, 0.5), after alignment to the marked original"
    assert found.details["read"] == 48
    assert found.details["alignment"]["agreement"] > 0.99
    assert found.details["alignment"]["moved"] > 40


def test_against_the_model_that_the_secret_was_made_for_the_law_stays_exact(marked: nn.Module, wide: Task) -> None:
    trained = train_task(wide, rng=np.random.default_rng(3))
    secret = MARK.keygen(trained, rng=np.random.default_rng(1))
    copy = MARK.embed(trained, secret, wide, rng=np.random.default_rng(2)).model
    suspect = WhiteBox(_rewritten(copy))
    assert MARK.verify(suspect, secret).verdict is Verdict.NO_MATCH
    found = MARK.verify(suspect, secret, original=trained)
    assert (found.verdict, found.basis) == (Verdict.MATCH, Basis.EXACT)


def test_a_weight_file_is_aligned_as_well(marked: nn.Module, secret: Secret, tmp_path: Path) -> None:
    save_model(_rewritten(marked), tmp_path / "leak.safetensors")
    found = MARK.verify(WeightFile(tmp_path / "leak.safetensors"), secret, original=marked)
    assert found.verdict is Verdict.MATCH


def test_alignment_makes_no_mark_on_independent_models(wide: Task, start: nn.Module) -> None:
    p_values = []
    for number in range(12):
        secret = MARK.keygen(start, rng=np.random.default_rng([7, number]))
        marked = MARK.embed(start, secret, wide, rng=np.random.default_rng(2)).model
        for seed in (50, 51, 52):
            stranger = wide.model(np.random.default_rng([seed, number]))
            found = MARK.verify(WhiteBox(stranger), secret, original=marked)
            assert found.verdict is Verdict.NO_MATCH
            assert found.details["alignment"]["agreement"] < 0.9
            p_values.append(found.p_value)
    assert super_uniformity(p_values) > 1e-3


def test_a_scheme_that_cannot_be_blinded_wants_the_unmarked_model(start: nn.Module, marked: nn.Module) -> None:
    scheme = Signs(separable=False)
    secret = scheme.keygen(start, rng=np.random.default_rng(1))
    with pytest.raises(ParameterError, match="the model as it was before it was marked"):
        scheme.verify(WhiteBox(marked), secret, original=marked)
    assert scheme.verify(WhiteBox(start), secret, original=start).basis is Basis.EXACT


def test_a_scheme_that_asks_for_answers_takes_no_original(marked: nn.Module, start: nn.Module) -> None:
    class Answers(Signs):
        access = Access.LABELS

    scheme = Answers()
    secret = scheme.keygen(start, rng=np.random.default_rng(1))
    with pytest.raises(ParameterError, match="reads answers and needs no alignment"):
        scheme.verify(WhiteBox(marked), secret, original=start)


def test_a_suspect_of_another_architecture_is_a_mismatch(marked: nn.Module, secret: Secret) -> None:
    with pytest.raises(ModelMismatchError):
        MARK.verify(WhiteBox(nn.Linear(4, 2)), secret, original=marked)


def test_a_black_box_cannot_be_aligned(marked: nn.Module) -> None:
    with pytest.raises(Exception, match="does not offer"):
        aligned(BlackBox(lambda x: torch.zeros(len(x))), marked)


def test_an_aligned_null_is_the_law_before_under_another_basis() -> None:
    exact = Binomial(16, 0.5)
    null = AlignedNull(exact)
    assert (null.floor, null.log_p(12), null.basis) == (exact.floor, exact.log_p(12), Basis.ALIGNED)
