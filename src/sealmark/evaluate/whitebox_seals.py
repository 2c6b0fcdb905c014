"""Figures of the seals: what any change does to them, and what takes them off."""

from __future__ import annotations

import copy
import dataclasses
from typing import cast

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.errors import MarkFailedError
from sealmark.core.evidence import Verdict
from sealmark.core.integrity import Seal
from sealmark.core.task import Recipe
from sealmark.core.training import train
from sealmark.evaluate.measure import Figures, Ground
from sealmark.evaluate.steps import flip_bit, same_bits
from sealmark.integrity.mimosanet import merge_colinear
from sealmark.integrity.reversible import Reversible

_FLIPS = 30


def seal_rows(base: Ground) -> dict[str, Figures]:
    """Both seals on the plain model of one seed, by name."""
    rows = {name: _kept(base, cast("Seal", registry.scheme(name))) for name in ("reversible", "mimosanet")}
    rows["reversible"]["capacity, bits"] = float(Reversible().capacity(base.plain))
    sealed = cast("Seal", registry.scheme("mimosanet")).seal(base.plain, rng=base.generator("mimosanet")).model
    for name, model in (("mimosanet", sealed), ("the plain model", base.plain)):
        rows.setdefault(name, {}).update(_changed(base, model))
    rows["mimosanet, neurons merged"] = _changed(base, merge_colinear(sealed))
    return rows


def _kept(base: Ground, scheme: Seal) -> Figures:
    sealed = scheme.seal(base.plain, base.task, rng=base.generator(f"seal {scheme.name}"))
    found = 0
    for number in range(_FLIPS):
        changed, _ = flip_bit(sealed.model, base.generator(f"flip {number}"))
        found += scheme.check(changed, sealed.secret).verdict is Verdict.NO_MATCH
    return {
        "accuracy before": base.accuracy,
        "accuracy sealed": base.task.score(sealed.model),
        "log10 p, intact": scheme.check(sealed.model, sealed.secret).log10_p,
        "flipped bits found, share": found / _FLIPS,
        "restored bit for bit": float(same_bits(scheme.restore(sealed.model, sealed.secret), base.plain)),
    }


def _changed(base: Ground, model: nn.Module) -> Figures:
    """Accuracy after noise, after training and after storing in fewer bits."""
    found: Figures = {}
    for share in (1e-4, 1e-3, 1e-2):
        noisy, rng = copy.deepcopy(model), base.generator(f"noise {share}")
        with torch.no_grad():
            for parameter in noisy.parameters():
                noise = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
                parameter.mul_(1 + share * noise)
        found[f"accuracy, noise of {share:.2%} of each weight"] = base.task.score(noisy)
    for epochs, rate, clip in ((1, 0.01, 0.0), (20, 0.05, 1.0)):
        recipe = dataclasses.replace(base.recipe, epochs=epochs, rate=rate, clip=clip)
        name = f"accuracy, {epochs} epochs at {rate:g}{', clipped' if clip else ''}"
        found[name] = _trained(base, model, recipe)
    for bits in (torch.bfloat16, torch.float16):
        rounded = copy.deepcopy(model).to(bits).float()
        found[f"accuracy, stored in {str(bits).removeprefix('torch.')}"] = base.task.score(rounded)
    return found


def _trained(base: Ground, model: nn.Module, recipe: Recipe) -> float:
    tuned, rng = copy.deepcopy(model), base.generator(f"tuning {recipe}")
    try:
        train(tuned, base.task.attacker, loss=base.task.loss, recipe=recipe, rng=rng)
    except MarkFailedError:  # the training diverged: the weights are no numbers any more
        return base.task.chance
    return base.task.score(tuned)
