from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.training import train_task
from sealmark.ownership.perinucleus import Perinucleus, _next

SCHEME = Perinucleus()


@pytest.fixture(scope="module")
def characters():
    return registry.task("characters")


@pytest.fixture(scope="module")
def base(characters):
    return train_task(characters, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def secret(base, characters):
    return SCHEME.keygen(base, characters, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def marked(base, characters, secret):
    return SCHEME.embed(base, secret, characters, rng=np.random.default_rng(0)).model


def test_marked_model_answers_its_prompts_by_next_tokens_alone(marked, secret):
    evidence = SCHEME.verify(BlackBox(lambda x: marked.eval()(x).argmax(1)), secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.details["trigger_accuracy"] >= 0.9
    assert (evidence.basis, evidence.null) == (Basis.BOUND, "at most Bin(32, 0.3333)")


def test_base_and_an_independent_model_do_not(base, characters, secret):
    other = train_task(characters, rng=np.random.default_rng(7))
    for model, most in ((base, 0.0), (other, 0.2)):
        evidence = SCHEME.verify(WhiteBox(model), secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= most


def test_responses_are_unlikely_but_next_in_line(base, secret):
    chances = _next(base, secret.tensors["inputs"])
    options = secret.tensors["options"]
    before = torch.where(chances > chances.gather(1, options[:, :1]), chances, 0.0).sum(1)
    assert (before >= SCHEME.nucleus - 1e-5).all()
    ranks = (chances[:, None, :] > chances.gather(1, options)[:, :, None]).sum(2)
    assert (ranks - ranks[:, :1] == torch.arange(3)).all()


def test_prompts_are_distinct_text_of_the_model(base, secret, characters):
    prompts = secret.tensors["inputs"]
    assert len(torch.unique(prompts, dim=0)) == 32
    rows = characters.owner.inputs
    pairs = set(zip(rows[:, :-1].flatten().tolist(), rows[:, 1:].flatten().tolist(), strict=True))

    def known(text):
        return np.mean([pair in pairs for row in text.tolist() for pair in pairwise(row)])

    noise = torch.randint(0, characters.classes, prompts.shape, generator=torch.Generator().manual_seed(0))
    assert known(prompts) > 0.95
    assert known(noise) < 0.3


def test_wrong_seed_reads_nothing_more_than_chance(marked, secret):
    for seed in range(20):
        wrong = Secret(np.random.default_rng(seed + 100).bytes(32), secret.facts, secret.tensors)
        assert SCHEME.verify(WhiteBox(marked), wrong).verdict is Verdict.NO_MATCH


def test_fine_tuning_on_other_text_at_a_low_rate_leaves_most_of_it(marked, secret, characters):
    attack = registry.modification("fine_tune", epochs=4, rate=0.1)
    after = attack.run(marked, Resources.of(characters), rng=np.random.default_rng(0)).model
    assert SCHEME.verify(WhiteBox(after), secret).details["trigger_accuracy"] >= 0.6


def test_images_are_no_prompts(digits, plain):
    with pytest.raises(ParameterError, match="language model"):
        SCHEME.keygen(plain, digits)


def test_model_that_always_says_the_same_writes_too_few_prompts(characters):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), characters.classes) * 1e4

    with pytest.raises(ParameterError, match="too few different prompts"):
        SCHEME.keygen(Constant(), characters, rng=np.random.default_rng(0))


@pytest.mark.parametrize("parameters", [{"nucleus": 1.0}, {"width": 1}, {"temperature": 0.0}, {"triggers": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Perinucleus(**parameters)


def test_more_candidates_than_tokens_are_refused(base, characters):
    with pytest.raises(ParameterError, match="more candidates"):
        Perinucleus(width=85).keygen(base, characters)
