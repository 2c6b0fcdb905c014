import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.authorization.chaotic_weights import ChaoticWeights, logistic_orbit
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError, UnsupportedError, WrongKeyError
from sealmark.core.secret import Secret
from sealmark.core.training import train_task
from sealmark.core.weights import rewrite_model
from sealmark.evaluate.metrics import attacker_gain

GRANULARITIES = ("scalars", "kernels", "filters")
KEYSTREAMS = ("prg", "logistic")


@pytest.fixture(scope="module")
def model(digits):
    return train_task(digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def locked(model):
    return ChaoticWeights().lock(model, rng=np.random.default_rng(2))


def other_keys(key, count):
    return [Secret(bytes([n]) * 32, key.facts) for n in range(count)]


def near_key(key):
    seed = bytearray(key.reveal_seed())
    seed[0] ^= 1
    return Secret(bytes(seed), key.facts)


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_the_right_key_gives_back_every_bit(model, granularity, keystream):
    lock = ChaoticWeights(granularity, keystream)
    made = lock.lock(model, rng=np.random.default_rng(0))
    assert not same_bits(made.model, model)
    assert same_bits(lock.unlock(made.model, made.key), model)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_a_locked_model_is_near_chance_in_every_mode(digits, model, granularity, keystream):
    made = ChaoticWeights(granularity, keystream).lock(model, rng=np.random.default_rng(2))
    assert abs(digits.score(made.model) - digits.chance) < 0.05


def test_locking_leaves_the_original_as_it_was(digits, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ChaoticWeights().lock(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_wrong_keys_give_a_model_near_chance(digits, locked):
    for key in other_keys(locked.key, 5):
        assert abs(digits.score(ChaoticWeights().unlock(locked.model, key)) - digits.chance) < 0.05


@pytest.mark.parametrize("keystream", KEYSTREAMS)
def test_a_key_with_one_bit_flipped_gives_a_model_near_chance(digits, model, keystream):
    lock = ChaoticWeights(keystream=keystream)
    made = lock.lock(model, rng=np.random.default_rng(2))
    assert abs(digits.score(lock.unlock(made.model, near_key(made.key))) - digits.chance) < 0.06


def test_the_identity_permutation_leaves_the_accuracy_so_that_the_order_alone_locks(digits, model, monkeypatch):
    monkeypatch.setattr(ChaoticWeights, "_permutation", lambda self, key, name, count: np.arange(count))
    made = ChaoticWeights().lock(model)
    assert digits.score(made.model) == digits.score(model) > 0.95


def test_a_permutation_of_outputs_and_the_next_inputs_alike_would_lock_nothing(digits, model):
    """The check above sees a lock that preserves the function; ours moves each tensor by itself."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def consistent(name, tensor):
        if name.startswith(("conv3", "norm3")) and tensor.dim():
            return tensor[order]
        return tensor.reshape(128, 64, 16)[:, order].reshape(128, 1024) if name == "fc1.weight" else tensor

    assert digits.score(rewrite_model(model, consistent)) == digits.score(model)
    key = ChaoticWeights("filters").lock(model, rng=np.random.default_rng(0)).key
    scheme = ChaoticWeights("filters")
    assert len({tuple(scheme._permutation(key, name, 64)) for name in ("conv3.weight", "conv2.weight")}) == 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_tensors_alone_move_and_keep_their_values(model, granularity):
    made = ChaoticWeights(granularity).lock(model, rng=np.random.default_rng(0))
    assert sorted(made.key.host["units"]) == [
        f"{name}.weight" for name in ("conv1", "conv2", "conv3", "fc1", "fc2")
    ]
    for name, tensor in made.model.state_dict().items():
        original = model.state_dict()[name]
        assert torch.equal(tensor, original) is (name not in made.key.host["units"])
        assert torch.equal(tensor.reshape(-1).sort().values, original.reshape(-1).sort().values)


def test_kernels_stay_whole_when_kernels_move(model):
    made = ChaoticWeights("kernels").lock(model, rng=np.random.default_rng(0))
    kernels = {tuple(kernel.tolist()) for kernel in model.conv3.weight.reshape(-1, 9)}
    assert kernels == {tuple(kernel.tolist()) for kernel in made.model.conv3.weight.reshape(-1, 9)}


def test_filters_stay_whole_when_filters_move(model):
    made = ChaoticWeights("filters").lock(model, rng=np.random.default_rng(0))
    filters = {tuple(row.tolist()) for row in model.fc1.weight}
    assert filters == {tuple(row.tolist()) for row in made.model.fc1.weight}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_every_float_type_come_back(dtype):
    plain = nn.Linear(16, 8)
    plain.weight.data = plain.weight.data.to(dtype)
    lock = ChaoticWeights()
    made = lock.lock(plain)
    as_bytes = [m.weight.view(torch.uint8) for m in (plain, made.model, lock.unlock(made.model, made.key))]
    assert not torch.equal(as_bytes[0], as_bytes[1])
    assert torch.equal(as_bytes[0], as_bytes[2])


def test_tied_weights_are_moved_once_and_stay_tied():
    plain = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20, bias=False))
    plain[1].weight = plain[0].weight
    lock = ChaoticWeights()
    made = lock.lock(plain)
    assert made.model[1].weight is made.model[0].weight
    assert torch.equal(lock.unlock(made.model, made.key)[1].weight, plain[1].weight)


def test_the_same_randomness_gives_the_same_lock(model, locked):
    again = ChaoticWeights().lock(model, rng=np.random.default_rng(2))
    assert same_bits(again.model, locked.model)
    assert again.key == locked.key
    assert not same_bits(ChaoticWeights().lock(model, rng=np.random.default_rng(3)).model, locked.model)


@pytest.mark.parametrize(
    ("plain", "granularity"),
    [
        (nn.Sequential(nn.BatchNorm2d(64), nn.PReLU(64)), "scalars"),
        (nn.Linear(4, 4), "scalars"),
        (nn.Conv2d(3, 8, 5), "filters"),
        (nn.Conv2d(64, 1, 5), "filters"),
        (nn.Embedding.from_pretrained(torch.ones(64, 64)), "scalars"),
        (nn.Embedding.from_pretrained(torch.ones(0, 4)), "scalars"),
    ],
    ids=["no weight tensor", "16 scalars", "8 filters", "one filter", "constant weights", "no entries"],
)
def test_a_model_that_it_would_hardly_change_is_refused(plain, granularity):
    with pytest.raises(UnsupportedError, match=r"lock next to nothing.*finer granularity"):
        ChaoticWeights(granularity).lock(plain)


@pytest.mark.parametrize(
    ("parameters", "named"), [(("channels",), "granularity"), (("scalars", "tent"), "keystream")]
)
def test_an_unknown_mode_is_refused(parameters, named):
    with pytest.raises(ParameterError, match=f"unknown {named}"):
        ChaoticWeights(*parameters)


def test_a_model_of_another_form_is_left_as_it_is(locked):
    other = nn.Sequential(nn.Linear(8, 16))
    assert same_bits(ChaoticWeights().unlock(other, locked.key), other)


def test_a_file_is_locked_as_the_live_model_is(model, locked, tmp_path):
    save_file(model.state_dict(), tmp_path / "plain")
    key = ChaoticWeights().lock_file(tmp_path / "plain", tmp_path / "locked", rng=np.random.default_rng(2))
    assert key == locked.key
    live = locked.model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in load_file(tmp_path / "locked").items())
    ChaoticWeights().unlock_file(tmp_path / "locked", tmp_path / "unlocked", key)
    assert (tmp_path / "unlocked").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("wrong", [lambda key: other_keys(key, 1)[0], near_key], ids=["other", "near"])
def test_a_wrong_key_on_a_file_is_refused_and_nothing_is_written(model, tmp_path, wrong):
    save_file(model.state_dict(), tmp_path / "plain")
    key = ChaoticWeights().lock_file(tmp_path / "plain", tmp_path / "locked")
    with pytest.raises(WrongKeyError):
        ChaoticWeights().unlock_file(tmp_path / "locked", tmp_path / "unlocked", wrong(key))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locked", "plain"]


def test_fine_tuning_a_locked_model_gains_next_to_nothing_over_starting_afresh(digits, model, locked):
    quarter, attack = Resources.of(digits, 0.25), FineTune(epochs=60, rate=0.05)
    scratch = digits.score(attack.scratch(quarter, np.random.default_rng(3)))

    def gain(stolen):
        attacked = digits.score(attack.run(stolen, quarter, rng=np.random.default_rng(3)).model)
        return attacker_gain(attacked, scratch, digits.score(model))

    assert gain(locked.model) < 0.1
    assert gain(model) > 0.5  # the control: an open model is worth stealing


def test_the_orbit_is_the_one_of_correctly_rounded_arithmetic():
    x, mu = Fraction(0.3), Fraction(3.99999999)
    orbit = []
    for _ in range(260):
        x = Fraction(float(Fraction(float(mu * x)) * Fraction(float(1 - x))))
        orbit.append(float(x))
    assert list(itertools.islice(logistic_orbit(0.3, 3.99999999), 60)) == orbit[200:]


def test_the_orbit_is_golden():
    golden = ["0x1.d413dbd61ccafp-2", "0x1.fc3b68ee4c910p-1", "0x1.debee84005b20p-6"]
    assert [x.hex() for x in itertools.islice(logistic_orbit(0.3, 3.99999999), 3)] == golden


def test_a_start_off_by_1e_12_gives_another_order():
    near, far = (
        np.argsort(list(itertools.islice(logistic_orbit(x, 3.99999999), 1000))) for x in (0.3, 0.3 + 1e-12)
    )
    assert np.mean(near == far) < 0.01


@pytest.mark.parametrize(
    ("keystream", "golden"),
    [
        ("prg", [11, 5, 3, 0, 9, 4, 6, 2, 1, 8, 7, 10]),
        ("logistic", [8, 1, 9, 2, 6, 4, 11, 10, 3, 5, 0, 7]),
    ],
)
def test_the_permutations_are_golden(keystream, golden):
    key = Secret(bytes(32), {"scheme": "chaotic_weights"})
    assert ChaoticWeights(keystream=keystream)._permutation(key, "conv.weight", 12).tolist() == golden
