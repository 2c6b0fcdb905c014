"""Framing: guesses accuse nobody innocent, whatever is known but the secret; the secret itself frames at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.nn import functional

from sealmark.attacks.ambiguity.framing import Framing
from sealmark.codes.tardos import TardosCode
from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.identity.spread_spectrum import SpreadSpectrum

SCHEME = SpreadSpectrum()
USERS = [f"user{number}" for number in range(500)]
INNOCENTS = [f"innocent{number}" for number in range(2000)]
ALPHA = 0.01


@pytest.fixture(scope="module")
def secret(plain):
    return SCHEME.enroll(plain, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def copies(plain, secret):
    return [SCHEME.issue(plain, secret, user).model for user in USERS[:3]]


def accused(model, secret, plain, users=USERS):
    return {entry.user for entry in SCHEME.trace(WhiteBox(model), secret, users, original=plain).accused}


@pytest.mark.parametrize("reach", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(2))
def test_guesses_accuse_nobody_innocent_and_leave_the_model_usable(reach, seed, digits, plain, secret, copies):
    made = Framing(reach).run(copies, Resources.of(digits), rng=np.random.default_rng(seed)).model
    assert accused(made, secret, plain) <= set(USERS[:3])
    assert digits.score(made) >= digits.score(plain) - 0.02


def test_of_more_tries_the_one_kept_has_less_of_the_colluders_own(toy):
    models = [nn.Linear(100, 1, bias=False) for _ in range(3)]
    for number, model in enumerate(models):
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(number))
    own = torch.cat([model.weight.detach() for model in models])
    own = own - own.mean(0)

    def recognized(tries, seed):
        made = Framing(tries=tries).run(models, Resources.of(toy), rng=np.random.default_rng(seed)).model
        change = made.weight.detach()[0] - torch.cat([model.weight for model in models]).detach().mean(0)
        return float(functional.cosine_similarity(own, change[None]).abs().max())

    few, many = (np.mean([recognized(tries, seed) for seed in range(10)]) for tries in (1, 32))
    assert many < few / 2


@pytest.mark.parametrize("reach", [0.0, 2.0])
def test_weights_go_beyond_the_copies_as_far_as_asked_for(reach, toy, rng):
    models = [nn.Linear(2000, 1, bias=False) for _ in range(2)]
    models[0].weight.data.fill_(0.0)
    models[1].weight.data.fill_(1.0)
    made = Framing(reach).run(models, Resources.of(toy), rng=rng).model.weight
    assert -reach <= made.min() <= -0.9 * reach
    assert 1 + 0.9 * reach <= made.max() <= 1 + reach


def guesses(code, rng):
    """What three colluders can show: their words mixed or exceeded; with the biases known; and anything else."""
    words, places = 2.0 * code.words(USERS[:3]) - 1, np.arange(code.length)
    mixed = words[rng.integers(0, 3, code.length), places]
    likely = np.where(code.biases > 0.5, 1.0, -1.0)
    skewed = abs(code.biases - 0.5) == abs(code.biases - 0.5).max()
    return [
        mixed,
        mixed + rng.uniform(-3, 3, code.length) * np.ptp(words, 0),
        np.where(rng.random(code.length) < code.biases, 1.0, -1.0),  # a user as likely as any
        -likely * skewed,  # where a user who has the rarer symbol counts most
        rng.standard_cauchy(code.length),
    ]


def test_of_two_thousand_innocents_and_two_hundred_guesses_no_more_are_accused_than_alpha_says():
    """Also where the coalition knows the biases: an innocent's word is drawn for his name, from the secret."""
    rng, framed, made = np.random.default_rng(0), 0, 0
    for number in range(10):
        code = TardosCode(Secret(rng.bytes(32), {"number": number}), 512, 5)
        words = code.words(INNOCENTS)
        high, low = np.sqrt((1 - code.biases) / code.biases), -np.sqrt(code.biases / (1 - code.biases))
        terms = words * high + (1 - words) * low
        for guess in [guess for _ in range(4) for guess in guesses(code, rng)]:
            best = (terms @ guess).max() / np.linalg.norm(guess)
            framed += code.null(guess).log_p(best) + np.log(len(INNOCENTS)) <= np.log(ALPHA)
            made += 1
    assert made == 200
    assert framed <= binom.ppf(0.999, made, ALPHA)


def test_control_whoever_has_the_secret_frames_at_once(plain, secret, copies):
    """The owner himself, or a thief of the seed: a commitment of each word at issue time is what answers it."""
    framed = SCHEME.issue(plain, secret, "user77").model
    assert accused(framed, secret, plain) == {"user77"}
    stolen = Secret(secret.reveal_seed(), secret.facts)
    assert accused(SCHEME.issue(plain, stolen, "user78").model, secret, plain) == {"user78"}
    wrong = Secret(bytes(32), secret.facts)
    assert accused(SCHEME.issue(plain, wrong, "user78").model, secret, plain) == set()


def test_known_break_a_stolen_copy_accuses_its_user(digits, plain, secret, copies, rng):
    victim = SCHEME.issue(plain, secret, "user77").model
    made = Framing().run([copies[0], victim], Resources.of(digits), rng=rng).model
    assert "user77" in accused(made, secret, plain)


def test_known_break_a_trace_that_answers_anybody_tells_a_victims_word():
    """One question a position: so scores are for the owner's eyes, and the service shows verdicts alone."""
    code = TardosCode(Secret(bytes(32), {}), 256, 3)
    told = [code.scores(["victim"], question)[0] for question in np.eye(code.length)]
    word = np.sign(told)
    assert np.array_equal(word, 2.0 * code.word("victim") - 1)
    assert code.null(word).log_p(code.scores(["victim"], word)[0]) < -50


@pytest.mark.parametrize("bad", [{"reach": -1.0}, {"reach": float("nan")}, {"reach": float("inf")}, {"tries": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters"):
        Framing(**bad)
