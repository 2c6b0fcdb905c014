"""Properties of seals."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from sealmark.core.errors import TamperedError
from sealmark.core.evidence import Verdict
from sealmark.core.integrity import WeightSeal
from sealmark.core.weights import ModelWeights
from sealmark.testing.bench import Bench, same_bits
from sealmark.testing.general import refuses

_FLIPS = 30


def check_sealed_model_is_intact(scheme: WeightSeal, bench: Bench) -> None:
    """An untouched sealed model is found intact and opens to the original, bit for bit."""
    model, secret = bench.protect(scheme)
    assert scheme.check(model, secret).verdict is Verdict.MATCH
    assert same_bits(scheme.restore(model, secret), bench.plain)
    assert not same_bits(model, bench.plain), "sealing changed nothing"


def check_fidelity(scheme: WeightSeal, bench: Bench) -> None:
    """The seal costs no more of the metric than its card allows."""
    model, _ = bench.protect(scheme)
    drop = bench.accuracy(bench.plain) - bench.accuracy(model)
    assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}"


def check_every_flipped_bit_is_found(scheme: WeightSeal, bench: Bench) -> None:
    """One flipped bit anywhere is found, placed in its tensor, and the model is not restored."""
    model, secret = bench.protect(scheme)
    rng = np.random.default_rng(5)
    for _ in range(_FLIPS):
        spoiled, name = _flip(model, rng)
        evidence = scheme.check(spoiled, secret)
        assert evidence.verdict is Verdict.NO_MATCH, f"a flipped bit in {name} was not found"
        assert evidence.details["changed"], evidence
        assert refuses(TamperedError, partial(scheme.restore, spoiled, secret))


def check_other_models_and_records_fail(scheme: WeightSeal, bench: Bench) -> None:
    """The unsealed original, another model and another record are not found intact."""
    model, secret = bench.protect(scheme)
    for other in (bench.plain, bench.strangers[0]):
        assert scheme.check(other, secret).verdict is Verdict.NO_MATCH
    assert scheme.check(model, bench.fresh(scheme, 0)).verdict is Verdict.NO_MATCH


def check_file_form(scheme: WeightSeal, bench: Bench) -> None:
    """A file is sealed, checked and restored to the very same bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, sealed, opened = (folder / stem for stem in ("a.safetensors", "b.safetensors", "c.safetensors"))
        save_file(dict(ModelWeights(bench.plain)), plain)
        secret = scheme.seal_file(plain, sealed)
        assert scheme.check(sealed, secret).verdict is Verdict.MATCH
        scheme.restore_file(sealed, opened, secret)
        assert opened.read_bytes() == plain.read_bytes()
        assert refuses(TamperedError, lambda: scheme.restore_file(plain, folder / "d", secret))
        assert not (folder / "d").exists()


def _flip(model: nn.Module, rng: np.random.Generator) -> tuple[nn.Module, str]:
    spoiled = copy.deepcopy(model)
    tensors = {k: v for k, v in spoiled.state_dict().items() if v.is_floating_point()}
    name = sorted(tensors)[int(rng.integers(len(tensors)))]
    raw = tensors[name].reshape(-1).view(torch.uint8)
    raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    return spoiled, name
