"""What a verifier may touch: counted, limited, refused, and never changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sealmark.core.errors import AccessError, BudgetError, FormatError, ParameterError
from sealmark.core.suspect import Access, BlackBox, Suspect, WeightFile, WhiteBox

INPUTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().roll(index).view_as(parameter))
    return net


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    save_file({"w": INPUTS}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def _outputs(model: nn.Module) -> Tensor:
    result: Tensor = copy.deepcopy(model).eval()(INPUTS).detach()
    return result


def test_a_white_box_answers_as_the_model_in_evaluation_mode(model: nn.Module) -> None:
    suspect, expected = WhiteBox(model), _outputs(model)
    assert torch.equal(suspect.logits(INPUTS), expected)
    assert torch.equal(suspect.probabilities(INPUTS), expected.softmax(-1))
    assert torch.equal(suspect.labels(INPUTS), expected.argmax(-1))
    assert suspect.labels(INPUTS).dtype == torch.int64


def test_a_white_box_answers_many_rows_in_order() -> None:
    rows = torch.arange(1300.0)[:, None]
    assert torch.equal(WhiteBox(nn.Identity()).logits(rows), rows)


def test_a_white_box_shows_the_weights(model: nn.Module) -> None:
    assert torch.equal(WhiteBox(model).weights["0.weight"], model[0].weight)  # type: ignore[index]


def test_looking_at_a_model_changes_neither_modes_nor_weights_nor_buffers(model: nn.Module) -> None:
    model.train()
    model[1].eval()  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    suspect = WhiteBox(model)
    suspect.labels(INPUTS)
    list(suspect.weights.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_every_answered_input_is_counted(model: nn.Module) -> None:
    suspect = WhiteBox(model)
    suspect.labels(INPUTS)
    suspect.logits(INPUTS[:2])
    assert suspect.queries == 9


def test_reading_weights_is_no_query(model: nn.Module) -> None:
    suspect = WhiteBox(model)
    list(suspect.weights.values())
    assert suspect.queries == 0


def test_suspects_count_for_themselves(model: nn.Module) -> None:
    WhiteBox(model).labels(INPUTS)
    assert WhiteBox(model).queries == 0


def test_the_budget_can_be_spent_to_the_last_query() -> None:
    suspect = BlackBox(lambda x: torch.zeros(len(x)), budget=7)
    assert len(suspect.labels(INPUTS)) == 7


def test_a_question_beyond_the_budget_is_not_asked() -> None:
    asked: list[int] = []

    def predict(inputs: Tensor) -> Tensor:
        asked.append(len(inputs))
        return torch.zeros(len(inputs))

    suspect = BlackBox(predict, budget=8)
    suspect.labels(INPUTS)
    with pytest.raises(BudgetError, match="expected at most 1 more, found 7"):
        suspect.labels(INPUTS)
    assert asked == [7]
    assert suspect.queries == 7


def test_a_black_box_of_labels_gives_labels_alone() -> None:
    suspect = BlackBox(lambda x: torch.tensor([3.0] * len(x)), returns="label")
    assert suspect.labels(INPUTS).tolist() == [3] * 7
    for refused in (suspect.probabilities, suspect.logits):
        with pytest.raises(AccessError, match="found labels"):
            refused(INPUTS)


def test_a_black_box_of_probabilities_gives_no_logits() -> None:
    suspect = BlackBox(lambda x: torch.tensor([[0.25, 0.75]] * len(x)), returns="probabilities")
    assert suspect.probabilities(INPUTS)[0].tolist() == [0.25, 0.75]
    assert suspect.labels(INPUTS).tolist() == [1] * 7
    with pytest.raises(AccessError):
        suspect.logits(INPUTS)


def test_a_black_box_of_logits_gives_probabilities_too() -> None:
    suspect = BlackBox(lambda x: torch.tensor([[0.0, 0.0]] * len(x)), returns="logits")
    assert suspect.probabilities(INPUTS)[0].tolist() == [0.5, 0.5]
    assert suspect.logits(INPUTS)[0].tolist() == [0, 0]


def test_answers_may_be_lists_and_may_carry_gradients() -> None:
    assert BlackBox(lambda x: [1] * len(x)).labels(INPUTS).tolist() == [1] * 7  # type: ignore[arg-type, return-value]
    weight = torch.ones(3, 2, requires_grad=True)
    assert not BlackBox(lambda x: x @ weight, returns="logits").logits(INPUTS).requires_grad


def test_a_black_box_shows_no_weights() -> None:
    with pytest.raises(AccessError, match="expected weights, found labels"):
        _ = BlackBox(lambda x: x[:, 0]).weights


def test_a_weight_file_shows_weights_and_answers_nothing(weight_file: Path) -> None:
    suspect = WeightFile(weight_file)
    assert torch.equal(suspect.weights["w"], INPUTS)
    with pytest.raises(AccessError, match="expected labels, found weights"):
        suspect.labels(INPUTS)
    assert suspect.queries == 0


@pytest.mark.parametrize(
    ("returns", "answer"),
    [("label", torch.zeros(7, 2)), ("probabilities", torch.zeros(7)), ("logits", torch.zeros(7, 2, 2))],
)
def test_an_answer_of_another_shape_is_refused(returns: str, answer: Tensor) -> None:
    with pytest.raises(FormatError, match="wrong shape"):
        BlackBox(lambda x: answer, returns=returns).labels(INPUTS)  # type: ignore[arg-type]


def test_an_answer_with_too_few_rows_is_refused() -> None:
    with pytest.raises(FormatError, match="expected 7 rows, found 6"):
        BlackBox(lambda x: torch.zeros(6)).labels(INPUTS)


def test_an_unknown_kind_of_answer_is_refused() -> None:
    with pytest.raises(ParameterError, match="found text"):
        BlackBox(lambda x: x, returns="text")  # type: ignore[arg-type]


@pytest.mark.parametrize("access", list(Access))
def test_a_suspect_grants_what_it_lists_and_nothing_else(
    access: Access, model: nn.Module, weight_file: Path
) -> None:
    suspects: list[Suspect] = [WhiteBox(model), WeightFile(weight_file), BlackBox(lambda x: x, returns="logits")]
    granted = {type(suspect): access in suspect.access for suspect in suspects}
    for suspect in suspects:
        if granted[type(suspect)]:
            suspect.require(access)
        else:
            with pytest.raises(AccessError):
                suspect.require(access)
    assert granted == {
        WhiteBox: True,
        WeightFile: access is Access.WEIGHTS,
        BlackBox: access not in (Access.WEIGHTS, Access.MODULE),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused(value):
    suspect = BlackBox(lambda x: torch.full((len(x), 3), value), returns="logits")
    for read in (suspect.logits, suspect.probabilities):
        with pytest.raises(FormatError, match="not finite"):
            read(torch.zeros(2, 4))
