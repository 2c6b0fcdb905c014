"""Collusion-resistant codes: one secret word a user, and who of them could have made a given word."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sealmark.codes.biases import UNIT, Law, draw_biases
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.crypto.random import Streams
from sealmark.stats.nulls import IndependentSum
from sealmark.stats.thresholds import threshold

_CHUNK = 1 << 18  # symbols at a time: what is drawn and looked up for them stays in the processor's cache


@dataclass(frozen=True)
class TardosCode:
    """A binary code whose users cannot hide by pooling their copies (Tardos, STOC 2003).

    Each position has a secret bias p; a user's symbol is 1 with chance p, independently of everything
    else. Coalitions of up to ``colluders`` lose at least one member; larger ones may go free. Whatever a
    coalition of any size makes of its copies, the symbols of everybody else are independent of it: that
    alone bounds false accusations, by `null`.

    Biases and words come from the secret's own streams, a user's name being a label under the owner's
    key. Both must stay secret: whoever knows the biases can evade; whoever has the seed can frame anybody,
    the owner too.

    Args:
        secret: the owner's.
        length: positions.
        colluders: the coalition that it is made for.
        law: of the biases, see `draw_biases`.

    Raises:
        ParameterError: ``length`` or ``colluders`` is under 1, or no such law.

    Example:
        >>> code = TardosCode(Secret(bytes(32), {"scheme": "example"}), length=256, colluders=3)
        >>> word = code.word("alice")
        >>> read = 2.0 * word - 1
        >>> scores = code.scores(["alice", "bob"], read)
        >>> (scores >= code.threshold(read, users=2, alpha=1e-6)).tolist()
        [True, False]
    """

    secret: Secret
    length: int
    colluders: int
    law: Law = "auto"

    def __post_init__(self) -> None:
        if self.length < 1 or self.colluders < 1:
            raise ParameterError(
                "bad code", expected="length and colluders >= 1", found=(self.length, self.colluders)
            )
        draw_biases(self.secret.stream("biases"), 0, self.colluders, self.law)  # refuses an unknown law now

    @cached_property
    def biases(self) -> NDArray[np.float64]:
        """(length,) chance of a 1 at each position. Secret."""
        return draw_biases(self.secret.stream("biases"), self.length, self.colluders, self.law)

    @cached_property
    def _limits(self) -> NDArray[np.uint16]:
        return (self.biases * UNIT).astype("<u2")

    @cached_property
    def _streams(self) -> Streams:
        return Streams(self.secret.key("code"))

    def word(self, user: str) -> NDArray[np.uint8]:
        """(length,) of 0 and 1."""
        return np.asarray(self.words([user])[0])

    def words(self, users: Sequence[str]) -> NDArray[np.uint8]:
        """(U, length) of 0 and 1."""
        return np.unpackbits(self.pack(users), axis=1, count=self.length)

    def pack(self, users: Sequence[str]) -> NDArray[np.uint8]:
        """(U, length / 8) the words, eight symbols a byte, the first one highest.

        A code book: whoever traces often among the same users keeps it, 256 MB for a million words of 2,048,
        as secret as the secret itself, and hands it to `weigh`.
        """
        packed = np.empty((len(users), -(-self.length // 8)), np.uint8)
        for part in self._parts(len(users)):
            packed[part] = self._packed(users[part])
        return packed

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
        table = self._table(symbols)
        parts = [_look_up(table, self._packed(users[part])) for part in self._parts(len(users))]
        return np.concatenate([np.empty(0), *parts])

    def weigh(self, packed: NDArray[np.uint8], symbols: NDArray[np.float64]) -> NDArray[np.float64]:
        """`scores` of users whose words were packed before: (U, length / 8) by `pack`, to (U,).

        Raises:
            ParameterError: the words have another form, or not one finite symbol a position.
        """
        width = -(-self.length // 8)
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != width:
            raise ParameterError(
                "bad packed words", expected=f"(U, {width}) uint8", found=f"{packed.shape} {packed.dtype}"
            )
        table = self._table(symbols)
        parts = [_look_up(table, packed[part]) for part in self._parts(len(packed))]
        return np.concatenate([np.empty(0), *parts])

    def null(self, symbols: NDArray[np.float64]) -> IndependentSum:
        """The law of the score of anyone who had no part in the word: a proven bound, for any word.

        Given the symbols and the biases, such a user's own symbols are independent coins.

        Raises:
            ParameterError: not one finite symbol a position.
        """
        low, high = self._terms(symbols)
        return IndependentSum(low, high, self.biases)

    def threshold(self, symbols: NDArray[np.float64], users: int, alpha: float) -> float:
        """The score from which one of ``users`` is accused; inf where no score says enough.

        The chance that it accuses anyone innocent among them is at most ``alpha``, by `null`.

        Raises:
            ParameterError: users under 1, ``alpha`` not in (0, 1), or not one finite symbol a position.
        """
        if users < 1 or not 0 < alpha < 1:
            raise ParameterError("bad demand", expected="users >= 1, alpha in (0, 1)", found=(users, alpha))
        return threshold(self.null(symbols), math.log(alpha / users))

    def _parts(self, users: int) -> Iterator[slice]:
        size = max(1, _CHUNK // self.length)
        return (slice(start, start + size) for start in range(0, users, size))

    def _packed(self, users: Sequence[str]) -> NDArray[np.uint8]:
        drawn = self._streams.raw(users, 2 * self.length).view("<u2")
        return np.packbits(drawn < self._limits, axis=1)

    def _table(self, symbols: NDArray[np.float64]) -> NDArray[np.float64]:
        """(length / 8, 256) what each value of each byte of a word adds to its score."""
        rest = -self.length % 8
        low, high = (np.pad(term, (0, rest)).reshape(-1, 8) for term in self._terms(symbols))
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        return np.asarray(low.sum(1)[:, None] + (high - low) @ bits.T)

    def _terms(self, symbols: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if symbols.shape != (self.length,) or not np.isfinite(symbols).all():
            raise ParameterError(
                "bad symbols", expected=f"{self.length} finite numbers", found=f"shape {symbols.shape}"
            )
        unit = symbols / (np.linalg.norm(symbols) or 1.0)
        odds = np.sqrt(self.biases / (1 - self.biases))
        return -unit * odds, unit / odds


def _look_up(table: NDArray[np.float64], packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(U,) the sum over the bytes of each word: an eighth of the work of a product with its bits."""
    places = packed + 256 * np.arange(len(table))
    return np.asarray(table.reshape(-1).take(places).sum(1))
