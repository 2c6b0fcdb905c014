"""Named checks: one a property, chosen by the kind of scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sealmark.core.attack import Attack
from sealmark.core.identity import UserMark
from sealmark.core.integrity import WeightSeal
from sealmark.core.lock import Lock
from sealmark.core.ownership import Verifiable, Watermark
from sealmark.core.scheme import Scheme
from sealmark.testing import attacks, general, identity, integrity, locks, ownership, watermarks
from sealmark.testing.bench import Bench


@dataclass(frozen=True)
class Check:
    """One property of one scheme or attack.

    Attributes:
        name: what is claimed.
        run: raises AssertionError when the claim does not hold.
    """

    name: str
    run: Callable[[Any, Bench], None]


_KINDS: tuple[tuple[type, Any], ...] = (
    (Scheme, general),
    (Verifiable, ownership),
    (Watermark, watermarks),
    (Lock, locks),
    (UserMark, identity),
    (WeightSeal, integrity),
)


def scheme_checks(scheme: Scheme) -> Iterator[Check]:
    """All checks that apply to a scheme of this kind."""
    for kind, home in _KINDS:
        if isinstance(scheme, kind):
            yield from _checks(home)


def attack_checks() -> Iterator[Check]:
    """All checks that apply to an attack."""
    yield from _checks(attacks)


def check_scheme(scheme: Scheme, bench: Bench | None = None) -> None:
    """Run every check on a scheme.

    Raises:
        AssertionError: a property does not hold; the message names it.
    """
    bench = bench or Bench()
    for check in scheme_checks(scheme):
        _run(check, scheme, bench)


def check_attack(attack: Attack, bench: Bench | None = None) -> None:
    """Run every check on an attack.

    Raises:
        AssertionError: a property does not hold; the message names it.
    """
    bench = bench or Bench()
    for check in attack_checks():
        _run(check, attack, bench)


def _run(check: Check, subject: Any, bench: Bench) -> None:
    try:
        check.run(subject, bench)
    except AssertionError as error:
        raise AssertionError(f"{subject}: {check.name}: {error}") from error


def _checks(home: Any) -> Iterator[Check]:
    for name, value in sorted(vars(home).items()):
        if name.startswith("check_"):
            yield Check(name.removeprefix("check_").replace("_", " "), value)
