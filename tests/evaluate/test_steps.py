"""The steps that demo and figures share."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.errors import AccessError, FormatError, ParameterError
from sealmark.core.lock import Lock
from sealmark.core.suspect import Access, BlackBox, WhiteBox
from sealmark.core.task import Task
from sealmark.core.weights import save_model, weights_of
from sealmark.evaluate.steps import (
    attack_figures,
    flip_bit,
    generator,
    lock_figures,
    new_marks,
    owner_recipe,
    refuses,
    same_bits,
    sealed_figures,
    verify,
    view,
)


def test_the_randomness_of_a_step_depends_on_seed_and_step_alone() -> None:
    draws = [generator(*key).integers(2**62) for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_the_owner_trains_longer_and_clips(digits: Task) -> None:
    recipe = owner_recipe(digits, 20)
    assert (recipe.epochs, recipe.clip, recipe.rate) == (20, 1.0, digits.recipe.rate)


def test_the_same_seed_gives_the_same_secrets_and_another_seed_others(digits: Task, plain: nn.Module) -> None:
    secrets = [new_marks(("uchida", "adi"), plain, digits, seed) for seed in (0, 0, 1)]
    commitments = [{name: secret.commitment for name, (_, secret) in marks.items()} for marks in secrets]
    assert commitments[0] == commitments[1]
    assert not set(commitments[0].values()) & set(commitments[2].values())


def test_an_unmarked_model_matches_no_fresh_secret(digits: Task, plain: nn.Module) -> None:
    found = verify(new_marks(("uchida", "adi"), plain, digits, 0), plain)
    assert [evidence.verdict for evidence in found.values()] == ["NO_MATCH", "NO_MATCH"]


def test_a_scheme_that_needs_labels_sees_labels_alone(plain: nn.Module) -> None:
    suspect = view(Access.LABELS, plain)
    assert isinstance(suspect, BlackBox)
    with pytest.raises(AccessError):
        _ = suspect.weights
    assert isinstance(view(Access.WEIGHTS, plain), WhiteBox)


def test_a_flipped_bit_is_one_bit_in_the_tensor_that_is_named(plain: nn.Module) -> None:
    changed, name = flip_bit(plain, np.random.default_rng(3))
    before, after = weights_of(plain), weights_of(changed)
    assert [
        k
        for k in before
        if not torch.equal(before[k].view(-1).view(torch.uint8), after[k].view(-1).view(torch.uint8))
    ] == [name]
    bits = np.bitwise_xor(*(w[name].numpy().reshape(-1).view(np.uint8) for w in (before, after)))
    assert int(np.unpackbits(bits).sum()) == 1
    assert same_bits(plain, plain)
    assert not same_bits(plain, changed)


def test_a_neural_lock_opens_for_its_key_and_is_measured_with_others(digits: Task, plain: nn.Module) -> None:
    found = lock_figures(cast("Lock", registry.scheme("chaotic_weights")), plain, digits, 0, wrong=3)
    assert found.exact
    assert found.authorized == digits.score(plain)
    assert found.no_key is not None
    assert found.no_key < 0.3
    assert (len(found.wrong_keys), found.refused) == (3, 0)


def test_a_lock_that_refuses_has_no_accuracy_without_its_key(digits: Task, plain: nn.Module) -> None:
    found = lock_figures(cast("Lock", registry.scheme("sealed")), plain, digits, 0, wrong=2)
    assert found.exact
    assert found.no_key is None
    assert (found.wrong_keys, found.refused) == ((), 2)


def test_a_sealed_file_refuses_everything_but_its_key_and_leaves_no_scrap(plain: nn.Module, tmp_path: Path) -> None:
    source, sealed = tmp_path / "a.safetensors", tmp_path / "a.sealed"
    save_model(plain, source)
    found, _ = sealed_figures(cast("Lock", registry.scheme("sealed")), source, sealed, 0, keys=2, flips=5)
    assert found.exact
    assert (found.keys_refused, found.flips_refused) == (2, 5)
    assert found.overhead == sealed.stat().st_size - source.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.sealed"]


def test_an_attack_is_reported_beside_the_attacker_without_the_model(digits: Task, plain: nn.Module) -> None:
    accuracy = digits.score(plain)
    found = attack_figures(registry.modification("prune", rate=0.0), plain, digits, accuracy, 0)
    assert found.accuracy == accuracy
    assert found.scratch < 0.3
    assert found.gain == pytest.approx(1.0)


def test_an_attacker_has_the_share_of_rows_that_he_was_given(digits: Task, plain: nn.Module) -> None:
    attack = registry.modification("fine_tune", epochs=1)
    found = attack_figures(attack, [plain], digits, digits.score(plain), 0, share=0.1)
    assert found.cost.rows == 40


def test_only_the_expected_refusal_counts() -> None:
    def fail() -> None:
        raise FormatError("bad")

    assert refuses(fail, FormatError)
    assert not refuses(lambda: None, FormatError)
    with pytest.raises(FormatError):
        refuses(fail, ParameterError)
