"""Tardos codes: the laws of the biases, what coalitions can do, and that nobody innocent is accused."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm

from sealmark.codes.biases import arcsine, code_length, draw_biases, nuida
from sealmark.codes.coalitions import STRATEGIES, average, interleaving, minority, pool
from sealmark.codes.tardos import TardosCode
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.stats.calibration import super_uniformity
from sealmark.stats.tails import simulated_tail
from sealmark.stats.thresholds import threshold

ALPHA = 1e-6
USERS = 10_000
GOLDEN = "3f984bb3327b56544ac59d498c94355fbaa06ea5a78249bfd0e5f28cd68a323d"  # SHA-256 of a word

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


def pirate(code, colluders, strategy, rng):
    return pool(code.words(colluders), strategy, rng)


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
    np.testing.assert_allclose(points, nuida(5)[0], atol=2**-17)
    np.testing.assert_allclose(counts / 60_000, nuida(5)[1], atol=0.01)


def test_arcsine_law_has_its_quartiles_and_its_cutoff():
    biases = arcsine(20, np.linspace(0, 1, 100_001))
    assert biases.min() == pytest.approx(1 / 6000)
    assert biases.max() == pytest.approx(1 - 1 / 6000)
    # without a cutoff the quartiles of the arcsine law are (2 -+ sqrt 2) / 4
    np.testing.assert_allclose(np.quantile(biases, [0.25, 0.75]), [0.146447, 0.853553], atol=0.01)


@pytest.mark.parametrize(
    ("colluders", "law", "few"),
    [(10, "auto", True), (11, "auto", False), (11, "nuida", True), (3, "arcsine", False)],
)
def test_a_law_is_chosen_by_name_or_by_the_number_of_colluders(colluders, law, few):
    biases = TardosCode(secret_of(0), 500, colluders, law).biases
    assert (len(np.unique(biases)) <= 6) is few


def test_no_bias_is_0_or_1_however_many_colluders():
    biases = draw_biases(secret_of(0).stream("biases"), 100_000, 10_000)
    assert (biases.min(), biases.max()) == (2**-16, 1 - 2**-16)


@pytest.mark.parametrize("law", ["nuida", "arcsine"])
def test_users_have_a_1_as_often_as_the_bias_says(law):
    code = TardosCode(secret_of(1), 64, 5, law)
    shares = code.words([f"user{i}" for i in range(20_000)]).mean(0)
    spread = np.sqrt(code.biases * (1 - code.biases) / 20_000)
    assert (np.abs(shares - code.biases) < 4.5 * spread).all()


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
    # the nearest of 2 million pairs, at about 340 +- 15
    some = words[:2000].astype(np.float32)
    apart = some.sum(1)[:, None] + some.sum(1) - 2 * some @ some.T
    np.fill_diagonal(apart, 1024)
    assert apart.min() > 0.7 * expected


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000])
def test_packed_words_are_the_words_and_score_alike(length):
    code, users = TardosCode(secret_of(0), length, 3), [f"user{i}" for i in range(40)]
    packed, symbols = code.pack(users), np.random.default_rng(0).normal(size=length)
    np.testing.assert_array_equal(packed, np.packbits(code.words(users), axis=1))
    np.testing.assert_array_equal(code.weigh(packed, symbols), code.scores(users, symbols))


@pytest.mark.parametrize("packed", [np.zeros((2, 7), np.uint8), np.zeros(8, np.uint8), np.zeros((2, 8))])
def test_packed_words_of_another_form_are_refused(packed):
    with pytest.raises(ParameterError, match=r"expected \(U, 8\) uint8"):
        TardosCode(secret_of(0), 64, 3).weigh(packed, np.ones(64))


def test_nobody_has_no_score():
    assert TardosCode(secret_of(0), 64, 3).scores([], np.ones(64)).shape == (0,)


@pytest.mark.parametrize("user", ["", "caf\u00e9", "\u738b\u5c0f\u660e", "a\0b", "\ud800", "x" * 100_000])
def test_any_text_is_a_name(user):
    code = TardosCode(secret_of(0), 256, 3)
    symbols = 2.0 * code.word(user) - 1
    assert code.scores([user, "alice"], symbols).argmax() == 0


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_100_coalitions_of_three_95_lose_a_member(strategy):
    """At one in a million; n = 10^4, L = 1,024."""
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(3), 1024, 3)
    for trial in range(100):
        colluders = [f"pirate{trial}-{i}" for i in range(3)]
        symbols = pirate(code, colluders, STRATEGIES[strategy], rng)
        score = code.scores(colluders, symbols).max()
        caught += code.null(symbols).log_p(score) + math.log(USERS) <= math.log(ALPHA)
    assert caught >= 95


@pytest.mark.parametrize("colluders", range(2, 11))
def test_coalitions_of_two_to_ten_lose_a_member_at_the_length_of_the_formula(colluders):
    """Four of each strategy, at a total error of 1e-3; benchmarks/tracing.py has a hundred of each."""
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(colluders), code_length(USERS, colluders, 1e-3), colluders)
    for name, strategy in STRATEGIES.items():
        for trial in range(4):
            users = [f"{name}{trial}-{i}" for i in range(colluders)]
            symbols = pirate(code, users, strategy, rng)
            caught += code.null(symbols).log_p(code.scores(users, symbols).max()) <= math.log(1e-3 / USERS)
    assert caught >= 23


def test_a_third_of_that_length_is_too_short():
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(5), code_length(USERS, 5, 1e-3) // 3, 5)
    for trial in range(20):
        users = [f"{trial}-{i}" for i in range(5)]
        symbols = pirate(code, users, minority, rng)
        caught += min(log_p(code, users, symbols)) <= math.log(1e-3)
    assert caught < 19


@pytest.mark.parametrize("size", [1, 3, 6, 20])
def test_no_innocent_is_accused_in_a_million_draws_whatever_the_size_of_the_coalition(size):
    """At one in a thousand over 10^4 users, a thousand times what is accused by default."""
    rng, code = np.random.default_rng(size), TardosCode(secret_of(4), 1024, 3)
    packed = code.pack([f"user{i}" for i in range(42_000)])
    for strategy in STRATEGIES.values():
        symbols = pirate(code, [f"pirate{i}" for i in range(size)], strategy, rng)
        assert code.weigh(packed, symbols).max() < code.threshold(symbols, USERS, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_innocent_is_accused_in_a_million_draws_of_each_strategy(strategy):
    rng, code = np.random.default_rng(0), TardosCode(secret_of(4), 1024, 3)
    packed = code.pack([f"user{i}" for i in range(100_000)])
    for trial in range(10):
        symbols = pirate(code, [f"pirate{trial}-{i}" for i in range(3)], STRATEGIES[strategy], rng)
        assert code.weigh(packed, symbols).max() < code.threshold(symbols, USERS, 1e-3)


def test_a_lower_threshold_would_accuse_innocents():
    """The control of both: of 42,000 innocents some have a score of three deviations."""
    code, rng = TardosCode(secret_of(4), 1024, 3), np.random.default_rng(3)
    symbols = pirate(code, ["p", "q", "r"], interleaving, rng)
    assert code.scores([f"user{i}" for i in range(42_000)], symbols).max() > 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("log10_alpha", [-6.5, -10, -20])
def test_the_bound_holds_and_gives_away_a_factor_of_two_to_forty(strategy, log10_alpha):
    """Against the tail itself, by importance sampling far below what can be counted."""
    code, rng = TardosCode(secret_of(8), 1024, 3), np.random.default_rng(0)
    null = code.null(pirate(code, ["p", "q", "r"], STRATEGIES[strategy], rng))
    statistic = threshold(null, log10_alpha * math.log(10))
    log_p, error = simulated_tail(null, statistic, 2000, rng)
    assert error < 0.15
    assert math.log(2) < null.log_p(statistic) - log_p < math.log(40)


def test_a_gaussian_guess_is_too_small_where_biases_are_rare():
    """Why the bound is Chernoff's: where a 1 is rare and shown, whoever has it by chance scores high."""
    code, rng = TardosCode(secret_of(8), 128, 20), np.random.default_rng(0)
    null = code.null(pirate(code, [f"pirate{i}" for i in range(20)], STRATEGIES["all ones"], rng))
    statistic = threshold(null, -10 * math.log(10))
    log_p, error = simulated_tail(null, statistic, 20_000, rng)
    assert log_p - 3 * error > norm.logsf(statistic) + math.log(10)
    assert log_p < null.log_p(statistic)


def test_thresholds_are_where_users_begin_to_be_accused():
    code, rng = TardosCode(secret_of(2), 512, 3), np.random.default_rng(0)
    symbols = pirate(code, ["p", "q"], average, rng)
    found = code.threshold(symbols, USERS, 1e-6)
    assert code.null(symbols).log_p(found) + math.log(USERS) <= math.log(1e-6)
    assert code.null(symbols).log_p(found - 1e-6) + math.log(USERS) > math.log(1e-6)
    assert code.threshold(np.eye(512)[0], USERS, 1e-6) == math.inf


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
    rng, caught = np.random.default_rng(0), 0
    code = TardosCode(secret_of(6), 1024, 3)
    for trial in range(20):
        symbols = (2.0 * code.word(f"user{trial}") - 1) * np.where(rng.uniform(size=1024) < 0.2, -1, 1)
        caught += log_p(code, [f"user{trial}"], symbols)[0] < math.log(ALPHA)
        assert log_p(code, ["innocent"], symbols)[0] > math.log(ALPHA)
    assert caught == 20


def test_half_of_the_symbols_erased_still_names_a_single_user():
    rng, code = np.random.default_rng(0), TardosCode(secret_of(6), 1024, 3)
    symbols = (2.0 * code.word("alice") - 1) * (rng.uniform(size=1024) < 0.5)
    found = log_p(code, ["alice", "bob"], symbols)
    assert found[0] < math.log(ALPHA) < found[1]


def test_a_tenth_erased_still_names_one_of_two():
    rng, code, caught = np.random.default_rng(0), TardosCode(secret_of(6), 1024, 3), 0
    for trial in range(20):
        pair = [f"a{trial}", f"b{trial}"]
        symbols = pirate(code, pair, interleaving, rng) * (rng.uniform(size=1024) > 0.1)
        caught += min(log_p(code, pair, symbols)) < math.log(ALPHA)
    assert caught >= 19


def test_half_of_the_symbols_wrong_say_nothing():
    rng, code = np.random.default_rng(0), TardosCode(secret_of(6), 1024, 3)
    symbols = (2.0 * code.word("alice") - 1) * np.where(rng.uniform(size=1024) < 0.5, -1, 1)
    assert log_p(code, ["alice"], symbols)[0] > math.log(ALPHA)


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
        lambda: TardosCode(secret_of(0), 64, 3, "uniform"),
        lambda: TardosCode(secret_of(0), 64, 3).threshold(np.ones(64), 0, 1e-3),
        lambda: TardosCode(secret_of(0), 64, 3).threshold(np.ones(64), 10, 0.0),
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
