"""PRADA (Juuti et al. 2019): does a client ask as people do, or as one who copies the model?

Distances between a person's queries are spread like a normal law. Queries made by small steps from one another
are not: their distances pile up.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import shapiro

from sealmark.core.errors import ParameterError

_FEWEST = 100  # distances before the test says anything, as in the paper
_OUTLIERS = 3.0


@dataclass(frozen=True)
class Alarm:
    """A client whose queries look like extraction.

    Attributes:
        client: who.
        statistic: Shapiro and Wilk's W of the distances; small is suspicious.
        queries: how many the client had asked.
        time: seconds since 1970.
    """

    client: str
    statistic: float
    queries: int
    time: float


class ExtractionDetector:
    """Watches the queries of each client, in bounded memory.

    For each client and predicted class a growing set of queries is kept; a query's distance is the smallest to
    its class's set, and joins the set when it is larger than mean - deviation of those that joined. A client is
    flagged when the distances, without outliers beyond three deviations, have W < ``delta``. Not in the paper:
    the sets and the distances forget the oldest, and W is computed at every so many queries.

    A client who mixes in queries of his own to look normal is not found (Juuti et al., section 6), nor is one
    who copies with natural inputs, as Knockoff does: that is what the watermark is for.

    Args:
        delta: threshold of W; the paper's code has 0.9. Ask your own clients' queries for theirs first.
        every: queries between two tests.
        kept: queries remembered for a class of a client.
        recent: distances remembered for a client.
        clients: remembered at a time; who was silent longest is forgotten first.

    Raises:
        ParameterError: a bound means nothing.

    Example:
        >>> detector, rng = ExtractionDetector(every=150), np.random.default_rng(0)
        >>> any(detector.observe("honest", row, 0) for row in rng.normal(size=(600, 40)))
        False
        >>> steps = np.concatenate([rng.normal(size=(150, 40)), rng.normal(size=(150, 40)) * 0.05])
        >>> any(detector.observe("thief", row, 0) for row in steps)
        True
    """

    def __init__(
        self, delta: float = 0.9, *, every: int = 100, kept: int = 500, recent: int = 1000, clients: int = 1000
    ) -> None:
        if not 0 < delta < 1 or every < 1 or kept < 1 or not _FEWEST < recent <= 5000 or clients < 1:
            raise ParameterError(
                "bad detector",
                expected="0 < delta < 1, every, kept, clients >= 1, 100 < recent <= 5000",
                found=(delta, every, kept, recent, clients),
            )
        self.delta, self.every, self.kept, self.recent, self.clients = delta, every, kept, recent, clients
        self._watched: OrderedDict[str, _Watched] = OrderedDict()

    def observe(self, client: str, query: NDArray[Any], label: int) -> Alarm | None:
        """One more query of a client and the class that the model predicts; the alarm, at its first time.

        Args:
            client: who asked.
            query: of one fixed size.
            label: the model's own answer.
        """
        watched = self._watched.setdefault(client, _Watched(deque(maxlen=self.recent)))
        self._watched.move_to_end(client)
        if len(self._watched) > self.clients:
            self._watched.popitem(last=False)
        row = np.asarray(query, np.float32).reshape(-1)
        grown = watched.classes.get(label)
        if grown is None:
            watched.classes[label] = grown = _GrowingSet(row)
        else:
            watched.distances.append(grown.add(row, self.kept))
        watched.queries += 1
        if watched.flagged or watched.queries % self.every or len(watched.distances) <= _FEWEST:
            return None
        statistic = normality(np.fromiter(watched.distances, np.float64))
        watched.flagged = statistic < self.delta
        return Alarm(client, statistic, watched.queries, time.time()) if watched.flagged else None


@dataclass
class _Watched:
    distances: deque[float]
    classes: dict[int, _GrowingSet] = field(default_factory=dict)
    queries: int = 0
    flagged: bool = False


class _GrowingSet:
    def __init__(self, first: NDArray[np.float32]) -> None:
        self._rows = np.zeros((8, first.size), np.float32)
        self._squares = np.full(8, np.inf, np.float32)  # of a place that is still empty: never the nearest
        self._rows[0], self._squares[0] = first, first @ first
        self._added, self._sum, self._sum_of_squares = 1, 0.0, 0.0  # the first joins at distance 0, as in the paper
        self._threshold = 0.0

    def add(self, row: NDArray[np.float32], kept: int) -> float:
        """The smallest distance of ``row`` to the set, which it joins where it is far enough."""
        nearest = (self._squares - 2 * (self._rows @ row)).argmin()
        difference = self._rows[nearest] - row
        distance = math.sqrt(float(difference @ difference))
        if distance > self._threshold:
            if self._added == len(self._rows) < kept:
                more = min(len(self._rows), kept - len(self._rows))
                self._rows = np.concatenate([self._rows, np.zeros((more, row.size), np.float32)])
                self._squares = np.concatenate([self._squares, np.full(more, np.inf, np.float32)])
            place = self._added % min(len(self._rows), kept)
            self._rows[place], self._squares[place] = row, row @ row
            self._added += 1
            self._sum += distance
            self._sum_of_squares += distance**2
            mean = self._sum / self._added
            spread = math.sqrt(max(0.0, self._sum_of_squares / self._added - mean**2))
            self._threshold = max(self._threshold, mean - spread)
        return distance


def normality(distances: NDArray[np.float64]) -> float:
    """Shapiro and Wilk's W of distances, without those beyond three deviations: 1 for a normal law.

    Equal distances alone are as far from normal as can be: 0.

    Example:
        >>> normality(np.random.default_rng(0).normal(size=500)) > 0.99
        True
    """
    kept = distances[np.abs(distances - distances.mean()) <= _OUTLIERS * distances.std()]
    if len(kept) < 3 or np.ptp(kept) <= 1e-12 * max(1.0, float(np.abs(kept).max())):
        return 0.0
    return float(shapiro(kept).statistic)
