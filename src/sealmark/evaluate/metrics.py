"""Figures of merit: what protection costs, and what an attack on it gains.

All take the task's metric (higher is better, accuracy as a rule) as numbers. Where a figure has no
meaning it is None, which plain JSON can hold, and never a number that somebody might average.
"""

from __future__ import annotations

from collections.abc import Sequence

from sealmark.core.errors import ParameterError


def attacker_gain(attacked: float, scratch: float, plain: float) -> float | None:
    """What the stolen model was worth: ``AG = (A_attacked - A_scratch) / (A_plain - A_scratch)``.

    0 or less: the attacker had done as well without it, from a random start with the same data and
    effort. 1: the protection is broken.

    Args:
        attacked: of the surrogate.
        scratch: of what the same attacker trains from scratch; see `Modification.scratch`.
        plain: of the unprotected model.

    Returns:
        None where ``plain`` is no better than ``scratch``: nothing was there to be gained.

    Example:
        >>> attacker_gain(attacked=0.875, scratch=0.75, plain=1.0)
        0.5
        >>> attacker_gain(attacked=0.875, scratch=0.75, plain=0.75) is None
        True
    """
    worth = plain - scratch
    return (attacked - scratch) / worth if worth > 0 else None


def lock_strength(authorized: float, unauthorized: float, chance: float) -> float | None:
    """How useless a locked model is: ``LS = (A_auth - A_unauth) / (A_auth - chance)``, cut to 0 .. 1.

    Args:
        authorized: with the right key.
        unauthorized: the best of no key, wrong keys and near keys.
        chance: of a useless model, ``1 / K`` for K balanced classes.

    Returns:
        1 where the locked model is no better than chance; None where the unlocked one is not either.

    Example:
        >>> lock_strength(authorized=1.0, unauthorized=0.4375, chance=0.25)
        0.75
    """
    if authorized <= chance:
        return None
    return min(1.0, max(0.0, (authorized - unauthorized) / (authorized - chance)))


def authorization_gap(authorized: float, no_key: float, wrong_keys: Sequence[float]) -> float:
    """What the key is worth: ``G = A_auth - max(A_none, mean A_wrong)``.

    Args:
        authorized: with the right key.
        no_key: of the model as shipped.
        wrong_keys: with each of some wrong keys; 20 or more for a figure that is published.

    Raises:
        ParameterError: no wrong key.

    Example:
        >>> authorization_gap(1.0, 0.125, [0.25, 0.5])
        0.625
    """
    if not wrong_keys:
        raise ParameterError("no wrong keys", expected="at least one", found=0, advice="try 20")
    return authorized - max(no_key, sum(wrong_keys) / len(wrong_keys))
