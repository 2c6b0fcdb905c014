"""The laws of statistics against independent routes: exact sums, full enumeration, published tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Null
from sealmark.crypto.random import Stream
from sealmark.stats.calibration import super_uniformity
from sealmark.stats.nulls import (
    Binomial,
    Hypergeometric,
    IndependentSum,
    KeyedProjection,
    Permutation,
    Population,
)

ROUNDING = 1e-9


def _tail(k: int, n: int, p: float) -> Fraction:
    """P(Bin(n, p) >= k), exactly."""
    chance = Fraction(p)
    return sum(
        (math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(max(k, 0), n + 1)), Fraction(0)
    )


def _log(value: Fraction) -> float:
    return math.log(value.numerator) - math.log(value.denominator)


def _sign_vectors(n: int) -> NDArray[np.float64]:
    """All 2**n sign vectors: (2**n, n)."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return 1.0 - 2 * bits


class TestBinomial:
    @pytest.mark.parametrize(("n", "p"), [(1, 0.5), (7, 0.5), (40, 0.1), (31, 1 / 3), (25, 0.999)])
    def test_the_tail_is_the_exact_sum(self, n: int, p: float) -> None:
        for k in range(1, n + 1):
            assert Binomial(n, p).log_p(k) == pytest.approx(_log(_tail(k, n, p)), rel=1e-9, abs=1e-12)
        assert Binomial(n, p).log_p(0) == 0

    @pytest.mark.parametrize("n", [1, 8, 33])
    def test_two_sided_counts_as_many_misses_as_matches(self, n: int) -> None:
        null = Binomial(n, 0.5, two_sided=True)
        for k in range(n + 1):
            extreme = max(k, n - k)
            exact = sum(math.comb(n, i) for i in range(n + 1) if max(i, n - i) >= extreme)
            assert null.log_p(k) == pytest.approx(_log(Fraction(exact, 2**n)), rel=1e-9, abs=1e-12)

    def test_two_sided_costs_one_bit(self) -> None:
        for k in (167, 200, 256):
            one, two = (Binomial(256, 0.5, two_sided=sided).log_p(k) for sided in (False, True))
            assert two - one == pytest.approx(math.log(2))

    @pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2048, 1900), (3000, 2900)])
    def test_probabilities_beyond_a_double_keep_their_logarithm(self, n: int, k: int) -> None:
        assert Binomial(n, 0.5).log_p(k) == pytest.approx(_log(_tail(k, n, 0.5)), rel=1e-10)

    def test_more_matches_are_never_less_suspicious_across_the_change_of_method(self) -> None:
        p_values = [Binomial(1500, 0.5).log_p(k) for k in range(1501)]
        assert all(one >= two for one, two in itertools.pairwise(p_values))

    def test_more_matches_than_symbols_are_impossible(self) -> None:
        assert Binomial(5, 0.5).log_p(6) == -math.inf

    def test_a_fractional_statistic_counts_as_the_next_whole_one(self) -> None:
        assert Binomial(10, 0.5).log_p(7.5) == Binomial(10, 0.5).log_p(8)

    @pytest.mark.parametrize(
        "null", [Binomial(20, 0.1), Binomial(64, 0.5), Binomial(64, 0.5, two_sided=True), Binomial(4000, 0.5)]
    )
    def test_the_floor_is_reached_when_all_match(self, null: Binomial) -> None:
        assert null.log_p(null.n) == pytest.approx(null.floor)

    # whitebox card, R1 and R2b, and attacks card, C.2: matches needed for p <= alpha
    @pytest.mark.parametrize(
        ("n", "thresholds"),
        [
            (32, {0.05: 22, 1e-3: 26, 1e-6: 30, 1e-9: 32}),
            (64, {0.05: 40, 1e-3: 45, 1e-6: 51, 1e-9: 56, 2.0**-64: 64, 2.0**-80: 65}),
            (100, {0.05: 59, 1e-3: 66, 1e-6: 74, 1e-9: 80}),
            (128, {0.05: 74, 1e-3: 82, 1e-6: 92, 1e-9: 98, 2.0**-80: 118, 2.0**-128: 128}),
            (256, {0.05: 142, 1e-3: 154, 1e-6: 167, 1e-9: 176, 2.0**-80: 208}),
            (512, {0.05: 276, 1e-3: 292, 1e-6: 311, 1e-9: 324, 2.0**-80: 371}),
            (16, {1e-6: 17}),
        ],
    )
    def test_the_thresholds_for_bits_are_the_published_ones(self, n: int, thresholds: dict[float, int]) -> None:
        assert {alpha: Binomial(n, 0.5).needed(alpha) for alpha in thresholds} == thresholds

    # attacks card, C.2: the largest bit error rate for p <= 2**-64, 2**-100, 2**-128
    @pytest.mark.parametrize(
        ("n", "rates"),
        [
            (128, (0.117, 0.031, 0.000)),
            (256, (0.219, 0.152, 0.113)),
            (512, (0.301, 0.250, 0.219)),
            (1024, (0.358, 0.321, 0.298)),
        ],
    )
    def test_the_bit_error_rates_are_the_published_ones(self, n: int, rates: tuple[float, ...]) -> None:
        found = [1 - Binomial(n, 0.5).needed(2.0**-bits) / n for bits in (64, 100, 128)]
        assert found == pytest.approx(rates, abs=0.0006)

    # whitebox card, R1, and attacks card, C.3
    @pytest.mark.parametrize(
        ("n", "classes", "thresholds"),
        [
            (20, 10, {1e-4: 9, 1e-6: 11}),
            (100, 10, {1e-6: 28, 1e-9: 33, 2.0**-64: 46, 2.0**-100: 57}),
            (450, 10, {1e-6: 79}),
            (200, 10, {2.0**-20: 44, 2.0**-64: 68, 2.0**-100: 83}),
            (100, 100, {2.0**-20: 9, 2.0**-64: 20, 2.0**-100: 28}),
        ],
    )
    def test_the_thresholds_for_triggers_are_the_published_ones(
        self, n: int, classes: int, thresholds: dict[float, int]
    ) -> None:
        assert {alpha: Binomial(n, 1 / classes).needed(alpha) for alpha in thresholds} == thresholds

    def test_the_threshold_is_the_first_count_that_suffices(self) -> None:
        for null in (Binomial(64, 0.5), Binomial(64, 0.5, two_sided=True), Binomial(50, 0.1)):
            needed = null.needed(1e-6)
            assert null.log_p(needed) <= math.log(1e-6) < null.log_p(needed - 1)

    @pytest.mark.parametrize(
        ("n", "p", "two_sided"),
        [(0, 0.5, False), (5, 0, False), (5, 1, False), (5, math.nan, False), (5, 0.1, True)],
    )
    def test_a_law_that_means_nothing_is_refused(self, n: int, p: float, two_sided: bool) -> None:
        with pytest.raises(ParameterError, match="bad binomial null"):
            Binomial(n, p, two_sided)

    @pytest.mark.parametrize("alpha", [0, 1, -1])
    def test_a_level_that_means_nothing_is_refused(self, alpha: float) -> None:
        with pytest.raises(ParameterError, match="bad level alpha"):
            Binomial(5, 0.5).needed(alpha)

    @pytest.mark.parametrize("bias", [0.5, 0.9, 1.0])
    def test_p_values_hold_for_any_suspect_because_the_key_is_ours(self, bias: float) -> None:
        answers = np.random.default_rng(0).random(128) < bias  # as one-sided as a suspect likes
        null = Binomial(128, 0.5, two_sided=True)
        keys = [Stream(n.to_bytes(32)).bits(128) for n in range(400)]
        p_values = [math.exp(null.log_p((key == answers).sum())) for key in keys]
        assert super_uniformity(p_values) > 1e-3

    def test_p_values_do_not_hold_for_a_suspect_that_knows_the_key(self) -> None:
        rng, null = np.random.default_rng(0), Binomial(128, 0.5, two_sided=True)
        p_values = [math.exp(null.log_p(128 - rng.binomial(128, 0.4))) for _ in range(50)]
        assert super_uniformity(p_values) < 1e-6


VECTORS: dict[str, NDArray[np.float64]] = {
    "one": np.ones(1),
    "two": np.ones(2),
    "equal": np.ones(16),
    "geometric": 0.7 ** np.arange(16),
    "one large": np.array([5.0] + [1.0] * 13),
    "growing": np.arange(1.0, 15),
    "sparse": np.array([3.0, 0, 0, 4.0, 0, 0, 0, 5.0]),
    "signed": np.random.default_rng(0).normal(size=14),
}


class TestKeyedProjection:
    @pytest.mark.parametrize("name", VECTORS)
    @pytest.mark.parametrize("two_sided", [False, True])
    def test_the_bound_holds_over_all_sign_vectors(self, name: str, two_sided: bool) -> None:
        v = VECTORS[name]
        values = _sign_vectors(len(v)) @ v / np.linalg.norm(v)
        values = np.sort(np.abs(values) if two_sided else values)
        null = KeyedProjection(two_sided=two_sided)
        for t in np.unique(values.round(9)):
            exact = 1 - np.searchsorted(values, t - ROUNDING) / len(values)
            assert exact <= math.exp(null.log_p(t)) * (1 + 1e-6)

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=9).filter(lambda v: np.linalg.norm(v) > 1e-3))
    def test_the_bound_holds_for_any_vector(self, entries: list[float]) -> None:
        v = np.array(entries)
        values = _sign_vectors(len(v)) @ v / np.linalg.norm(v)
        for t in values:
            exact = (values >= t - ROUNDING).mean()
            assert exact <= math.exp(KeyedProjection().log_p(t)) * (1 + 1e-6)

    def test_the_bound_is_attained_by_two_equal_entries(self) -> None:
        # P(S >= sqrt 2) is 1/4 for v = (1, 1), so no smaller constant would do
        assert math.exp(KeyedProjection().log_p(math.sqrt(2))) == pytest.approx(1 / 4)

    def test_the_normal_tail_alone_would_be_no_bound_for_signs(self) -> None:
        assert math.exp(KeyedProjection(signs=False).log_p(math.sqrt(2))) < 1 / 4

    @pytest.mark.parametrize("t", [0.1, 1.0, 3.0, 8.0])
    def test_for_normal_directions_it_is_the_normal_tail(self, t: float) -> None:
        tail = math.erfc(t / math.sqrt(2)) / 2
        assert math.exp(KeyedProjection(signs=False).log_p(t)) == pytest.approx(tail, rel=1e-12)
        two = KeyedProjection(signs=False, two_sided=True)
        assert math.exp(two.log_p(t)) == pytest.approx(2 * tail, rel=1e-12)

    def test_far_tails_keep_their_logarithm(self) -> None:
        # Mills' ratio at 100: log p = -t**2 / 2 - log(t sqrt(2 pi)) - 1 / t**2 + ...
        expected = -5000 - math.log(100 * math.sqrt(2 * math.pi)) - 1e-4
        assert KeyedProjection(signs=False).log_p(100) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("t", [0, -3.0, math.nan, -math.inf])
    def test_a_statistic_that_points_nowhere_proves_nothing(self, t: float) -> None:
        assert KeyedProjection().log_p(t) == 0
        assert KeyedProjection(signs=False).log_p(t) == 0

    def test_any_level_can_be_reached(self) -> None:
        assert KeyedProjection().floor == -math.inf

    def test_the_basis_is_a_bound_for_signs_and_exact_for_normal_directions(self) -> None:
        assert KeyedProjection().basis is Basis.BOUND
        assert KeyedProjection(signs=False).basis is Basis.EXACT

    @pytest.mark.parametrize("signs", [True, False])
    def test_p_values_hold_over_keys_and_fail_for_a_fitted_key(self, signs: bool) -> None:
        v = np.random.default_rng(1).standard_cauchy(64)
        null = KeyedProjection(signs=signs)

        def draw(n: int) -> NDArray[np.float64]:
            stream = Stream(n.to_bytes(32))
            return stream.signs(64).astype(float) if signs else stream.normal(64)

        def p_value(key: NDArray[np.float64]) -> float:
            return math.exp(null.log_p(float(key @ v / np.linalg.norm(v))))

        assert super_uniformity([p_value(draw(n)) for n in range(400)]) > 1e-3
        fitted = [p_value(np.abs(draw(n)) * np.sign(v)) for n in range(40)]
        assert super_uniformity(fitted) < 1e-6


def _terms(*terms: tuple[float, float, float]) -> IndependentSum:
    return IndependentSum(*(np.array(column, float) for column in zip(*terms, strict=True)))


def _enumerated(null: IndependentSum) -> Iterator[tuple[float, float]]:
    """Every outcome: its sum and its chance."""
    columns = list(zip(null.low, null.high, null.p, strict=True))
    for choice in itertools.product([False, True], repeat=len(columns)):
        total = sum(high if up else low for up, (low, high, _) in zip(choice, columns, strict=True))
        yield total, math.prod(p if up else 1 - p for up, (_, _, p) in zip(choice, columns, strict=True))


TERM = st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 0.95))


class TestIndependentSum:
    @given(st.lists(TERM, min_size=1, max_size=8))
    def test_the_bound_holds_over_all_outcomes(self, terms: list[tuple[float, float, float]]) -> None:
        null = _terms(*terms)
        outcomes = list(_enumerated(null))
        for t in sorted({round(total, 9) for total, _ in outcomes}):
            exact = sum(chance for total, chance in outcomes if total >= t + ROUNDING)
            assert exact <= math.exp(null.log_p(t)) * (1 + 1e-6)

    @pytest.mark.parametrize(
        "null",
        [
            _terms((0, 1, 0.5), (0, 1, 0.5), (2, 2, 0.3)),
            _terms((1, 0, 0.2), (-1, 1, 0.1), (0, 0, 0.5)),
            _terms((-0.5, 2, 0.05)),
        ],
        ids=["a constant", "both ways and nothing", "one"],
    )
    def test_the_floor_is_the_chance_of_the_largest_sum(self, null: IndependentSum) -> None:
        outcomes = list(_enumerated(null))
        largest = max(total for total, _ in outcomes)
        chance = sum(chance for total, chance in outcomes if total == largest)
        assert math.exp(null.floor) == pytest.approx(chance)
        assert null.log_p(largest) == pytest.approx(null.floor)

    @pytest.mark.parametrize("k", [30, 40, 50, 60])
    def test_it_is_the_chernoff_bound_of_the_binomial(self, k: int) -> None:
        null = IndependentSum(np.zeros(64), np.ones(64), np.full(64, 0.25))
        rate = k / 64
        divergence = rate * math.log(rate / 0.25) + (1 - rate) * math.log((1 - rate) / 0.75)
        assert null.log_p(k) == pytest.approx(-64 * divergence, rel=1e-6)
        assert null.log_p(k) > Binomial(64, 0.25).log_p(k)

    def test_repeated_terms_count_as_often_as_they_stand(self) -> None:
        once = _terms((0, 1, 0.25), (0, 2, 0.5))
        assert _terms((0, 1, 0.25), (0, 2, 0.5), (0, 2, 0.5)).log_p(2.5) != once.log_p(2.5)
        mixed = _terms((0, 2, 0.5), (0, 1, 0.25), (0, 2, 0.5))
        assert mixed.log_p(3) == _terms((0, 1, 0.25), (0, 2, 0.5), (0, 2, 0.5)).log_p(3)

    @pytest.mark.parametrize("t", [0.5, 0, -9, math.nan])
    def test_a_sum_at_or_under_its_mean_proves_nothing(self, t: float) -> None:
        assert _terms((0, 1, 0.25), (0, 1, 0.25)).log_p(t) == 0

    def test_terms_that_are_always_zero_prove_nothing(self) -> None:
        null = _terms((0, 0, 0.5), (0, 0, 0.5))
        assert (null.log_p(0), null.log_p(1), null.floor) == (0, 0, 0)

    def test_its_name_tells_the_number_of_terms(self) -> None:
        assert repr(_terms((0, 1, 0.5), (0, 0, 0.5))) == "IndependentSum(terms=2)"

    @pytest.mark.parametrize("p", [0.0, 1.0, math.nan])
    def test_a_chance_that_means_nothing_is_refused(self, p: float) -> None:
        with pytest.raises(ParameterError, match="bad terms"):
            _terms((0, 1, p))

    def test_columns_of_different_lengths_are_refused(self) -> None:
        with pytest.raises(ParameterError, match="bad terms"):
            IndependentSum(np.zeros(2), np.ones(2), np.array([0.5]))


class TestRanks:
    @pytest.mark.parametrize("kind", [Permutation, Population])
    @pytest.mark.parametrize(("observed", "p"), [(0, 1), (1, 1), (1.5, 0.8), (2, 0.8), (3, 0.4), (9, 0.2)])
    def test_the_p_value_counts_those_that_are_at_least_as_large(
        self, kind: Callable[[tuple[float, ...]], Null], observed: float, p: float
    ) -> None:
        assert math.exp(kind((3.0, 1.0, 2.0, 2.0)).log_p(observed)) == pytest.approx(p)

    def test_no_rank_goes_under_one_over_their_number_plus_one(self) -> None:
        null = Permutation((0.0,) * 99)
        assert null.log_p(math.inf) == null.floor == pytest.approx(math.log(0.01))

    def test_a_statistic_that_is_no_number_proves_nothing(self) -> None:
        assert Permutation((1.0, 2.0)).log_p(math.nan) == 0
        assert math.exp(Permutation((math.nan, 1.0)).log_p(2)) == pytest.approx(2 / 3)

    def test_fresh_secrets_come_from_the_generator(self) -> None:
        drawn = Permutation.draw(lambda rng: rng.normal(), 5, np.random.default_rng(0))
        assert drawn.statistics == tuple(np.random.default_rng(0).normal(size=5))

    def test_a_population_is_made_of_one_figure_a_model(self) -> None:
        assert Population.of(np.array([1, 2])) == Population((1.0, 2.0))

    def test_ranks_are_super_uniform_among_their_like_and_not_for_an_outlier(self) -> None:
        rng = np.random.default_rng(0)
        alike = [math.exp(Permutation(tuple(rng.normal(size=99))).log_p(rng.normal())) for _ in range(200)]
        apart = [math.exp(Permutation(tuple(rng.normal(size=99))).log_p(rng.normal() + 2)) for _ in range(200)]
        assert super_uniformity(alike) > 1e-3
        assert super_uniformity(apart) < 1e-9

    def test_the_basis_and_the_name_tell_which_rank_it_is(self) -> None:
        assert (Permutation((1.0,)).basis, Population((1.0,)).basis) == (Basis.PERMUTATION, Basis.POPULATION)
        assert (repr(Permutation((1.0,))), repr(Population((1.0, 2)))) == ("Permutation(n=1)", "Population(n=2)")

    @pytest.mark.parametrize("kind", [Permutation, Population])
    def test_an_empty_null_is_refused(self, kind: Callable[[tuple[float, ...]], Null]) -> None:
        with pytest.raises(ParameterError, match="empty null"):
            kind(())


@pytest.mark.parametrize(
    ("null", "words"),
    [
        (Binomial(256, 0.5, two_sided=True), "Bin(256, 0.5), two-sided"),
        (Binomial(30, 0.1), "Bin(30, 0.1)"),
        (KeyedProjection(), "a projection on keyed signs"),
        (KeyedProjection(signs=False), "a projection on keyed normal directions"),
        (Permutation((1.0, 2.0)), "rank among 2 fresh secrets"),
        (Population((1.0,)), "rank among 1 independent models"),
        (Hypergeometric(40, 16, 15), "overlap of 15 picked and 16 drawn of 40"),
    ],
)
def test_a_law_is_told_in_words(null: Null, words: str) -> None:
    assert str(null) == words


class TestHypergeometric:
    @pytest.mark.parametrize(("total", "size", "picked"), [(7, 3, 4), (8, 6, 5), (6, 0, 3), (5, 5, 2), (9, 4, 0)])
    def test_the_tail_is_that_of_all_sets(self, total: int, size: int, picked: int) -> None:
        null, chosen = Hypergeometric(total, size, picked), set(range(picked))
        overlaps = [len(chosen & set(drawn)) for drawn in itertools.combinations(range(total), size)]
        for k in range(-1, min(size, picked) + 1):
            exact = sum(overlap >= k for overlap in overlaps) / len(overlaps)
            assert math.exp(null.log_p(k)) == pytest.approx(exact, rel=1e-12)
        assert null.log_p(min(size, picked) + 1) == -math.inf
        assert null.floor == null.log_p(min(size, picked))
        assert null.basis is Basis.EXACT

    def test_it_is_the_same_whichever_of_the_two_sets_was_drawn(self) -> None:
        for k in range(15):
            assert Hypergeometric(40, 14, 16).log_p(k) == pytest.approx(Hypergeometric(40, 16, 14).log_p(k))

    def test_whoever_picks_all_or_nothing_proves_nothing(self) -> None:
        for picked in (0, 40):
            assert Hypergeometric(40, 16, picked).floor == 0

    def test_a_tail_too_small_for_a_double_is_a_logarithm(self) -> None:
        assert Hypergeometric(4000, 2000, 2000).floor == pytest.approx(-math.log(math.comb(4000, 2000)))

    @pytest.mark.parametrize("bad", [(0, 0, 0), (5, 6, 1), (5, 1, 6), (5, -1, 1), (5, 1, -1)])
    def test_impossible_counts_are_refused(self, bad: tuple[int, int, int]) -> None:
        with pytest.raises(ParameterError, match="bad hypergeometric null"):
            Hypergeometric(*bad)
