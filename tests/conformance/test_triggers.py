"""Watermarks that are read from answers to triggers."""

from __future__ import annotations

from sealmark.core import registry


def test_scheme(name, check, bench):
    scheme = registry.scheme(name)
    check.run(scheme, bench.of(scheme))
