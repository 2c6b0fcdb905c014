from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from sealmark.attacks.removal.overwrite import Overwrite
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.embedding import Embedding
from sealmark.core.errors import MarkFailedError, ParameterError, UnknownNameError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.ownership.uchida import Uchida

OWNER = Uchida(layer="fc1.weight")
SAME = Overwrite(settings={"layer": "fc1.weight"}, epochs=20, rate=0.05)
STRONGER = dataclasses.replace(SAME, settings={"layer": "fc1.weight", "strength": 0.2})


@pytest.fixture(scope="module")
def owned(digits):
    """The owner's secret, and a model that carries it."""
    rng = np.random.default_rng(0)
    start = digits.model(rng)
    marked = OWNER.embed(start, OWNER.keygen(start, rng=rng), digits, rng=rng)
    return marked.secret, marked.model


@pytest.fixture(scope="module")
def rows(digits):
    return Resources.of(digits)


@pytest.fixture(scope="module")
def overwritten(owned, rows):
    """For each attack the model and the thief's own secret."""
    made = {}
    for attack in (SAME, STRONGER):
        marked, _ = attack.embed(copy.deepcopy(owned[1]), rows, np.random.default_rng(3))
        made[attack] = (marked.secret, marked.model)
    return made


@pytest.mark.parametrize("attack", [SAME, STRONGER], ids=["same strength", "ten times"])
def test_both_marks_are_valid_afterwards_so_that_the_earlier_commitment_decides(attack, owned, overwritten, digits):
    secret, model = owned
    stolen, surrogate = overwritten[attack]
    thief = registry.scheme_of(stolen)
    assert thief.verify(WhiteBox(surrogate), stolen).verdict is Verdict.MATCH
    assert OWNER.verify(WhiteBox(surrogate), secret).verdict is Verdict.MATCH
    assert thief.verify(WhiteBox(model), stolen).verdict is Verdict.NO_MATCH  # the owner's copy lacks the thief's
    assert digits.score(surrogate) > digits.score(model) - 0.02


def test_the_mark_wears_off_with_the_strength_of_the_other(owned, overwritten):
    secret, _ = owned
    bers = [OWNER.verify(WhiteBox(overwritten[a][1]), secret).details["ber"] for a in (SAME, STRONGER)]
    assert bers[0] < bers[1]


def test_known_break_a_stronger_mark_displaces_a_covert_one(digits, rows):
    """The hinge stops at its margin, so ten times its strength outweighs it; the paper's own loss holds out."""
    settings = {"layer": "conv3.weight", "bits": 64, "objective": "hinge"}
    covert, rng = Uchida(**settings), np.random.default_rng(0)
    start = digits.model(rng)
    marked = covert.embed(start, covert.keygen(start, rng=np.random.default_rng(1)), digits, rng=rng)
    assert covert.verify(WhiteBox(marked.model), marked.secret).verdict is Verdict.MATCH
    attack = Overwrite(settings={**settings, "strength": 0.2}, epochs=20, rate=0.05)
    surrogate = attack.run(marked.model, rows, rng=np.random.default_rng(2)).model
    assert covert.verify(WhiteBox(surrogate), marked.secret).verdict is Verdict.NO_MATCH
    assert digits.score(surrogate) > digits.score(marked.model) - 0.01


def test_the_surrogate_of_run_is_that_of_embed(owned, rows, overwritten):
    result = SAME.run(owned[1], rows, rng=np.random.default_rng(3))
    assert ModelWeights(result.model).digest() == ModelWeights(overwritten[SAME][1]).digest()
    assert (result.cost.rows, result.cost.rows_seen) == (400, 8000)
    assert not result.model.training


def test_the_thiefs_secret_is_his_own(owned, overwritten):
    (_, model), (stolen, _) = owned, overwritten[SAME]
    assert stolen != owned[0]
    assert OWNER.score(WhiteBox(model), stolen).details["ber"] > 0.35


def test_a_mark_that_does_not_take_leaves_the_model_as_far_as_he_got(owned, rows):
    weak = Overwrite(settings={"layer": "fc1.weight", "strength": 1e-6}, epochs=1)
    marked, _ = weak.embed(copy.deepcopy(owned[1]), rows, np.random.default_rng(0))
    thief = registry.scheme_of(marked.secret)
    with pytest.raises(MarkFailedError):
        thief.check_embedded(marked.model, marked.secret)
    assert ModelWeights(marked.model).digest() != ModelWeights(owned[1]).digest()


class Refusing(Embedding):
    def finish(self, model):
        raise MarkFailedError("nothing was learned")


def test_a_scheme_that_gives_up_at_the_end_leaves_the_model_as_far_as_he_got(owned, rows, monkeypatch):
    monkeypatch.setattr(Uchida, "embedding", lambda self, model, secret, task, rng: Refusing(self, secret))
    result = Overwrite(epochs=1).run(owned[1], rows, rng=np.random.default_rng(0))
    assert ModelWeights(result.model).digest() != ModelWeights(owned[1]).digest()


def test_another_kind_of_mark_can_be_written_over_it(owned, rows):
    result = Overwrite(scheme="adi", epochs=1).run(owned[1], rows, rng=np.random.default_rng(0))
    assert OWNER.verify(WhiteBox(result.model), owned[0]).details["ber"] == 0


def test_momentum_counts(owned, rows):
    slow, fast = (
        Overwrite(epochs=1, momentum=momentum).run(owned[1], rows, rng=np.random.default_rng(0)).model
        for momentum in (0.0, 0.9)
    )
    assert not torch.equal(slow.fc2.weight, fast.fc2.weight)


def test_scratch_learns_from_the_same_rows_alone(digits, rows):
    assert 0.85 < digits.score(Overwrite(epochs=30).scratch(rows, np.random.default_rng(0))) < 0.985


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (Overwrite(scheme="reversible"), UnsupportedError),
        (Overwrite(scheme="nonsense"), UnknownNameError),
        (Overwrite(settings={"depth": 3}), ParameterError),
        (Overwrite(settings={"layer": "fc9.weight"}), UnknownNameError),
    ],
    ids=["no watermark", "no scheme", "no setting", "no layer"],
)
def test_a_mark_that_cannot_be_made_is_refused(attack, error, owned, rows):
    with pytest.raises(error):
        attack.run(owned[1], rows, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    "parameters",
    [{"epochs": 0}, {"rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"settings": ("strength", 2)}],
)
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ParameterError, match="bad parameters of overwrite"):
        Overwrite(**parameters)


def test_settings_come_from_the_command_line_as_text():
    made = registry.modification("overwrite", settings="{'layer': 'fc1.weight', 'bits': 64}", epochs="2")
    assert made == Overwrite(settings={"layer": "fc1.weight", "bits": 64}, epochs=2)


def test_equal_attacks_have_one_hash():
    one, other = ({"bits": 64, "layer": "a"}, {"layer": "a", "bits": 64})
    assert len({Overwrite(settings=one), Overwrite(settings=other), Overwrite(), Overwrite(epochs=9)}) == 3
