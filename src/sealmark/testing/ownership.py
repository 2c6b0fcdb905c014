"""Properties of schemes that verify ownership."""

from __future__ import annotations

import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sealmark.core.errors import AccessError, ForgedSecretError
from sealmark.core.evidence import DEFAULT_ALPHA, Verdict
from sealmark.core.ownership import Verifiable, Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, Suspect, WeightFile, WhiteBox
from sealmark.core.weights import ModelWeights, save_model
from sealmark.stats.calibration import super_uniformity
from sealmark.testing.bench import Bench
from sealmark.testing.general import refuses

_WRONG = 40


def check_protected_model_matches(scheme: Verifiable, bench: Bench) -> None:
    """The model is recognized, with a p-value that says how sure, as far as the null can reach."""
    model, secret = bench.protect(scheme)
    evidence = scheme.verify(WhiteBox(model), secret, alpha=level(scheme, model, secret))
    assert evidence.verdict is Verdict.MATCH, evidence
    assert evidence.p_value <= evidence.alpha


def check_strangers_do_not_match(scheme: Verifiable, bench: Bench) -> None:
    """Independent models do not match, with the real secret or with fresh ones, and p-values hold."""
    _, secret = bench.protect(scheme)
    fresh = range(9) if scheme.has_key else ()
    secrets = [secret, *(bench.fresh(scheme, seed) for seed in fresh)]
    found = [scheme.verify(WhiteBox(stranger), key) for stranger in bench.strangers for key in secrets]
    _assert_null(found)


def check_wrong_secrets_do_not_match(scheme: Verifiable, bench: Bench) -> None:
    """On the protected model itself, fresh secrets do not match, and p-values hold."""
    if not scheme.has_key:
        return
    model, _ = bench.protect(scheme)
    _assert_null([scheme.verify(WhiteBox(model), bench.fresh(scheme, 50 + i)) for i in range(_WRONG)])


def check_verdict_needs_a_null_that_reaches(scheme: Verifiable, bench: Bench) -> None:
    """Asked for more certainty than its null can give, a scheme says INCONCLUSIVE, even on its own model."""
    model, secret = bench.protect(scheme)
    floor = scheme.score(WhiteBox(model), secret).null.floor
    if floor > np.log(1e-6) - np.log(1e300):
        evidence = scheme.verify(WhiteBox(model), secret, tries=1e300)
        assert evidence.verdict is Verdict.INCONCLUSIVE, evidence


def check_tries_are_paid_for(scheme: Verifiable, bench: Bench) -> None:
    """Searching among more hypotheses weakens the evidence."""
    model, secret = bench.protect(scheme)
    once = scheme.verify(WhiteBox(model), secret)
    often = scheme.verify(WhiteBox(model), secret, tries=1e3)
    assert often.log10_p >= min(0.0, once.log10_p + 2.99)


def check_access_is_refused(scheme: Verifiable, bench: Bench) -> None:
    """A suspect that does not show what the scheme reads is refused before any query."""
    _, secret = bench.protect(scheme)
    with tempfile.TemporaryDirectory() as folder:
        save_model(bench.plain, Path(folder) / "weights")
        closed: list[Suspect] = [
            WeightFile(Path(folder) / "weights"),
            BlackBox(lambda inputs: torch.zeros(len(inputs)), returns="label"),
        ]
        refused = [suspect for suspect in closed if scheme.access & suspect.access != scheme.access]
        assert refused, "the scheme asks for nothing"
        for suspect in refused:
            assert refuses(AccessError, partial(scheme.verify, suspect, secret))
            assert suspect.queries == 0


def check_suspect_is_untouched(scheme: Verifiable, bench: Bench) -> None:
    """Verification changes neither weights nor modes, and gives the same answer twice."""
    model, secret = bench.protect(scheme)
    model.train()
    before = ModelWeights(model).digest()
    first, second = (scheme.verify(WhiteBox(model), secret) for _ in range(2))
    assert model.training, "the suspect's mode was changed"
    assert ModelWeights(model).digest() == before
    assert first == second


def check_forged_parts_are_refused(scheme: Verifiable, bench: Bench) -> None:
    """A secret that carries a part of its own instead of the derived one is refused.

    What an owner may choose himself is committed before anything else is drawn, and is no forgery.
    """
    model, secret = bench.protect(scheme)
    chosen = scheme.choices if isinstance(scheme, Watermark) else frozenset()
    for name, derived in scheme.derive(secret).items():
        if name in chosen:
            continue
        carried = scheme.new_secret(
            ModelWeights(bench.plain), host=secret.host, tensors={**secret.tensors, name: derived * 0 - 1}
        )
        verify = partial(scheme.verify, WhiteBox(model), carried)
        assert refuses(ForgedSecretError, verify), name


def check_evidence_is_plain(scheme: Verifiable, bench: Bench) -> None:
    """Evidence can be written as JSON, names its null and its commitment, and shows no secret."""
    model, secret = bench.protect(scheme)
    evidence = scheme.verify(WhiteBox(model), secret)
    text = json.dumps(evidence.as_dict(), allow_nan=False)
    assert secret.commitment in text
    assert secret.reveal_seed().hex() not in text
    assert evidence.null


def level(scheme: Verifiable, model: nn.Module, secret: Secret) -> float:
    """The usual level, or the least that the scheme's null can reach, up to 5 %."""
    floor = scheme.score(WhiteBox(model), secret).null.floor
    return max(DEFAULT_ALPHA, min(0.05, 1.001 * math.exp(floor)))


def _assert_null(found: list[Any]) -> None:
    matched = [evidence for evidence in found if evidence.verdict is Verdict.MATCH]
    assert not matched, f"{len(matched)} false matches, for one {matched[:1]}"
    p_values = [evidence.p_value for evidence in found]
    if len(p_values) < 10:
        assert sum(p <= 0.05 for p in p_values) <= 1, f"p-values are too small under the null: {p_values}"
        return
    fit = super_uniformity(p_values)
    assert fit > 1e-4, f"p-values are too small under the null: {fit:.2g}"
