"""Every scheme and every attack enrolls itself, and has every property of its kind."""

from __future__ import annotations

import pytest

from sealmark.core import registry
from sealmark.testing import Bench, attack_checks, scheme_checks

SCHEMES = [(name, check) for name in registry.items("scheme") for check in scheme_checks(registry.scheme(name))]
ATTACKS = [(name, check) for name in registry.items("attack") for check in attack_checks(registry.attack(name))]


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(("name", "check"), [pytest.param(*c, id=f"{c[0]}: {c[1].name}") for c in SCHEMES])
def test_scheme(name, check, bench):
    scheme = registry.scheme(name)
    check.run(scheme, bench.of(scheme))


@pytest.mark.parametrize(("name", "check"), [pytest.param(*c, id=f"{c[0]}: {c[1].name}") for c in ATTACKS])
def test_attack(name, check, bench):
    check.run(registry.attack(name), bench)
