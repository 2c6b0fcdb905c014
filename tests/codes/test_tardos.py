"""Tardos codes: the laws of the biases, what coalitions can do, and that nobody innocent is accused."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from sealmark.codes.biases import arcsine, code_length, draw_biases, nuida
from sealmark.codes.tardos import TardosCode
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.stats.calibration import super_uniformity

ALPHA = 1e-6
USERS = 10_000
GOLDEN = "feb6af32df39ebd55da271544ecd714c84c334cd9b5187dd822b5f1e15e684b1"  # SHA-256 of a word

# Nuida et al., DCC 52, 2009: biases up to 1/2 and their chances; the rest is symmetric
TABLE = {
    1: ([0.5], [1.0]),
    2: ([0.5], [1.0]),
    3: ([0.21132], [0.5]),
    4: ([0.21132], [0.5]),
    5: ([0.11270, 0.5], [0.33201, 0.33597]),
    6: ([0.11270, 0.5], [0.33201, 0.33597]),
    7: ([0.06943, 0.33001], [0.24833, 0.25167]),
    8: ([0.06943, 0.33001], [0.24833, 0.25167]),
}


def secret_of(number: int) -> Secret:
    return Secret(number.to_bytes(32, "big"), {"scheme": "test"})


def majority(ones, size, rng):
    return np.sign(2 * ones - size + rng.uniform(-0.5, 0.5, len(ones)))


def minority(ones, size, rng):
    """Against the majority wherever the copies differ."""
    agreed = np.where(ones == 0, -1, 1)
    return np.where((ones == 0) | (ones == size), agreed, -majority(ones, size, rng))


def interleaving(ones, size, rng):
    return np.where(rng.uniform(size=len(ones)) < ones / size, 1, -1)


def all_ones(ones, size, rng):
    return np.where(ones > 0, 1, -1)


def coin_flip(ones, size, rng):
    coins = rng.choice([-1, 1], len(ones))
    return np.where(ones == 0, -1, np.where(ones == size, 1, coins))


def average(ones, size, rng):
    return 2 * ones / size - 1


STRATEGIES = [majority, minority, interleaving, all_ones, coin_flip, average]


def pirate(code, colluders, strategy, rng):
    ones = code.words(colluders).astype(np.int64).sum(0)
    return strategy(ones, len(colluders), rng).astype(np.float64)


def log_p(code, users, symbols):
    """Of each user, corrected for ten thousand."""
    null = code.null(symbols)
    return [null.log_p(score) + math.log(USERS) for score in code.scores(users, symbols)]


@pytest.mark.parametrize("colluders", TABLE)
def test_biases_are_those_of_the_published_table(colluders):
    biases, chances = nuida(colluders)
    half = len(TABLE[colluders][0])
    np.testing.assert_allclose(biases[:half], TABLE[colluders][0], atol=6e-6)
    np.testing.assert_allclose(chances[:half], TABLE[colluders][1], atol=6e-6)
    np.testing.assert_allclose(biases + biases[::-1], 1)
    assert chances.sum() == pytest.approx(1)


def test_drawn_biases_follow_their_law():
    biases = draw_biases(secret_of(0).stream("biases"), 60_000, 5)
    points, counts = np.unique(biases, return_counts=True)
    np.testing.assert_allclose(points, nuida(5)[0], atol=2**-32)
    np.testing.assert_allclose(counts / 60_000, nuida(5)[1], atol=0.01)


def test_arcsine_law_has_its_quartiles_and_its_cutoff():
    biases = arcsine(20, np.linspace(0, 1, 100_001))
    assert biases.min() == pytest.approx(1 / 6000)
    assert biases.max() == pytest.approx(1 - 1 / 6000)
    # without a cutoff the quartiles of the arcsine law are (2 -+ sqrt 2) / 4
    np.testing.assert_allclose(np.quantile(biases, [0.25, 0.75]), [0.146447, 0.853553], atol=0.01)


def test_more_than_ten_colluders_get_the_arcsine_law():
    assert len(np.unique(draw_biases(secret_of(0).stream("biases"), 500, 10))) == 5
    assert len(np.unique(draw_biases(secret_of(0).stream("biases"), 500, 11))) == 500


@pytest.mark.parametrize(
    ("users", "colluders", "length"), [(10**4, 2, 319), (10**6, 3, 921), (10**4, 5, 1989), (10**6, 20, 40907)]
)
def test_code_length_is_that_of_laarhoven_and_de_weger(users, colluders, length):
    assert code_length(users, colluders, 1e-3) == length


def test_words_are_the_same_in_every_process_and_version():
    code = TardosCode(secret_of(7), 1024, 3)
    assert hashlib.sha256(code.word("alice").tobytes()).hexdigest() == GOLDEN
    program = (
        "import hashlib; from sealmark.codes.tardos import TardosCode; from sealmark.core.secret import Secret;"
        "s = Secret((7).to_bytes(32, 'big'), {'scheme': 'test'});"
        "print(hashlib.sha256(TardosCode(s, 1024, 3).word('alice').tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == GOLDEN


def test_ten_thousand_words_are_distinct_and_as_far_apart_as_chance_has_it():
    code = TardosCode(secret_of(0), 1024, 3)
    words = code.words([f"user{i}" for i in range(USERS)])
    assert len(np.unique(np.packbits(words, axis=1), axis=0)) == USERS
    expected = float((2 * code.biases * (1 - code.biases)).sum())
    assert (words[::2] != words[1::2]).sum(1).mean() == pytest.approx(expected, rel=0.01)


def test_words_depend_on_secret_and_user():
    code, other = TardosCode(secret_of(0), 1024, 3), TardosCode(secret_of(1), 1024, 3)
    assert not np.array_equal(code.word("alice"), code.word("bob"))
    assert not np.array_equal(code.word("alice"), other.word("alice"))


def test_scores_are_those_of_the_symmetric_score_written_out():
    code = TardosCode(secret_of(0), 64, 5)
    symbols = np.random.default_rng(0).uniform(-1, 1, 64)
    expected = []
    for user in ("a", "b", "c"):
        total = 0.0
        for y, x, p in zip(symbols, code.word(user), code.biases, strict=True):
            total += y * math.sqrt((1 - p) / p) if x else -y * math.sqrt(p / (1 - p))
        expected.append(total / math.sqrt(sum(symbols**2)))
    np.testing.assert_allclose(code.scores(["a", "b", "c"], symbols), expected)


def test_innocents_have_mean_0_and_variance_1():
    code = TardosCode(secret_of(0), 512, 5)
    symbols = pirate(code, ["p", "q", "r"], interleaving, np.random.default_rng(0))
    scores = code.scores([f"user{i}" for i in range(USERS)], symbols)
    assert abs(scores.mean()) < 0.04
    assert scores.var() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.__name__)
def test_three_colluders_lose_a_member(strategy):
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(3), 1024, 3)
    for trial in range(40):
        colluders = [f"pirate{trial}-{i}" for i in range(3)]
        caught += min(log_p(code, colluders, pirate(code, colluders, strategy, rng))) <= math.log(ALPHA)
    assert caught >= 38


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.__name__)
def test_no_innocent_is_accused_whatever_the_size_of_the_coalition(strategy, size):
    rng = np.random.default_rng(size)
    code = TardosCode(secret_of(4), 1024, 3)
    symbols = pirate(code, [f"pirate{i}" for i in range(size)], strategy, rng)
    scores = code.scores([f"user{i}" for i in range(USERS)], symbols)
    assert code.null(symbols).log_p(scores.max()) + math.log(USERS) > math.log(ALPHA)


def test_six_colluders_are_too_many_for_a_code_for_three():
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(3), 1024, 3)
    for trial in range(10):
        colluders = [f"pirate{trial}-{i}" for i in range(6)]
        caught += min(log_p(code, colluders, pirate(code, colluders, minority, rng))) <= math.log(ALPHA)
    assert caught <= 2


@pytest.mark.parametrize("colluders", [3, 20])
def test_p_values_of_innocents_hold_for_soft_symbols_and_erasures(colluders):
    rng = np.random.default_rng(0)
    code = TardosCode(secret_of(5), 512, colluders)
    symbols = pirate(code, ["p", "q"], average, rng) * rng.uniform(0, 1, 512) * (rng.uniform(size=512) < 0.7)
    null = code.null(symbols)
    scores = code.scores([f"user{i}" for i in range(400)], symbols)
    assert super_uniformity(np.exp([null.log_p(score) for score in scores])) > 1e-3


def test_p_values_of_colluders_do_not_hold():
    code = TardosCode(secret_of(5), 512, 3)
    users = [f"user{i}" for i in range(12)]
    symbols = pirate(code, users, average, np.random.default_rng(0))
    null = code.null(symbols)
    assert super_uniformity(np.exp([null.log_p(score) for score in code.scores(users, symbols)])) < 1e-3


def test_a_fifth_of_the_symbols_wrong_still_names_a_single_user():
    rng = np.random.default_rng(0)
    code = TardosCode(secret_of(6), 1024, 3)
    symbols = (2.0 * code.word("alice") - 1) * np.where(rng.uniform(size=1024) < 0.2, -1, 1)
    assert log_p(code, ["alice"], symbols)[0] < math.log(ALPHA)


def test_soft_symbols_tell_more_than_their_signs():
    rng = np.random.default_rng(0)
    code = TardosCode(secret_of(6), 1024, 3)
    soft = (2.0 * code.word("alice") - 1) + rng.normal(0, 4, 1024)
    assert log_p(code, ["alice"], soft)[0] < log_p(code, ["alice"], np.sign(soft))[0]


def test_nothing_read_is_nothing_known():
    code = TardosCode(secret_of(0), 64, 3)
    nothing = np.zeros(64)
    assert code.scores(["alice"], nothing).tolist() == [0.0]
    assert code.null(nothing).log_p(0.0) == code.null(nothing).floor == 0.0


def test_memory_does_not_grow_with_the_users():
    code = TardosCode(secret_of(0), 1024, 3)
    symbols = 2.0 * code.word("user77") - 1
    users = [f"user{i}" for i in range(20_000)]
    tracemalloc.start()
    scores = code.scores(users, symbols)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores.argmax() == 77
    assert peak < 2 * 2048 * 1024 * 8 + len(users) * 64


def test_scores_do_not_depend_on_who_else_is_looked_at():
    code = TardosCode(secret_of(0), 256, 3)
    symbols = 2.0 * code.word("user1") - 1
    users = [f"user{i}" for i in range(2100)]
    assert code.scores(users, symbols)[2090] == pytest.approx(code.scores([users[2090]], symbols)[0], rel=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: TardosCode(secret_of(0), 0, 3),
        lambda: TardosCode(secret_of(0), 64, 0),
        lambda: TardosCode(secret_of(0), 64, 3).scores(["a"], np.zeros(63)),
        lambda: TardosCode(secret_of(0), 64, 3).null(np.full(64, np.nan)),
        lambda: nuida(0),
        lambda: code_length(0, 3, 1e-3),
        lambda: code_length(10, 3, 1.0),
    ],
)
def test_bad_demands_are_refused(call):
    with pytest.raises(ParameterError):
        call()
