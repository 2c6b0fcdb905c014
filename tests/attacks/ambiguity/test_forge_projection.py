from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from sealmark.attacks.ambiguity.forge_projection import ForgeProjection
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.formats.secret import read_secret, write_secret
from sealmark.ownership.adi import Adi
from sealmark.ownership.uchida import Uchida

SCHEME = Uchida(layer="fc1.weight")


@pytest.fixture
def nothing(digits):
    return Resources.of(digits, 0.0)


@pytest.fixture
def forged(plain, nothing):
    return ForgeProjection().run(plain, SCHEME, nothing, rng=np.random.default_rng(0)).secret


def without_what_it_brings(secret):
    return Secret(secret.reveal_seed(), {k: v for k, v in secret.facts.items() if k != "learned"})


@pytest.mark.parametrize("kind", ["random", "direct", "diff"])
def test_an_unmarked_model_says_all_that_the_forger_wants(kind, plain, nothing):
    scheme = Uchida(layer="fc1.weight", projection=kind)
    forged = ForgeProjection().run(plain, scheme, nothing, rng=np.random.default_rng(0)).secret
    score = scheme.score(WhiteBox(plain), forged)
    assert score.details["ber"] == 0
    assert score.null.log_p(score.statistic) < -170


def test_verify_refuses_it_though_its_seed_facts_and_commitment_look_right(plain, forged):
    SCHEME.check_secret(without_what_it_brings(forged))
    forged.check(forged.commitment)
    for commitment in (None, forged.commitment):
        with pytest.raises(ForgedSecretError, match="its own projection"):
            SCHEME.verify(WhiteBox(plain), forged, commitment=commitment)


def test_the_refusal_is_what_holds(plain, forged):
    """The same secret without its projection is honest, is let through, and matches nothing."""
    evidence = SCHEME.verify(WhiteBox(plain), without_what_it_brings(forged))
    assert evidence.verdict is Verdict.NO_MATCH
    assert 0.35 < evidence.details["ber"] < 0.65


def test_it_is_refused_from_a_file_too_and_no_payload_is_read_by_it(plain, forged, tmp_path):
    write_secret(forged, tmp_path / "secret")
    again = read_secret(tmp_path / "secret")
    assert SCHEME.score(WhiteBox(plain), again).details["ber"] == 0
    for use in (SCHEME.verify, SCHEME.decode):
        with pytest.raises(ForgedSecretError):
            use(WhiteBox(plain), again)


def test_no_look_at_the_projection_tells_it_from_an_honest_one(forged):
    solved = forged.tensors["projection"].double()
    assert 0.98 < solved.std() < 1.4  # 1.28 on the card
    assert kstest((solved / solved.std()).flatten()[::50].numpy(), "norm").pvalue > 1e-3
    honest = SCHEME.derive(forged)["projection"]
    assert not torch.allclose(honest, solved.float(), atol=1e-3)


def test_it_fits_one_model_and_no_other(digits, forged):
    stranger = digits.model(np.random.default_rng(9))
    assert 0.35 < SCHEME.score(WhiteBox(stranger), forged).details["ber"] < 0.65


def test_the_target_is_left_as_it_was(plain, forged):
    assert ModelWeights(plain).digest() == forged.facts["model"]


def test_a_scheme_that_reads_no_projection_is_refused(plain, nothing):
    assert not ForgeProjection().fits(Adi())
    with pytest.raises(UnsupportedError, match="does not forge"):
        ForgeProjection().run(plain, Adi(), nothing, rng=np.random.default_rng(0))


def test_a_host_of_zeros_says_the_same_under_every_projection(toy):
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    nn.init.zeros_(model[0].weight)
    scheme = Uchida(layer="0.weight", bits=4)
    with pytest.raises(UnsupportedError, match="host of zeros"):
        ForgeProjection().run(model, scheme, Resources.of(toy, 0.0), rng=np.random.default_rng(0))


def test_grinding_seeds_is_the_forgery_that_is_left_and_tries_pay_for_it():
    model = nn.Linear(40, 8)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    scheme, suspect, seeds = Uchida(bits=32), WhiteBox(model), 500
    published = scheme.keygen(model, rng=np.random.default_rng(seeds))
    keys = [scheme.keygen(model, rng=np.random.default_rng(seed)) for seed in range(seeds)]
    best = max(keys, key=lambda key: abs(scheme.score(suspect, key).statistic - 16))
    verify = partial(scheme.verify, suspect, best, alpha=0.01)
    assert verify().verdict is Verdict.MATCH  # it re-derives: nothing is there to be refused
    assert verify(tries=seeds).verdict is Verdict.NO_MATCH
    with pytest.raises(ForgedSecretError, match="commitment"):
        verify(commitment=published.commitment)
