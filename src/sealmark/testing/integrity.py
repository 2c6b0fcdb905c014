"""Properties of seals."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from sealmark.core.errors import ForgedSecretError, ParameterError, TamperedError
from sealmark.core.evidence import Verdict
from sealmark.core.integrity import Seal
from sealmark.core.secret import Secret
from sealmark.testing.bench import Bench, same_bits
from sealmark.testing.general import refuses

_FLIPS = 30


def check_sealed_model_is_intact(scheme: Seal, bench: Bench) -> None:
    """An untouched sealed model is found intact and opens to the original, bit for bit."""
    model, secret = bench.protect(scheme)
    assert scheme.check(model, secret).verdict is Verdict.MATCH
    assert same_bits(scheme.restore(model, secret), bench.plain)
    assert not same_bits(model, bench.plain), "sealing changed nothing"


def check_fidelity(scheme: Seal, bench: Bench) -> None:
    """The seal costs no more of the metric than its card allows."""
    model, _ = bench.protect(scheme)
    drop = bench.accuracy(bench.plain) - bench.accuracy(model)
    assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}"


def check_every_flipped_bit_is_found(scheme: Seal, bench: Bench) -> None:
    """One flipped bit anywhere is found, placed in its tensor or channel, and the model is not restored."""
    model, secret = bench.protect(scheme)
    rng = np.random.default_rng(5)
    for _ in range(_FLIPS):
        spoiled, name, channel = _flip(model, rng)
        evidence = scheme.check(spoiled, secret)
        assert evidence.verdict is Verdict.NO_MATCH, f"a flipped bit in {name} was not found"
        assert evidence.details["changed"], evidence
        if "channels" in evidence.details and evidence.details["changed"] == [name] and channel is not None:
            assert evidence.details["channels"] == {name: [channel]}, evidence
        assert refuses(TamperedError, partial(scheme.restore, spoiled, secret))


def check_other_models_and_records_fail(scheme: Seal, bench: Bench) -> None:
    """The unsealed original, another model and another record are not found intact."""
    model, secret = bench.protect(scheme)
    for other in (bench.plain, bench.strangers[0]):
        assert scheme.check(other, secret).verdict is Verdict.NO_MATCH
    assert scheme.check(model, bench.fresh(scheme, 0)).verdict is Verdict.NO_MATCH


def check_foreign_records_are_refused(scheme: Seal, bench: Bench) -> None:
    """A record of another scheme, or with tensors of somebody else's, neither checks nor restores."""
    model, secret = bench.protect(scheme)
    foreign = Secret(secret.reveal_seed(), secret.facts | {"scheme": "another"}, secret.tensors)
    stuffed = Secret(secret.reveal_seed(), secret.facts, {**secret.tensors, "foreign": bench.task.test.inputs[:1]})
    for record, error in ((foreign, ParameterError), (stuffed, ForgedSecretError)):
        assert refuses(error, partial(scheme.check, model, record))
        assert refuses(error, partial(scheme.restore, model, record))


def _flip(model: nn.Module, rng: np.random.Generator) -> tuple[nn.Module, str, int | None]:
    """A copy with one bit flipped; in which tensor, and in which of its channels where it has several."""
    spoiled = copy.deepcopy(model)
    tensors = {k: v for k, v in spoiled.state_dict().items() if v.is_floating_point()}
    name = sorted(tensors)[int(rng.integers(len(tensors)))]
    raw = tensors[name].reshape(-1).view(torch.uint8)
    place, channels = int(rng.integers(len(raw))), len(tensors[name]) if tensors[name].dim() >= 2 else 1
    raw[place] ^= 1 << int(rng.integers(8))
    return spoiled, name, place * channels // len(raw) if channels > 1 else None
