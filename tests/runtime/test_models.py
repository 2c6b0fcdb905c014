from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sealmark.core.errors import FormatError, ModelMismatchError, ParameterError, ServiceError, UnknownNameError
from sealmark.core.weights import FileWeights, ModelWeights, save_model, weights_of
from sealmark.runtime.models import build_model, load_weights


class Tied(nn.Module):
    """An embedding whose weight is its head's too, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("step", torch.tensor(7))


def fresh(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    save_model(fresh(1), tmp_path / "a")
    model = fresh(2)
    assert not equal(model, fresh(1))
    load_weights(model, tmp_path / "a")
    assert equal(model, fresh(1))


def test_safetensors_reads_what_was_saved(tmp_path):
    save_model(fresh(), tmp_path / "a")
    assert load_file(tmp_path / "a").keys() == fresh().state_dict().keys()


def test_a_saved_model_has_the_digest_of_the_live_one(tmp_path):
    save_model(Tied(), tmp_path / "a")
    save_model(fresh(), tmp_path / "b")
    assert FileWeights(tmp_path / "b").digest() == ModelWeights(fresh()).digest()
    assert FileWeights(tmp_path / "a").digest() != FileWeights(tmp_path / "b").digest()


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    first, second = Tied(), Tied()
    save_model(first, tmp_path / "a")
    assert sorted(FileWeights(tmp_path / "a").info) == ["embed.weight", "step"]
    load_weights(second, tmp_path / "a")
    assert equal(second, first)
    assert second.head.weight.data_ptr() == second.embed.weight.data_ptr()


@pytest.mark.parametrize("names", [("head.weight",), ("embed.weight", "head.weight")])
def test_a_file_may_hold_any_or_all_of_tied_tensors(tmp_path, names):
    weight = torch.arange(15.0).reshape(5, 3)
    save_file({name: weight.clone() for name in names} | {"step": torch.tensor(1)}, tmp_path / "a")
    model = Tied()
    load_weights(model, tmp_path / "a")
    assert torch.equal(model.embed.weight, weight)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    tensors = {"head.weight": torch.ones(5, 3), "embed.weight": torch.zeros(5, 3), "step": torch.tensor(1)}
    save_file(tensors, tmp_path / "a")
    with pytest.raises(ModelMismatchError, match="differ"):
        load_weights(Tied(), tmp_path / "a")


def test_another_floating_type_is_converted(tmp_path):
    save_model(fresh().to(torch.bfloat16), tmp_path / "a")
    model = fresh(2)
    load_weights(model, tmp_path / "a")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, fresh()[0].weight.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("0.bias"), "expected 0.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "found extra"),
        (lambda t: t.update({"0.bias": torch.ones(4)}), "another form"),
        (lambda t: t.update({"0.bias": torch.ones(3, dtype=torch.int32)}), "another form"),
        (lambda t: t.update({f"x{i}": torch.ones(1) for i in range(9)}), "and 3 more"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, change, said):
    tensors = fresh(2).state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "a")
    model = fresh(1)
    with pytest.raises(ModelMismatchError, match=said):
        load_weights(model, tmp_path / "a")
    assert equal(model, fresh(1))


def test_a_truncated_file_is_refused(tmp_path):
    save_model(fresh(), tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(FormatError):
        load_weights(fresh(), tmp_path / "a")


def test_saving_onto_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ServiceError, match="No space left"):
        save_model(fresh(), tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_saving_to_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="existing folder"):
        save_model(fresh(), tmp_path / "no" / "a")


def test_a_model_from_a_reference_follows_from_the_generator(tmp_path, monkeypatch):
    (tmp_path / "net_of_mine.py").write_text("from torch import nn\ndef build(): return nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    first, again, other = (build_model("net_of_mine:build", rng=np.random.default_rng(s)) for s in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("torch.nn", ParameterError, "package.module:factory"),
        (":build", ParameterError, "package.module:factory"),
        ("no_such_module_here:build", UnknownNameError, "no module no_such_module_here"),
        ("torch.nn:NoSuchLayer", UnknownNameError, "no NoSuchLayer in torch.nn"),
        ("torch.nn:Linear", ParameterError, "takes no arguments"),
        ("json:JSONDecoder", ParameterError, "gives no model"),
    ],
)
def test_a_bad_reference_is_refused_with_what_was_expected(reference, error, said):
    with pytest.raises(error, match=said):
        build_model(reference, rng=np.random.default_rng(0))


def test_importing_a_model_leaves_the_import_path_as_it_was():
    import sys

    before = list(sys.path)
    build_model("torch.nn:Flatten", rng=np.random.default_rng(0))
    assert sys.path == before


def test_weights_of_other_widths_fit_where_that_is_asked_for():
    narrow, wide = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 2)) for n in (3, 5))
    with pytest.raises(ModelMismatchError):
        load_weights(narrow, weights_of(wide))
    load_weights(narrow, weights_of(wide), resize=True)
    inputs = torch.ones(2, 4)
    assert torch.equal(narrow(inputs), wide(inputs))
    assert (narrow[0].out_features, narrow[2].in_features) == (5, 5)
    with pytest.raises(ModelMismatchError):
        load_weights(nn.Linear(4, 3), weights_of(nn.Conv1d(4, 3, 1)), resize=True)
