from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.attacks.ambiguity.false_claim import FalseClaim
from sealmark.blackbox.inputs import unpack
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import WhiteBox
from sealmark.core.training import train_task
from sealmark.ownership.adi import Adi
from sealmark.ownership.hash_chain import HashChain
from sealmark.stats.nulls import Binomial

ATTACK = FalseClaim()


@pytest.fixture(scope="module")
def innocents(digits, plain):
    """Models of the owner's rows, which no accomplice has seen."""
    return [plain, *(train_task(digits, rng=np.random.default_rng(50 + seed)) for seed in range(2))]


@pytest.fixture(scope="module")
def forged(digits, plain):
    return ATTACK.run(plain, Adi(), Resources.of(digits), rng=np.random.default_rng(0))


def test_papers_rule_convicts_every_innocent_model(forged, innocents):
    for model in innocents:
        score = Adi().score(WhiteBox(model), forged.secret)
        assert score.details["trigger_accuracy"] >= 0.85
        assert score.null.log_p(score.statistic) < np.log(1e-15)  # "random labels, committed before": no help
    assert forged.cost.rows == 400


def test_forgery_does_not_re_derive_and_is_refused(forged, innocents):
    for model in innocents:
        with pytest.raises(ForgedSecretError):
            Adi().verify(WhiteBox(model), forged.secret, commitment=forged.secret.commitment)


def test_same_inputs_committed_before_the_seed_convict_nobody(digits, innocents):
    claimed = ATTACK.claim(Adi(), Resources.of(digits), np.random.default_rng(0))
    Adi().check_secret(claimed, claimed.commitment)
    for model in innocents:
        evidence = Adi().verify(WhiteBox(model), claimed)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= 0.4


def test_trying_seeds_is_paid_for(digits, plain):
    """The crafted inputs with 300 seeds: the best reaches what 300 tries reach by chance, and no more."""
    claimed = ATTACK.claim(Adi(), Resources.of(digits), np.random.default_rng(0))
    answers = WhiteBox(plain).labels(unpack(claimed.tensors["inputs"], claimed.host))
    best = max(
        int((answers == torch.from_numpy(np.random.default_rng(seed).integers(0, 10, 30))).sum())
        for seed in range(300)
    )
    assert Binomial(30, 0.1).log_p(best) + np.log(300) > np.log(0.01)


def test_nothing_on_a_hash_chain_can_be_chosen(digits, innocents):
    scheme = HashChain()
    claimed = ATTACK.claim(scheme, Resources.of(digits), np.random.default_rng(0))
    assert not claimed.tensors
    assert all(scheme.verify(WhiteBox(model), claimed).verdict is Verdict.NO_MATCH for model in innocents)


def test_small_changes_transfer_less(digits, plain, forged):
    weak = FalseClaim(radius=0.05).run(plain, Adi(), Resources.of(digits), rng=np.random.default_rng(0)).secret
    rates = [Adi().score(WhiteBox(plain), s).details["trigger_accuracy"] for s in (weak, forged.secret)]
    assert rates[0] < 0.3 < rates[1]


def test_schemes_that_read_weights_and_inputs_without_gradient_are_refused(digits, plain):
    tokens = registry.task("tokens")
    with pytest.raises(UnsupportedError):
        ATTACK.run(plain, registry.scheme("uchida"), Resources.of(digits), rng=np.random.default_rng(0))
    with pytest.raises(UnsupportedError):
        ATTACK.claim(registry.scheme("uchida"), Resources.of(digits), np.random.default_rng(0))
    with pytest.raises(UnsupportedError, match="gradient"):
        FalseClaim(epochs=1).run(plain, Adi(), Resources.of(tokens), rng=np.random.default_rng(0))


@pytest.mark.parametrize("parameters", [{"models": 1}, {"radius": 0.0}, {"radius": 2.0}, {"steps": 0}])
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        FalseClaim(**parameters)
