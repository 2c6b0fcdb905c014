"""Codes from block designs: few users, and every small coalition leaves a trace that frames nobody."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, hyp2f1

from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Basis, Null

_PRECISION = 1e-9  # shares of the symbols under this are rounding


def difference_set(size: int) -> tuple[int, ...]:
    """``size`` residues whose differences are every nonzero residue modulo v = size^2 - size + 1, once.

    Singer (Trans. AMS 43, 1938): where a recurrence of order 3 over GF(size - 1) is zero.

    Raises:
        ParameterError: ``size - 1`` is not a prime.

    Example:
        >>> difference_set(3), difference_set(4)
        ((0, 1, 5), (0, 1, 5, 11))
    """
    prime, modulus = size - 1, size * (size - 1) + 1
    if prime < 2 or any(prime % divisor == 0 for divisor in range(2, prime)):
        raise ParameterError("no such block design", expected="a prime and one, as 4, 6, 8, 12, 14", found=size)
    for factors in product(range(prime), range(prime), range(1, prime)):
        terms = [0, 0, 1]
        while len(terms) < modulus:
            terms.append(sum(factor * term for factor, term in zip(factors, terms[-3:], strict=True)) % prime)
        found = tuple(place for place, term in enumerate(terms) if term == 0)
        differences = {sign * (i - j) % modulus for i, j in combinations(found, 2) for sign in (1, -1)}
        if len(found) == size and len(differences) == modulus - 1:
            break
    return found


@dataclass(frozen=True)
class InnocentWord(Null):
    """The law of `BlockCode.scores` for anybody innocent: P(T >= t) <= exp(-t).

    It holds while at most ``colluders`` users pool their copies, whatever they make of them.

    Example:
        >>> round(math.exp(InnocentWord(31, 5).log_p(math.log(1000))), 6)
        0.001
    """

    length: int
    colluders: int
    basis = Basis.BOUND

    def __str__(self) -> str:
        return (
            f"a uniform direction in {self.length - self.colluders} dimensions, bounded over every explanation by "
            f"at most {self.colluders} colluders"
        )

    def log_p(self, statistic: float) -> float:
        """See `Null.log_p`."""
        return min(0.0, -statistic)

    @property
    def floor(self) -> float:
        """No limit."""
        return -math.inf


@dataclass(frozen=True)
class BlockCode:
    """The AND code of a (v, k, 1) design: v = k^2 - k + 1 words of v bits, each with k zeros.

    Any two words share exactly one zero. So the AND of up to k - 1 words covers no other word's zeros
    (Trappe et al., IEEE Trans. Signal Processing 51, 2003), and words of -1 and +1 have the same product
    each, which makes `scores` cheap.

    Args:
        block: k, at least 4, one more than a prime: 4, 6, 8 or 12 give 13, 31, 57 or 133 users.

    Raises:
        ParameterError: there is no such code.

    Example:
        >>> code = BlockCode(6)
        >>> code.length, code.colluders
        (31, 5)
        >>> code.covered(code.words[3] & code.words[17]).nonzero()[0].tolist()
        [3, 17]
    """

    block: int = 6

    def __post_init__(self) -> None:
        if self.block < 4:
            raise ParameterError("no such code", expected="block >= 4", found=self.block)
        difference_set(self.block)

    @property
    def length(self) -> int:
        """v: bits a word, and words."""
        return self.block * (self.block - 1) + 1

    @property
    def colluders(self) -> int:
        """How many users may pool their copies: k - 1."""
        return self.block - 1

    @cached_property
    def words(self) -> NDArray[np.uint8]:
        """(v, v) of 0 and 1: a word a row."""
        places = np.add.outer(np.arange(self.length), difference_set(self.block)) % self.length
        words = np.ones((self.length, self.length), np.uint8)
        np.put_along_axis(words, places, 0, axis=1)
        return words

    @cached_property
    def signs(self) -> NDArray[np.float64]:
        """(v, v) of -1 and +1: the words."""
        return 2 * self.words.astype(np.float64) - 1

    @property
    def null(self) -> InnocentWord:
        """The law of an innocent's `scores`."""
        return InnocentWord(self.length, self.colluders)

    def covered(self, bits: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whose zeros are all among the zeros of ``bits``, the paper's decoder: (..., v) to (..., v).

        A word of nothing but zeros covers everybody: ask first whether there is a mark at all.
        """
        ones = bits.astype(np.float32) @ (1 - self.words).astype(np.float32).T
        covered: NDArray[np.bool_] = np.equal(ones, 0)
        return covered

    def read(self, symbols: NDArray[np.float64], tau: float = 0.85) -> NDArray[np.uint8]:
        """The AND of the words in an average: 1 where a symbol is over ``tau`` of a full one, (v,) to (v,).

        A full one is the mean of the 1 + (k-1)(k-2)/2 largest: so many ones are left of k - 1 words.
        """
        ones = 1 + (self.block - 1) * (self.block - 2) // 2
        full = float(np.sort(symbols)[-ones:].mean())
        return np.greater(symbols, tau * full).astype(np.uint8)

    def scores(self, symbols: NDArray[np.float64]) -> NDArray[np.float64]:
        """How badly the symbols are explained without each user, by anybody else: (v,) to (v,), in nats.

        The words must have been turned by a secret uniform rotation. Then, given all that a coalition C of
        k - 1 users can know, the other words freed of those of C have uniform directions in the v - k + 1
        dimensions that are left; so whatever C made of its copies, the share of it that m other words
        explain is Beta(m / 2, (v - k + 1 - m) / 2).

        The suspects S are the s users with the largest shares in the symbols, s = 1 .. k - 1. For a user in
        S, each C without him leaves it to the rest of S to explain what C does not; the largest p-value over
        all C counts, times the number of ways to choose S. Minus its logarithm is the score; 0 for others.
        """
        scores = np.zeros(self.length)
        norm = float(np.linalg.norm(symbols))
        if not 0 < norm < math.inf:
            return scores
        products = self.signs @ (symbols / norm)
        order = np.argsort(-np.linalg.solve(self.signs.T, symbols), kind="stable")
        for size in range(1, self.colluders + 1):
            suspects, others = order[:size], products[order[size:]]
            choices = math.log(self.colluders) + math.log(math.comb(self.length - 1, size - 1))
            unexplained = max(1 - self._explained(products[suspects]), _PRECISION)
            worst = np.full(size, -math.inf)
            for inside in product((True, False), repeat=size):
                members = np.array(inside)
                if not members.all():
                    left = 1 - self._most_explained(products[suspects[members]], others)
                    log_p = self._log_tail(unexplained / max(left, _PRECISION), size - int(members.sum()))
                    worst[~members] = np.maximum(worst[~members], log_p)
            scores[suspects] = np.maximum(scores[suspects], -worst - choices)
        return scores

    def _explained(self, products: NDArray[np.float64]) -> float:
        """The squared length of a projection on n words, by their products with what is projected.

        The words' Gram matrix is ``excess I + shared J``, its inverse ``(I - pull J) / excess``.
        """
        pull = self._pull(len(products))
        return float((products**2).sum() - pull * products.sum() ** 2) / self._excess

    def _most_explained(self, fixed: NDArray[np.float64], others: NDArray[np.float64]) -> float:
        """The same for the fixed words and the best of the others, k - 1 in all: an upper bound.

        As ``-x^2 <= y^2 - 2 x y`` for every y, the square of the sum can be replaced by something linear,
        for which the best others are found by sorting.
        """
        count, pull = self.colluders - len(fixed), self._pull(self.colluders)
        ranked = np.sort(others)
        least, most = ranked[:count].sum(), ranked[len(ranked) - count :].sum()
        sums = fixed.sum() + np.linspace(least, most, 33)[:, None]
        gains = np.sort(others**2 - 2 * pull * sums * others)[:, len(others) - count :].sum(1)
        given = (fixed**2 - 2 * pull * sums * fixed).sum(1)
        return float((gains + given + pull * sums[:, 0] ** 2).min()) / self._excess

    @property
    def _excess(self) -> int:
        return 4 * (self.block - 1)  # a word's product with itself, less that of two words

    def _pull(self, words: int) -> float:
        shared = self.length - self._excess
        return shared / (self._excess + words * shared)

    def _log_tail(self, share: float, words: int) -> float:
        """Log of the chance that ``words`` words leave at most that share of a direction unexplained."""
        if share >= 1:
            return 0.0
        free, fixed = (self.length - self.colluders - words) / 2, words / 2
        tail = free * math.log(share) - math.log(free) - betaln(free, fixed)
        return min(0.0, float(tail + math.log(hyp2f1(free, 1 - fixed, free + 1, share))))
