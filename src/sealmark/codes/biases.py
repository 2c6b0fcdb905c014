"""Laws of the biases of a collusion-resistant code: how likely a 1 is at a position."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sealmark.core.errors import ParameterError
from sealmark.crypto.random import Stream

DISCRETE_UP_TO = 10  # colluders; above, the arcsine law's convergence makes up for its heavier tails
UNIT = 2**16  # biases are multiples of its inverse, so that a 16-bit draw meets them exactly

Law = Literal["auto", "nuida", "arcsine"]


def nuida(colluders: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The optimal discrete law against ``colluders`` (Nuida et al., DCC 52, 2009).

    The k = ceil(c / 2) biases are the zeros of the Legendre polynomial P_k, moved to (0, 1); their
    chances go with ``(p (1 - p))^(-3/2) / P'_k(2 p - 1)^2``.

    Returns:
        Biases, ascending, and their chances: (k,) each.

    Raises:
        ParameterError: fewer than one colluder.

    Example:
        >>> [x.round(5).tolist() for x in nuida(3)]
        [[0.21132, 0.78868], [0.5, 0.5]]
    """
    if colluders < 1:
        raise ParameterError("bad number of colluders", expected="1 or more", found=colluders)
    zeros, weights = np.polynomial.legendre.leggauss((colluders + 1) // 2)
    biases = (1 + zeros) / 2
    # Gauss weights are 2 / ((1 - x^2) P'(x)^2), which leaves the derivative out of the formula
    chances = weights * (1 - zeros**2) * (biases * (1 - biases)) ** -1.5
    return biases, chances / chances.sum()


def arcsine(colluders: int, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tardos's law with his cutoff t = 1 / (300 c) (STOC 2003), by inversion of ``uniform`` draws.

    Example:
        >>> arcsine(20, np.array([0.0, 0.5, 1.0])).round(6).tolist()
        [0.000167, 0.5, 0.999833]
    """
    least = math.asin(math.sqrt(1 / (300 * colluders)))
    return np.asarray(np.sin(least + uniform * (math.pi / 2 - 2 * least)) ** 2)


def draw_biases(stream: Stream, length: int, colluders: int, law: Law = "auto") -> NDArray[np.float64]:
    """Secret biases of a code: (length,), multiples of 2**-16 from 2**-16 to 1 - 2**-16.

    The rounding costs nothing in proof, since scores and their law know the rounded ones. Above 218
    colluders the least of them takes the place of Tardos's cutoff, which is smaller.

    Args:
        stream: of the secret.
        length: positions.
        colluders: the coalition that the code is made for.
        law: "nuida", "arcsine", or "auto": Nuida's up to ten colluders, the arcsine law above.

    Raises:
        ParameterError: another law.
    """
    if law not in get_args(Law):
        raise ParameterError("unknown law of biases", expected=" or ".join(get_args(Law)), found=law)
    uniform = stream.uniform(length)
    if law == "nuida" or (law == "auto" and colluders <= DISCRETE_UP_TO):
        points, chances = nuida(colluders)
        biases = points[np.searchsorted(np.cumsum(chances[:-1]), uniform)]
    else:
        biases = arcsine(colluders, uniform)
    return np.clip(np.rint(biases * UNIT), 1, UNIT - 1) / UNIT


def code_length(users: int, colluders: int, error: float) -> int:
    """How many positions are asymptotically enough: ``(pi^2 / 2) c^2 ln(n / error)``.

    Laarhoven and de Weger (DCC 74, 2015), for the symmetric score and hard decisions: the limit for many
    colluders, 4.93 % of Tardos's ``100 c^2 ln(n / error)``. It is no promise for few of them, nor for the
    stricter bound that `TardosCode.null` is. Measured under that bound, by `benchmarks/tracing.py`, it is more
    than enough for 2 to 10: of 600 coalitions of each size, in six strategies, every one lost a member (10^4
    users, error 1e-3, Nuida's law).

    Args:
        users: n.
        colluders: c, who work together.
        error: chance of accusing anyone innocent, over all users together.

    Raises:
        ParameterError: users or colluders under 1, or the error not in (0, 1).

    Example:
        >>> code_length(10**4, 3, 1e-3), code_length(10**6, 3, 1e-3)
        (716, 921)
    """
    if users < 1 or colluders < 1 or not 0 < error < 1:
        raise ParameterError(
            "bad demands on a code",
            expected="users and colluders >= 1, error in (0, 1)",
            found=(users, colluders, error),
        )
    return math.ceil(math.pi**2 / 2 * colluders**2 * math.log(users / error))
