"""Named checks: one a property, chosen by the kind of scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sealmark.core import registry
from sealmark.core.attack import Attack, Forgery, Modification
from sealmark.core.credentials import CredentialMark
from sealmark.core.identity import UserMark
from sealmark.core.impersonation import Impersonation
from sealmark.core.integrity import Seal, WeightSeal
from sealmark.core.lock import Lock
from sealmark.core.ownership import Verifiable, Watermark
from sealmark.core.scheme import Scheme
from sealmark.core.unlocking import Unlocking
from sealmark.testing import (
    attacks,
    credentials,
    forgeries,
    general,
    identity,
    impersonation,
    integrity,
    locks,
    ownership,
    unlocking,
    watermarks,
    weight_seals,
)
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
    (CredentialMark, credentials),
    (Seal, integrity),
    (WeightSeal, weight_seals),
    (Modification, attacks),
    (Forgery, forgeries),
    (Unlocking, unlocking),
    (Impersonation, impersonation),
)


def scheme_checks(scheme: Scheme) -> Iterator[Check]:
    """All checks that apply to a scheme of this kind."""
    return _checks_of(scheme)


def attack_checks(attack: Attack) -> Iterator[Check]:
    """All checks that apply to an attack of this kind."""
    return _checks_of(attack)


def check_scheme(scheme: Scheme, bench: Bench | None = None) -> None:
    """Run every check on a scheme.

    Raises:
        AssertionError: a property does not hold; the message names it.
    """
    bench = bench or Bench(registry.task(scheme.card.task))
    for check in scheme_checks(scheme):
        _run(check, scheme, bench)


def check_attack(attack: Attack, bench: Bench | None = None) -> None:
    """Run every check on an attack.

    Raises:
        AssertionError: a property does not hold; the message names it.
    """
    bench = bench or Bench()
    for check in attack_checks(attack):
        _run(check, attack, bench)


def _run(check: Check, subject: Any, bench: Bench) -> None:
    try:
        check.run(subject, bench)
    except AssertionError as error:
        raise AssertionError(f"{subject}: {check.name}: {error}") from error


def _checks_of(subject: Any) -> Iterator[Check]:
    for kind, home in _KINDS:
        if isinstance(subject, kind):
            yield from _checks(home)


def _checks(home: Any) -> Iterator[Check]:
    for name, value in sorted(vars(home).items()):
        if name.startswith("check_"):
            yield Check(name.removeprefix("check_").replace("_", " "), value)
