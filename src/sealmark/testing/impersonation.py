"""Properties of attacks on credentials."""

from __future__ import annotations

import numpy as np
import torch

from sealmark.core.attack import Resources
from sealmark.core.errors import ParameterError
from sealmark.core.impersonation import Impersonation, Spoils
from sealmark.identity.backdoor_marks import BackdoorMarks
from sealmark.testing.bench import USERS, Bench
from sealmark.testing.general import refuses


def check_it_makes_rows_to_show(attack: Impersonation, bench: Bench) -> None:
    """Rows of the model's shape, finite, the same from the same randomness, and nothing is changed."""
    spoils = _spoils(bench, attack.card.copies)
    held = [tensor.clone() for credential in spoils.credentials for tensor in credential.tensors.values()]
    resources = Resources.of(bench.task)
    first, second = (attack.run(spoils, resources, rng=np.random.default_rng(0)) for _ in range(2))
    assert list(first.rows.shape[1:]) == spoils.shape
    assert len(first.rows) > 0
    assert first.rows.isfinite().all()
    assert torch.equal(first.rows, second.rows)
    after = [tensor for credential in spoils.credentials for tensor in credential.tensors.values()]
    assert all(torch.equal(one, other) for one, other in zip(held, after, strict=True))


def check_too_few_credentials_are_refused(attack: Impersonation, bench: Bench) -> None:
    """An attack that takes credentials says how many."""
    if attack.card.copies:
        spoils = _spoils(bench, attack.card.copies - 1)
        run = lambda: attack.run(spoils, Resources.of(bench.task), rng=np.random.default_rng(0))  # noqa: E731
        assert refuses(ParameterError, run)


def _spoils(bench: Bench, users: int) -> Spoils:
    """Of a scheme whose credentials are images."""
    mark = BackdoorMarks()
    credentials = [bench.credential(mark, user) for user in USERS[:users]]
    return Spoils(mark, bench.enrolled(mark), credentials)
