"""Watermarks that are read from weights and activations."""

from __future__ import annotations

from sealmark.core import registry


def test_scheme(name, check, bench):
    scheme = registry.scheme(name)
    check.run(scheme, bench.of(scheme))
