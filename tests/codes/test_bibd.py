"""Block-design codes: the design, who can be framed, and that nobody innocent is accused by small coalitions."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import beta

from sealmark.codes.bibd import BlockCode, InnocentWord, difference_set
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis
from sealmark.stats.calibration import super_uniformity

CODE = BlockCode(6)


def framed(size):
    """How many coalitions of that size cover the zeros of somebody else, and how many there are."""
    zeros = [sum(1 << int(place) for place in np.flatnonzero(word == 0)) for word in CODE.words]
    teams = np.array(list(combinations(range(31), size)))
    union = np.bitwise_or.reduce(np.array(zeros)[teams], axis=1)
    covered = sum(((union & block) == block).astype(int) for block in zeros)
    return int((covered > size).sum()), len(teams), len(np.unique(union))


def freed(vector, words):
    if not words:
        return vector
    basis = np.linalg.qr(CODE_OF[len(vector)].signs[sorted(words)].T)[0]
    return vector - basis @ (basis.T @ vector)


CODE_OF = {13: BlockCode(4), 31: CODE}


def scores_written_out(code, symbols):
    """All suspects, all coalitions, projections by QR: the definition."""
    order = np.argsort(-np.linalg.solve(code.signs.T, symbols))
    scores, left = np.zeros(code.length), code.length - code.colluders
    for size in range(1, code.colluders + 1):
        suspects = {int(word) for word in order[:size]}
        choices = math.log(code.colluders * math.comb(code.length - 1, size - 1))
        for user in suspects:
            worst = -math.inf
            for team in combinations(sorted(set(range(code.length)) - {user}), code.colluders):
                alone, both = (freed(symbols, words) for words in (set(team), set(team) | suspects))
                free = len(suspects - set(team))
                share = (both @ both) / (alone @ alone)
                worst = max(worst, beta.logcdf(share, (left - free) / 2, free / 2))
            scores[user] = max(scores[user], -worst - choices)
    return scores


@pytest.mark.parametrize("size", [3, 4, 6, 8, 12, 14])
def test_differences_are_every_residue_once(size):
    found, modulus = difference_set(size), size * (size - 1) + 1
    differences = sorted((a - b) % modulus for a in found for b in found if a != b)
    assert differences == list(range(1, modulus))


@pytest.mark.parametrize("size", [2, 5, 7, 10])
def test_sizes_that_are_no_prime_and_one_are_refused(size):
    with pytest.raises(ParameterError, match="no such"):
        difference_set(size)


@pytest.mark.parametrize("block", [3, 5, -6])
def test_blocks_without_a_code_are_refused(block):
    with pytest.raises(ParameterError, match="no such"):
        BlockCode(block)


@pytest.mark.parametrize("block", [4, 6, 8, 12])
def test_any_two_words_share_one_zero_and_each_bit_is_zero_in_k_words(block):
    code = BlockCode(block)
    zeros = 1 - code.words.astype(int)
    assert (zeros.sum(0) == block).all()
    np.testing.assert_array_equal(zeros @ zeros.T, np.ones_like(zeros) + (block - 1) * np.eye(len(zeros)))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_no_coalition_of_up_to_five_frames_anybody_and_all_differ(size):
    frames, teams, unions = framed(size)
    assert frames == 0
    assert unions == teams == math.comb(31, size)


def test_44_8_percent_of_the_coalitions_of_six_frame_somebody():
    frames, teams, _ = framed(6)
    assert (frames, teams) == (330_181, 736_281)


def test_the_and_of_three_words_covers_their_users_alone():
    teams = np.array(list(combinations(range(31), 3)))
    covered = CODE.covered(CODE.words[teams].min(1))
    assert covered.sum(1).tolist() == [3] * len(teams)
    assert np.take_along_axis(covered, teams, 1).all()


def test_interleaving_hides_two_from_the_subset_test_and_frames_nobody():
    """Why it is no test for words that were mixed bit by bit: each of the two misses zeros of its own."""
    rng, hidden = np.random.default_rng(0), 0
    for _ in range(300):
        team = rng.choice(31, 2, replace=False)
        word = np.where(rng.uniform(size=31) < 0.5, *CODE.words[team])
        covered = set(np.flatnonzero(CODE.covered(word)))
        assert covered <= set(team)
        hidden += not covered
    assert hidden / 300 == pytest.approx((1 - 2**-5) ** 2, abs=0.04)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_zero_read_as_a_one_clears_a_colluder(size):
    word = CODE.words[:size].min(0)
    own = np.flatnonzero((CODE.words[0] == 0) & (CODE.words[1:size] == 1).all(0))
    word[own[0]] = 1
    assert CODE.covered(word).nonzero()[0].tolist() == list(range(1, size))


def test_one_one_read_as_a_zero_lets_five_frame_somebody_and_four_nobody():
    """Somebody else shares a zero with each of five; where it has these five apart, the sixth is enough."""
    rng, framed_by = np.random.default_rng(0), {4: 0, 5: 0}
    for size in framed_by:
        for _ in range(200):
            team = rng.choice(31, size, replace=False)
            word = CODE.words[team].min(0)
            wrong = np.repeat(word[None], 31, 0) * (1 - np.eye(31, dtype=np.uint8))
            framed_by[size] += bool((CODE.covered(wrong).sum(1) > size).any())
    assert framed_by[4] == 0
    assert framed_by[5] > 100


def test_an_average_of_up_to_five_is_read_as_their_and():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 4, 5):
        team = rng.choice(31, size, replace=False)
        symbols = 0.3 * (CODE.signs[team].mean(0) + rng.normal(0, 0.02, 31))
        np.testing.assert_array_equal(CODE.read(symbols), CODE.words[team].min(0))


def test_reading_where_nothing_is_accuses_everybody():
    assert CODE.covered(np.zeros(31, np.uint8)).all()


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_scores_are_those_of_the_definition_or_a_little_less(noise):
    code, rng = BlockCode(4), np.random.default_rng(0)
    for size in (1, 2, 3):
        symbols = rng.dirichlet(np.ones(size)) @ code.signs[:size] + rng.normal(0, noise, 13)
        found, exact = code.scores(symbols), scores_written_out(code, symbols)
        assert (found <= exact + 1e-9).all()
        assert (found >= exact - 1.5).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_all_of_a_coalition_are_named_and_nobody_else(size):
    rng = np.random.default_rng(size)
    team = rng.choice(31, size, replace=False)
    scores = CODE.scores(CODE.signs[team].mean(0) + rng.normal(0, 0.03, 31))
    assert set(np.flatnonzero(scores > math.log(31e6))) == set(team)
    assert set(np.flatnonzero(scores)) == set(team)


def test_a_light_colluder_is_named_whom_the_subset_test_misses():
    symbols = 0.95 * CODE.signs[4] + 0.05 * CODE.signs[9] + np.random.default_rng(0).normal(0, 0.01, 31)
    assert CODE.covered(CODE.read(symbols)).nonzero()[0].tolist() == [4]
    assert set(np.flatnonzero(CODE.scores(symbols) > math.log(31e6))) == {4, 9}


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_even_coalitions_of_six_to_thirteen_frame_nobody(noise):
    rng = np.random.default_rng(0)
    for _ in range(60):
        team = rng.choice(31, rng.integers(6, 14), replace=False)
        shares = rng.dirichlet(np.full(len(team), rng.choice([0.3, 1, 5])))
        scores = CODE.scores(shares @ CODE.signs[team] + rng.normal(0, noise, 31) * np.linalg.norm(shares))
        scores[team] = 0
        assert scores.max() < math.log(31)


def test_symbols_without_noise_name_the_coalition_and_nobody_else():
    for size in (1, 2, 3, 4, 5):
        assert set(np.flatnonzero(CODE.scores(CODE.signs[:size].mean(0)))) == set(range(size))


def test_scores_do_not_depend_on_the_scale():
    symbols = np.random.default_rng(0).normal(0, 0.3, 31) + CODE.signs[5]
    np.testing.assert_allclose(CODE.scores(1e-6 * symbols), CODE.scores(symbols))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_symbols_that_say_nothing_accuse_nobody(value):
    assert not CODE.scores(np.full(31, value)).any()


def turned(code, rng):
    """Symbols of something made without the secret."""
    return rng.normal(0, 1, code.length)


def other_words(code, rng):
    """What users 0 to k - 2 make of their words, with the worst that they could add: another word, turned.

    They know their own words and nothing of the directions that the others' have beside these.
    """
    team = list(range(code.colluders))
    basis = np.linalg.qr(code.signs[team].T)[0]
    noise = rng.normal(0, 1, code.length)
    return rng.dirichlet(np.ones(len(team))) @ code.signs[team] + 3 * (noise - basis @ (basis.T @ noise))


@pytest.mark.parametrize("made", [turned, other_words], ids=lambda made: made.__name__)
@pytest.mark.parametrize("block", [4, 6])
def test_p_values_of_innocents_hold(made, block):
    code, rng = BlockCode(block), np.random.default_rng(1)
    innocent = code.length - 1
    found = [code.scores(made(code, rng)) for _ in range(300)]
    p_values = [math.exp(code.null.log_p(scores[innocent])) for scores in found]
    assert super_uniformity(p_values) > 1e-3
    anybody = [math.exp(code.null.log_p(scores[code.colluders :].max())) for scores in found]
    assert super_uniformity(np.minimum(1, code.length * np.array(anybody))) > 1e-3


def test_p_values_of_a_guilty_user_do_not_hold():
    rng = np.random.default_rng(0)
    scores = [CODE.scores(CODE.signs[:5].mean(0) + rng.normal(0, 0.05, 31))[3] for _ in range(20)]
    assert super_uniformity([math.exp(CODE.null.log_p(score)) for score in scores]) < 1e-6


def test_the_law_names_what_it_assumes():
    null = BlockCode(6).null
    assert null == InnocentWord(31, 5)
    assert "at most 5 colluders" in str(null)
    assert null.basis is Basis.BOUND
    assert (null.log_p(0.0), null.log_p(20.0), null.floor) == (0.0, -20.0, -math.inf)
