"""Attacks on models and on claims."""

from __future__ import annotations

from sealmark.core import registry


def test_attack(name, check, bench):
    check.run(registry.attack(name), bench)
