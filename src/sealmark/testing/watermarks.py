"""Properties of watermarks: the model is changed, by training."""

from __future__ import annotations

import numpy as np

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.ownership import Watermark
from sealmark.core.suspect import Access, WhiteBox
from sealmark.testing.bench import Bench
from sealmark.testing.general import refuses
from sealmark.testing.ownership import level


def check_fidelity(scheme: Watermark, bench: Bench) -> None:
    """The mark costs no more of the metric than its card allows, in the mean over three trainings.

    One training says little: two unmarked models differ by as much as the bound.
    """
    drops = []
    for seed in range(3):
        model, _ = bench.protect(scheme) if seed == 0 else bench.embed(scheme, seed)
        drops.append(bench.accuracy(bench.twin(seed)) - bench.accuracy(model))
    drop = sum(drops) / len(drops)
    assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}, each time {drops}"


def check_unmarked_twin_fails_the_check(scheme: Watermark, bench: Bench) -> None:
    """`check_embedded` lets the marked model pass and refuses the unmarked one."""
    model, secret = bench.protect(scheme)
    scheme.check_embedded(model, secret)
    assert refuses(MarkFailedError, lambda: scheme.check_embedded(bench.plain, secret))


def check_rearranged_neurons_are_put_back(scheme: Watermark, bench: Bench) -> None:
    """A mark in weights or activations is read again from permuted neurons, with the owner's original.

    And aligning makes no mark on independent models.
    """
    if not scheme.access & (Access.WEIGHTS | Access.MODULE):
        return
    model, secret = bench.protect(scheme)
    original = bench.twin(0) if scheme.card.needs_trained else model
    attack = registry.modification("permute")
    moved = attack.run(model, Resources.of(bench.task, 0.0), rng=np.random.default_rng(0)).model
    alpha = level(scheme, model, secret)
    assert scheme.verify(WhiteBox(moved), secret, alpha=alpha, original=original).verdict is Verdict.MATCH
    for stranger in bench.strangers:
        found = scheme.verify(WhiteBox(stranger), secret, original=original)
        assert found.verdict is not Verdict.MATCH, found


def check_needless_payload_is_refused(scheme: Watermark, bench: Bench) -> None:
    """What a scheme cannot carry, or derives by itself, is refused at keygen."""
    if not scheme.carries_payload:
        assert refuses(ParameterError, lambda: scheme.keygen(bench.plain, bench.task, payload=b"x"))
    odd = {"no such choice": bench.task.test.inputs}
    assert refuses(ParameterError, lambda: scheme.keygen(bench.plain, bench.task, chosen=odd))
