import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sealmark.authorization.sealed import SealedModel, SealedWeights
from sealmark.core.errors import (
    ArtifactError,
    FormatError,
    ModelMismatchError,
    ParameterError,
    PolicyError,
    TamperedError,
    UnsupportedError,
    WrongKeyError,
)
from sealmark.core.secret import Secret
from sealmark.core.weights import INDEX, FileWeights
from sealmark.formats.sealed import open_sealed

LOCK = SealedWeights()
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def near_key(key):
    seed = bytearray(key.reveal_seed())
    seed[0] ^= 1
    return Secret(bytes(seed), key.facts)


def same_bits(a, b):
    a, b = (dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (a, b))
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].requires_grad == b[n].requires_grad and torch.equal(a[n], b[n]) for n in a
    )


def runs(data, length):
    return {data[i : i + length] for i in range(len(data) - length + 1)}


@pytest.fixture
def files(tmp_path):
    """A plain file, its sealed form, and the key."""
    save_file(small().state_dict(), tmp_path / "plain")
    key = LOCK.lock_file(tmp_path / "plain", tmp_path / "sealed")
    return tmp_path, key


@pytest.fixture
def folders(tmp_path):
    """A sharded folder, its sealed form, and the key."""
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"a": torch.randn(50)}, plain / SHARDS[0])
    save_file({"b": torch.randn(50)}, plain / SHARDS[1])
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (plain / INDEX).write_text(json.dumps(index))
    return tmp_path, LOCK.lock_file(plain, tmp_path / "sealed")


class Odd(nn.Module):
    """Tied, frozen, half-precision and unsaved tensors, a scalar, an empty one, an RNN's list of weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.low = nn.Parameter(torch.randn(3).bfloat16(), requires_grad=False)
        self.lstm = nn.LSTM(4, 4)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("angles", torch.randn(5), persistent=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, tokens):
        return self.out(self.lstm(self.embed(tokens))[0])


@pytest.mark.parametrize("make", [small, Odd, nn.Identity])
def test_the_right_key_gives_back_every_bit_of_every_tensor(make):
    model = make()
    made = LOCK.lock(model)
    assert same_bits(LOCK.unlock(made.model, made.key), model)


def test_a_trained_model_answers_as_before(digits, plain):
    made = LOCK.lock(plain)
    opened = LOCK.unlock(made.model, made.key)
    assert digits.score(opened) == digits.score(plain)
    assert type(opened) is type(plain)


def test_ties_memory_formats_and_modes_come_back():
    model = Odd().eval()
    opened = LOCK.unlock(*vars(LOCK.lock(model)).values())
    assert opened.out.weight is opened.embed.weight
    assert opened.lstm._flat_weights[0] is opened.lstm.weight_ih_l0
    assert opened.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not opened.training
    tokens = torch.tensor([[0], [1]])
    assert torch.equal(opened(tokens), model(tokens))


def test_an_unlocked_model_is_independent_of_the_locked_one():
    made = LOCK.lock(small())
    first = LOCK.unlock(made.model, made.key)
    with torch.no_grad():
        first[0].weight.zero_()
    assert LOCK.unlock(made.model, made.key)[0].weight.any()


def test_locking_leaves_the_original_as_it_was():
    model = small()
    before = copy.deepcopy(model)
    LOCK.lock(model)
    assert same_bits(model, before)


def test_a_sealed_model_refuses_to_run():
    with pytest.raises(WrongKeyError, match="the model is sealed"):
        LOCK.lock(small()).model(torch.zeros(1, 3))


def test_a_sealed_model_holds_ciphertext_and_nothing_else():
    sealed = LOCK.lock(small()).model
    assert list(sealed.state_dict()) == ["ciphertext"]
    assert not list(sealed.parameters())
    assert all(tensor.is_meta for tensor in sealed.architecture.state_dict().values())


def test_a_shipped_model_holds_no_run_of_the_key_or_of_the_plain_weights():
    model = small()
    model.register_buffer("unsaved", torch.randn(4), persistent=False)
    made = LOCK.lock(model)
    shipped = runs(pickle.dumps(made.model) + made.model.ciphertext.numpy().tobytes(), 6)
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    secret = [made.key.reveal_seed(), made.key.key("data")]
    plain = [t.numpy().tobytes() for t in tensors if t.is_floating_point() and t.unique().numel() > 1]
    assert len(plain) == 5  # two weights, two biases, the unsaved buffer
    for data in (*secret, *plain):
        assert not runs(data, 6) & shipped
    assert runs(plain[0], 6) & runs(pickle.dumps(model), 6)  # the control: the plain model does hold them


def test_a_shipped_file_holds_no_run_of_the_key_or_of_the_plain_file(files):
    folder, key = files
    raw = (folder / "sealed").read_bytes()
    with open_sealed(raw) as sealed:
        body = raw[sealed.start :]
    assert not runs(key.reveal_seed() + key.key("data"), 6) & runs(raw, 6)
    assert not runs((folder / "plain").read_bytes(), 6) & runs(body, 6)


def test_sealing_twice_under_one_seed_does_not_repeat_the_ciphertext():
    model = small()
    first, again = (LOCK.lock(model, rng=np.random.default_rng(0)) for _ in range(2))
    assert first.key == again.key
    body = first.model.ciphertext[-64:], again.model.ciphertext[-64:]
    assert not torch.equal(*body)
    assert same_bits(LOCK.unlock(again.model, first.key), model)


@pytest.mark.parametrize("wrong", [lambda model, key: LOCK.lock(model).key, lambda model, key: near_key(key)])
def test_another_key_of_the_same_model_is_refused(wrong):
    model = small()
    made = LOCK.lock(model)
    with pytest.raises(WrongKeyError, match="does not open"):
        LOCK.unlock(made.model, wrong(model, made.key))


def test_the_key_of_another_model_is_refused():
    made, other = LOCK.lock(small()), LOCK.lock(small())
    with pytest.raises(ModelMismatchError, match="another model"):
        LOCK.unlock(made.model, other.key)


def test_the_key_of_another_scheme_is_refused():
    made = LOCK.lock(small())
    foreign = Secret(made.key.reveal_seed(), made.key.facts | {"scheme": "hpnn"})
    with pytest.raises(ParameterError, match="another scheme"):
        LOCK.unlock(made.model, foreign)


def test_a_model_that_is_not_sealed_is_refused():
    made = LOCK.lock(small())
    with pytest.raises(ParameterError, match=r"not a sealed model.*SealedModel.*Sequential"):
        LOCK.unlock(small(), made.key)


def test_another_architecture_is_refused():
    made = LOCK.lock(small())
    other = LOCK.lock(nn.Linear(3, 3)).model.architecture
    swapped = SealedModel(other, made.model.ciphertext.numpy().tobytes())
    with pytest.raises(ModelMismatchError, match=r"do not fit the architecture.*Linear"):
        LOCK.unlock(swapped, made.key)


def test_every_flipped_byte_of_a_sealed_model_is_refused():
    made = LOCK.lock(nn.Linear(3, 2))
    for place in range(len(made.model.ciphertext)):
        changed = copy.deepcopy(made.model)
        changed.ciphertext[place] ^= 1 << place % 8
        with pytest.raises((ArtifactError, PolicyError)):
            LOCK.unlock(changed, made.key)


def test_every_flipped_byte_of_a_sealed_file_is_refused_and_nothing_is_written(files):
    folder, key = files
    raw = (folder / "sealed").read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        (folder / "changed").write_bytes(changed)
        with pytest.raises((ArtifactError, PolicyError)):
            LOCK.unlock_file(folder / "changed", folder / "opened", key)
        with pytest.raises((ArtifactError, PolicyError)):
            LOCK.open_file(folder / "changed", key)
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "plain", "sealed"]


def test_a_flipped_bit_of_the_body_is_called_tampering(files):
    folder, key = files
    raw = bytearray((folder / "sealed").read_bytes())
    raw[-1] ^= 1
    (folder / "sealed").write_bytes(raw)
    with pytest.raises(TamperedError):
        LOCK.unlock_file(folder / "sealed", folder / "opened", key)


def test_a_wrong_key_on_a_file_is_refused_and_nothing_is_written(files):
    folder, key = files
    with pytest.raises(WrongKeyError):
        LOCK.unlock_file(folder / "sealed", folder / "opened", near_key(key))
    assert not (folder / "opened").exists()


def test_a_file_comes_back_byte_for_byte(files):
    folder, key = files
    LOCK.unlock_file(folder / "sealed", folder / "opened", key)
    assert (folder / "opened").read_bytes() == (folder / "plain").read_bytes()


def test_a_sealed_file_says_what_it_is(files):
    folder, key = files
    with open_sealed(folder / "sealed") as sealed:
        header = sealed.header
    assert (header.model, header.role, header.body) == (key.facts["model"], "weights", "safetensors")
    assert header.model == FileWeights(folder / "plain").digest()


def test_a_file_is_opened_into_memory_as_one_buffer(files):
    folder, key = files
    tensors = LOCK.open_file(folder / "sealed", key)
    plain = load_file(folder / "plain")
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)
    places = [tensor.data_ptr() for tensor in tensors.values()]
    assert max(places) - min(places) < (folder / "plain").stat().st_size
    model = small()
    model.load_state_dict(tensors, assign=True)
    assert torch.equal(model[0].weight, plain["0.weight"])


def test_a_folder_comes_back_byte_for_byte(folders):
    root, key = folders
    assert sorted(path.name for path in (root / "sealed").iterdir()) == sorted(
        f"{name}.sealed" for name in (*SHARDS, INDEX)
    )
    LOCK.unlock_file(root / "sealed", root / "opened", key)
    for path in (root / "plain").iterdir():
        assert (root / "opened" / path.name).read_bytes() == path.read_bytes()
    assert LOCK.open_file(root / "sealed", key).keys() == {"a", "b"}


def test_a_folder_of_one_file_needs_no_index(tmp_path):
    (tmp_path / "plain").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "plain" / "m.safetensors")
    key = LOCK.lock_file(tmp_path / "plain", tmp_path / "sealed")
    assert LOCK.open_file(tmp_path / "sealed", key)["a"].tolist() == [1, 1, 1]


def swap(folder):
    first, second = (folder / f"{name}.sealed" for name in SHARDS)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


@pytest.mark.parametrize(
    "change",
    [
        swap,
        lambda folder: (folder / f"{SHARDS[1]}.sealed").unlink(),
        lambda folder: (folder / "more.sealed").write_bytes((folder / f"{SHARDS[1]}.sealed").read_bytes()),
        lambda folder: (folder / f"{INDEX}.sealed").write_bytes((folder / f"{SHARDS[1]}.sealed").read_bytes()),
    ],
    ids=["swapped", "dropped", "added", "a shard for the index"],
)
def test_a_folder_whose_parts_were_moved_is_refused_and_no_file_is_left(folders, change):
    root, key = folders
    change(root / "sealed")
    with pytest.raises(ModelMismatchError, match="another role"):
        LOCK.unlock_file(root / "sealed", root / "opened", key)
    assert not list((root / "opened").iterdir())


def test_a_folder_whose_last_shard_was_changed_leaves_no_file(folders):
    root, key = folders
    last = root / "sealed" / f"{SHARDS[1]}.sealed"
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    with pytest.raises(TamperedError):
        LOCK.unlock_file(root / "sealed", root / "opened", key)
    assert not list((root / "opened").iterdir())


def test_a_folder_without_sealed_weights_is_refused(files):
    folder, key = files
    (folder / "empty").mkdir()
    with pytest.raises(FormatError, match="no sealed weights there"):
        LOCK.open_file(folder / "empty", key)


def test_progress_tells_of_each_part(folders):
    root, key = folders
    told = []
    LOCK.lock_file(root / "plain", root / "again", progress=lambda name, size: told.append(name))
    LOCK.unlock_file(root / "sealed", root / "opened", key, progress=lambda name, size: told.append(size))
    sizes = [(root / "plain" / name).stat().st_size for name in (*SHARDS, INDEX)]
    assert told == [*SHARDS, INDEX, *sizes]


@pytest.mark.parametrize("method", ["lock_file", "unlock_file"])
def test_a_file_is_not_written_over_itself(files, method):
    folder, key = files
    before = (folder / "plain").read_bytes()
    with pytest.raises(ParameterError, match="the same"):
        getattr(LOCK, method)(folder / "plain", folder / "plain", *([key] if method == "unlock_file" else []))
    assert (folder / "plain").read_bytes() == before


def test_an_index_is_refused_in_favor_of_its_folder(folders):
    root, _ = folders
    with pytest.raises(ParameterError, match="the folder that it is in"):
        LOCK.lock_file(root / "plain" / INDEX, root / "again")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "plain").write_bytes(b"weights")
    with pytest.raises(FormatError):
        LOCK.lock_file(tmp_path / "plain", tmp_path / "sealed")
    assert not (tmp_path / "sealed").exists()


def test_tensors_that_would_be_shipped_in_the_clear_are_refused():
    model = small()
    model[2].scale = torch.ones(3)
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match=r"phases \(torch.complex64\).*2\.scale.*Register them as buffers"):
        LOCK.lock(model)
