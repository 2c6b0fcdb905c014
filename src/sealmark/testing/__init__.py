"""Checks that enroll every scheme and attack by themselves; for this package's tests and for yours.

from sealmark.testing import check_scheme
check_scheme(MyScheme())
"""

from __future__ import annotations

from sealmark.testing.bench import Bench
from sealmark.testing.conformance import Check, attack_checks, check_attack, check_scheme, scheme_checks

__all__ = ["Bench", "Check", "attack_checks", "check_attack", "check_scheme", "scheme_checks"]
