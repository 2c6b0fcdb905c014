"""Properties of user marks."""

from __future__ import annotations

import numpy as np

from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.identity import UserMark
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import Weights, weights_of
from sealmark.stats.calibration import super_uniformity
from sealmark.testing.bench import USERS, Bench, same_bits, users_of
from sealmark.testing.general import refuses


def check_fidelity(scheme: UserMark, bench: Bench) -> None:
    """A copy costs no more of the metric than the card allows."""
    copy, _ = bench.protect(scheme)
    drop = bench.accuracy(bench.plain) - bench.accuracy(copy)
    assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}"


def check_copies_are_personal(scheme: UserMark, bench: Bench) -> None:
    """A user gets the same copy again; another user gets another; neither is the original."""
    copy, secret = bench.protect(scheme)
    assert same_bits(scheme.issue(bench.plain, secret, USERS[0], task=bench.task).model, copy)
    assert not same_bits(scheme.issue(bench.plain, secret, USERS[1], task=bench.task).model, copy)
    assert not same_bits(copy, bench.plain)


def check_leak_is_traced(scheme: UserMark, bench: Bench) -> None:
    """A leaked copy names its user and nobody else."""
    copy, secret = bench.protect(scheme)
    accusation = scheme.trace(WhiteBox(copy), secret, users_of(scheme), original=bench.plain)
    assert [entry.user for entry in accusation.accused] == [USERS[0]], accusation
    assert accusation.verdict is Verdict.MATCH


def check_innocent_suspects_accuse_nobody(scheme: UserMark, bench: Bench) -> None:
    """The untouched original and independent models accuse nobody."""
    _, secret = bench.protect(scheme)
    for suspect in (bench.plain, *bench.strangers):
        accusation = scheme.trace(WhiteBox(suspect), secret, USERS, original=bench.plain)
        assert not accusation.accused, accusation


def check_wrong_secret_accuses_nobody(scheme: UserMark, bench: Bench) -> None:
    """With another owner's secret a leak names nobody."""
    copy, _ = bench.protect(scheme)
    for seed in range(3):
        wrong = bench.fresh(scheme, seed)
        assert not scheme.trace(WhiteBox(copy), wrong, USERS, original=bench.plain).accused


def check_innocents_p_values_hold(scheme: UserMark, bench: Bench) -> None:
    """P-values of users who leaked nothing are not too small, whoever did leak."""
    copy, secret = bench.protect(scheme)
    found = scheme.suspicion(WhiteBox(copy), secret, users_of(scheme)[1:], original_of(bench))
    p_values = [float(np.exp(found.null.log_p(value))) for value in found.statistics]
    fit = super_uniformity(p_values)
    assert fit > 1e-4, f"p-values of innocents are too small: {fit:.2g}"


def check_authentication(scheme: UserMark, bench: Bench) -> None:
    """A copy is recognized as its user's and not as another's."""
    copy, secret = bench.protect(scheme)
    right = scheme.authenticate(WhiteBox(copy), secret, USERS[0], original=bench.plain)
    wrong = scheme.authenticate(WhiteBox(copy), secret, USERS[1], original=bench.plain)
    assert (right.verdict, wrong.verdict) == (Verdict.MATCH, Verdict.NO_MATCH)


def check_bad_calls_are_refused(scheme: UserMark, bench: Bench) -> None:
    """No users, a user twice, no name, and a secret of another model are errors."""
    copy, secret = bench.protect(scheme)
    suspect, other = WhiteBox(copy), bench.strangers[0]
    assert refuses(ParameterError, lambda: scheme.trace(suspect, secret, [], original=bench.plain))
    assert refuses(ParameterError, lambda: scheme.trace(suspect, secret, ["a", "a"], original=bench.plain))
    assert refuses(ParameterError, lambda: scheme.issue(bench.plain, secret, "", task=bench.task))
    assert refuses(ModelMismatchError, lambda: scheme.issue(other, secret, USERS[0], task=bench.task))
    assert refuses(ModelMismatchError, lambda: scheme.trace(suspect, secret, USERS[:1], original=other))


def original_of(bench: Bench) -> Weights:
    """The owner's original, as weights."""
    return weights_of(bench.plain)
