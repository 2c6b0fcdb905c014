import copy

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.attacks.removal.dummy_neurons import DummyNeurons
from sealmark.attacks.removal.fine_tune import FineTune
from sealmark.attacks.removal.permute import Permute
from sealmark.attacks.removal.prune import Prune
from sealmark.attacks.removal.rescale import Rescale
from sealmark.attacks.removal.sign_flip import SignFlip
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, UnknownNameError
from sealmark.core.symmetry.alignment import align
from sealmark.core.symmetry.rewriting import rows as rows_of
from sealmark.core.symmetry.structure import units_of
from sealmark.core.training import train_task
from sealmark.core.weights import FileWeights, ModelWeights, save_model

SAME_FORM = (Permute(), Rescale(), SignFlip())
DUMMIES = tuple(DummyNeurons(kind=kind) for kind in ("zero", "clique", "split"))
OBFUSCATION = (*SAME_FORM, *DUMMIES, Permute(), Rescale())
NAMES = ["mlp", "digits", "residual", "transformer"]


def attacked(model, digits, attacks, *, seed=0):
    for turn, attack in enumerate(attacks):
        share = 1.0 if attack.card.needs_data else 0.0
        rng = np.random.default_rng([seed, turn])
        model = attack.run(model, Resources.of(digits, share), rng=rng).model.eval()
    return model


def aligned(suspect, original, **options):
    return align(ModelWeights(suspect), original, **options)


def worst(found, model):
    """Largest relative difference of a tensor."""
    weights = ModelWeights(model)
    return max(
        float((found.weights[name] - weights[name]).abs().max() / weights[name].abs().max())
        for name in weights
        if weights[name].is_floating_point()
    )


def difference(one, two, digits):
    inputs = digits.test.inputs[:64]
    with torch.no_grad():
        return float((one(inputs) - two(inputs)).abs().max() / one(inputs).abs().max())


def in_place(found, model):
    """Share of units whose incoming weights point where they did before the rewrite."""
    right = []
    weights = ModelWeights(model)
    for units in units_of(model):
        slot = units.makers[0]
        one, two = (rows_of(side, slot, units.size).double() for side in (weights, found.weights))
        right += (torch.nn.functional.cosine_similarity(one, two) > 0.999).tolist()
    return float(np.mean(right))


@pytest.fixture(scope="module")
def owned(small):
    """One net of each kind, with weights as after training, by name."""
    return {name: small.settled(make) for name, make in small.NETWORKS.items()}


@pytest.fixture(scope="module")
def strangers(digits):
    return [train_task(digits, rng=np.random.default_rng(seed)).eval() for seed in (11, 12)]


@pytest.fixture(scope="module", params=["as it was", "fine-tuned", "pruned"])
def copied(request, plain, digits):
    means = {"as it was": [], "fine-tuned": [FineTune(epochs=3)], "pruned": [Prune(rate=0.5)]}
    return attacked(plain, digits, means[request.param])


@pytest.mark.parametrize("name", NAMES)
def test_a_suspect_with_nothing_to_undo_comes_back_bit_for_bit(owned, name):
    found = aligned(owned[name], owned[name])
    assert {key: found.weights[key].numpy().tobytes() for key in found.weights} == {
        key: tensor.numpy().tobytes() for key, tensor in ModelWeights(owned[name]).items()
    }
    assert found.note == {
        "agreement": 1.0, "units": found.units, "moved": 0, "flipped": 0, "scaled": 0, "dropped": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "attack", [*SAME_FORM, *(DummyNeurons(kind=kind) for kind in ("zero", "clique", "split"))], ids=repr
)
def test_each_rewrite_is_undone(owned, digits, name, attack):
    suspect = attacked(owned[name], digits, [attack])
    found = aligned(suspect, owned[name])
    assert worst(found, owned[name]) < 2e-6
    assert found.agreement > 0.9999


@pytest.mark.parametrize("name", NAMES)
def test_all_rewrites_together_are_undone(owned, digits, name):
    suspect = attacked(owned[name], digits, OBFUSCATION)
    found = aligned(suspect, owned[name])
    assert worst(found, owned[name]) < 1e-5
    assert found.moved > 0.5 * found.units
    assert found.dropped > 0
    assert difference(suspect, found.model(owned[name]), digits) < 2e-4  # float32 feels cliques cancel


def test_what_was_undone_is_counted(owned, digits):
    model = owned["digits"]
    flipped = aligned(attacked(model, digits, [SignFlip(rate=1.0)]), model)
    scaled = aligned(attacked(model, digits, [Rescale()]), model)
    added = aligned(attacked(model, digits, [DummyNeurons(kind="zero", share=0.5)]), model)
    assert (flipped.flipped, flipped.moved) == (16 + 32 + 64, 0)
    assert scaled.scaled > 0.95 * (2 * (16 + 32 + 64) + 128)
    assert (added.dropped, added.units) == (120, 240)


def test_copies_are_put_back_in_place_also_after_training_or_pruning(copied, plain, digits):
    suspect = attacked(copied, digits, OBFUSCATION)
    found = aligned(suspect, plain)
    assert in_place(found, copied) >= 0.98
    assert found.agreement > 0.9
    assert difference(suspect, found.model(plain), digits) < 1e-4


def test_a_copy_that_nobody_rewrote_is_not_made_worse(copied, plain):
    found = aligned(copied, plain)
    assert (found.moved, found.flipped, found.dropped) == (0, 0, 0)
    assert in_place(found, copied) == 1.0

    def gap(side):
        return sum(
            float((side[n] - w).square().sum() / w.square().sum())
            for n, w in ModelWeights(plain).items()
            if w.dim() > 1
        )

    assert gap(found.weights) <= gap(ModelWeights(copied)) * 1.01


def test_strangers_agree_far_less_than_copies_and_keep_their_function(strangers, plain, digits):
    for stranger in strangers:
        found = aligned(stranger, plain)
        assert found.agreement < 0.6
        assert difference(stranger, found.model(plain), digits) < 1e-4


BLIND = {"conv2.weight", "norm1.weight"}


def scrambled(model, names, seed):
    """With other values in some tensors."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        tensor = twin.get_parameter(name).data
        tensor.copy_(10 * torch.randn(tensor.shape, generator=generator))
    return twin


@pytest.mark.parametrize("attacks", [SAME_FORM, OBFUSCATION], ids=["same form", "dummies"])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_blind_in_the_original_has_no_influence(plain, digits, attacks, seed):
    suspect = attacked(plain, digits, attacks)
    one = aligned(suspect, plain, blind=BLIND)
    two = aligned(suspect, scrambled(plain, BLIND, seed + 10), blind=BLIND)
    assert one.note == two.note
    for name in one.weights:
        assert torch.equal(one.weights[name], two.weights[name])


@pytest.mark.parametrize("seed", [1, 2])
def test_nor_has_what_is_blind_in_a_suspect_without_dummies(plain, digits, seed):
    suspect = attacked(plain, digits, SAME_FORM)
    one = aligned(suspect, plain, blind=BLIND)
    two = aligned(scrambled(suspect, BLIND, seed), scrambled(plain, BLIND, seed + 10), blind=BLIND)
    assert one.note == two.note
    for name in set(one.weights) - BLIND:
        assert torch.equal(one.weights[name], two.weights[name])


def test_without_blinding_the_same_change_does_have_influence(plain, digits):
    """The negative control."""
    suspect = attacked(plain, digits, SAME_FORM)
    one, two = (aligned(side, plain) for side in (suspect, scrambled(suspect, BLIND, 1)))
    assert one.note != two.note


def test_blind_tensors_are_carried_along(plain, digits):
    found = aligned(attacked(plain, digits, SAME_FORM), plain, blind=BLIND)
    assert in_place(found, plain) == 1.0
    for name in BLIND:
        relative = (found.weights[name] - ModelWeights(plain)[name]).abs().max() / ModelWeights(plain)[
            name
        ].abs().max()
        assert float(relative) < 0.2  # the scale is told by running variances alone


def test_blind_norms_tell_no_scale(plain, digits):
    hidden = {"conv2.weight", "norm2.weight", "norm2.running_var"}
    found = aligned(attacked(plain, digits, [SignFlip(rate=1.0)]), plain, blind=hidden)
    assert torch.equal(found.weights["conv2.weight"], -plain.conv2.weight)
    assert torch.equal(found.weights["conv1.weight"], plain.conv1.weight)


def hide_the_mean(name, tensor):
    return tensor - tensor.mean(0) if name == "fc1.weight" else tensor


def test_a_map_hides_a_part_of_a_tensor(plain, digits):
    suspect = attacked(plain, digits, [Permute()])
    shifted, reference = copy.deepcopy(suspect), copy.deepcopy(plain)
    one = aligned(suspect, plain, blind=hide_the_mean)
    shifted.fc1.weight.data += 0.5
    reference.fc1.weight.data -= 0.25
    two = aligned(shifted, reference, blind=hide_the_mean)
    assert one.note == two.note
    assert torch.equal(one.weights["conv3.weight"], two.weights["conv3.weight"])
    assert worst(one, plain) == 0


def test_what_a_map_leaves_is_looked_at_where_nothing_else_tells_the_units_apart(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    suspect = attacked(model, digits, [Permute()])
    names = {"1.weight", "3.weight"}

    def centered(name, tensor):
        return tensor - tensor.mean() if name in names else tensor

    assert worst(aligned(suspect, model, blind=centered), model) == 0
    blinded = aligned(suspect, model, blind=names)
    assert (blinded.moved, blinded.units, blinded.agreement) == (0, 0, 0.0)


def test_a_file_is_aligned_as_a_model_is(plain, digits, tmp_path):
    suspect = attacked(plain, digits, OBFUSCATION)
    save_model(suspect, tmp_path / "suspect.safetensors")
    found = align(FileWeights(tmp_path / "suspect.safetensors"), plain)
    assert found.weights.digest() == aligned(suspect, plain).weights.digest()


def test_half_precision_comes_back_in_the_type_of_the_original(plain, digits):
    suspect = copy.deepcopy(attacked(plain, digits, SAME_FORM)).bfloat16()
    found = aligned(suspect, plain)
    assert found.weights["conv1.weight"].dtype == torch.float32
    assert in_place(found, plain) == 1.0


def test_tied_tensors_stay_tied(digits):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.wide, self.out = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.wide(self.embed(x)).relu() + self.embed(x))

    model = Tied().eval()
    suspect = attacked(model, digits, [Permute()])
    found = aligned(suspect, model)
    assert worst(found, model) == 0
    twin = found.model(model)
    assert twin.out.weight.data_ptr() == twin.embed.weight.data_ptr()


def test_damaged_weights_do_not_break_it(plain):
    suspect = copy.deepcopy(plain)
    suspect.conv2.weight.data.fill_(float("nan"))
    suspect.conv3.weight.data.zero_()
    assert aligned(suspect, plain).agreement < 0.9


def test_a_suspect_that_lacks_tensors_is_refused(plain):
    with pytest.raises(ModelMismatchError, match="lacks tensors"):
        aligned(nn.Linear(2, 2), plain)


def test_fewer_units_are_refused(plain):
    suspect = copy.deepcopy(plain)
    suspect.conv1.weight = nn.Parameter(suspect.conv1.weight[:8])
    with pytest.raises(ModelMismatchError, match=r"the units of layer 'conv1' cannot be aligned"):
        aligned(suspect, plain)


def test_more_units_that_nothing_tells_apart_are_refused():
    model, suspect = (nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10)) for n in (16, 20))
    with pytest.raises(ModelMismatchError, match="has another form"):
        aligned(suspect, model, blind={"1.weight", "3.weight"})


def test_another_number_of_dimensions_is_refused(plain):
    suspect = copy.deepcopy(plain)
    suspect.fc1.weight = nn.Parameter(suspect.fc1.weight.reshape(-1))
    with pytest.raises(ModelMismatchError):
        aligned(suspect, plain)


def test_other_outputs_are_refused(plain):
    suspect = copy.deepcopy(plain)
    suspect.fc2.bias = nn.Parameter(torch.zeros(11))
    with pytest.raises(ModelMismatchError, match=r"tensor 'fc2.bias' of the suspect has another form"):
        aligned(suspect, plain)


def test_blind_names_must_exist(plain):
    with pytest.raises(UnknownNameError, match="no such tensor"):
        aligned(plain, plain, blind={"conv9.weight"})
