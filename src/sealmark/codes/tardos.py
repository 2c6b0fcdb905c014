"""Collusion-resistant codes: one secret word a user, and who of them could have made a given word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sealmark.codes.biases import draw_biases
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.stats.nulls import IndependentSum

_CHUNK = 2048  # users at a time


@dataclass(frozen=True)
class TardosCode:
    """A binary code whose users cannot hide by pooling their copies (Tardos, STOC 2003).

    Each position has a secret bias p; a user's symbol is 1 with chance p, independently of everything
    else. Coalitions of up to ``colluders`` lose at least one member; larger ones may go free. Whatever a
    coalition of any size makes of its copies, the symbols of everybody else are independent of it: that
    alone bounds false accusations, by `null`.

    Biases and words come from the secret's own streams, a user's name being a label under the owner's
    key. They must stay secret: whoever knows the biases can evade, and frame others.

    Args:
        secret: the owner's.
        length: positions.
        colluders: the coalition that it is made for.

    Raises:
        ParameterError: ``length`` or ``colluders`` is under 1.

    Example:
        >>> code = TardosCode(Secret(bytes(32), {"scheme": "example"}), length=256, colluders=3)
        >>> word = code.word("alice")
        >>> read = 2.0 * word - 1
        >>> scores = code.scores(["alice", "bob"], read)
        >>> [code.null(read).log_p(score) < -50 for score in scores]
        [True, False]
    """

    secret: Secret
    length: int
    colluders: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.colluders < 1:
            raise ParameterError(
                "bad code", expected="length and colluders >= 1", found=(self.length, self.colluders)
            )

    @cached_property
    def biases(self) -> NDArray[np.float64]:
        """(length,) chance of a 1 at each position. Secret."""
        return draw_biases(self.secret.stream("biases"), self.length, self.colluders)

    @cached_property
    def _thresholds(self) -> NDArray[np.uint64]:
        return (self.biases * 2.0**32).astype(np.uint64)

    def word(self, user: str) -> NDArray[np.uint8]:
        """(length,) of 0 and 1."""
        drawn = self.secret.stream(f"code/{user}").raw(4 * self.length).view("<u4")
        return (drawn < self._thresholds).astype(np.uint8)

    def words(self, users: Sequence[str]) -> NDArray[np.uint8]:
        """(U, length) of 0 and 1."""
        words = np.empty((len(users), self.length), np.uint8)
        for row, user in enumerate(users):
            words[row] = self.word(user)
        return words

    def scores(self, users: Sequence[str], symbols: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much each user is suspected of a part in a word: (U,).

        The symmetric score of Skoric, Katzenbeisser and Celik (DCC 46, 2008), which is linear in the
        symbols and so takes soft ones: the sum of ``y sqrt((1 - p) / p)`` where the user has a 1, and of
        ``-y sqrt(p / (1 - p))`` where the user has a 0. Divided by ``|y|``, so that it has mean 0 and
        variance 1 for users who had no part in the word. Memory does not grow with the users.

        Args:
            users: whom to look at.
            symbols: (length,) y: +1 where a 1 was read, -1 where a 0 was, anything between where the
                reading is unsure, 0 where nothing can be read.

        Raises:
            ParameterError: not one finite symbol a position.
        """
        low, high = self._terms(symbols)
        scores = np.empty(len(users))
        for start in range(0, len(users), _CHUNK):
            words = self.words(users[start : start + _CHUNK])
            scores[start : start + _CHUNK] = words @ (high - low) + low.sum()
        return scores

    def null(self, symbols: NDArray[np.float64]) -> IndependentSum:
        """The law of the score of anyone who had no part in the word: a proven bound, for any word.

        Given the symbols and the biases, such a user's own symbols are independent coins.

        Raises:
            ParameterError: not one finite symbol a position.
        """
        low, high = self._terms(symbols)
        return IndependentSum(low, high, self.biases)

    def _terms(self, symbols: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if symbols.shape != (self.length,) or not np.isfinite(symbols).all():
            raise ParameterError(
                "bad symbols", expected=f"{self.length} finite numbers", found=f"shape {symbols.shape}"
            )
        unit = symbols / (np.linalg.norm(symbols) or 1.0)
        odds = np.sqrt(self.biases / (1 - self.biases))
        return -unit * odds, unit / odds
