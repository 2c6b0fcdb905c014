"""What is measured of a mark in users' copies: who is named when some of them pool theirs, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, cast

import numpy as np
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.identity import Accusation, UserMark
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.evaluate.measure import Ground
from sealmark.stats.calibration import clopper_pearson

_STRANGERS = 1000  # names without a copy, looked at with every trace
_HOLDERS = 20


@dataclass(frozen=True)
class Pooling:
    """One way to make a surrogate of several copies: attacks, one on what the other left.

    Attributes:
        title: unique.
        steps: names of attacks and their parameters; the first takes all copies.
        least: copies that it takes.
    """

    title: str
    steps: tuple[tuple[str, dict[str, Any]], ...] = ()
    least: int = 2


POOLINGS: tuple[Pooling, ...] = (
    Pooling("as issued", least=1),
    Pooling("average", (("average", {}),)),
    Pooling("median", (("median", {}),), 3),
    Pooling("majority", (("majority", {}),), 3),
    Pooling("minority", (("majority", {"minority": True}),), 3),
    Pooling("minimum", (("extremes", {"side": "low"}),)),
    Pooling("maximum", (("extremes", {"side": "high"}),)),
    Pooling("middle of both", (("extremes", {"side": "middle"}),)),
    Pooling("minimum or maximum", (("extremes", {"side": "either"}),)),
    Pooling("layer by layer", (("interleave", {"by": "layer"}),)),
    Pooling("weight by weight", (("interleave", {"by": "weight"}),)),
    Pooling("average, noise", (("noise", {}),)),
    Pooling("average, 50 % pruned", (("average", {}), ("prune", {"rate": 0.5}))),
    Pooling("average, 4 bits", (("average", {}), ("quantize", {"bits": 4}))),
    Pooling("average, fine-tuned", (("average", {}), ("fine_tune", {}))),
    Pooling("average, marked again", (("average", {}), ("remark", {}))),
)


@dataclass(frozen=True)
class MarkEntry:
    """A mark with its parameters.

    Attributes:
        scheme: public name.
        parameters: other than the defaults.
        sizes: coalitions to try.
        repeats: coalitions of a size, for each seed and each way of pooling.
        ways: of pooling.
    """

    scheme: str
    parameters: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8)
    repeats: int = 5
    ways: tuple[Pooling, ...] = POOLINGS

    @property
    def title(self) -> str:
        """For tables; unique."""
        given = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.scheme} ({given})" if given else self.scheme

    def make(self) -> UserMark:
        """The scheme."""
        return cast("UserMark", registry.scheme(self.scheme, **self.parameters))


MARKS: tuple[MarkEntry, ...] = (
    MarkEntry("spread_spectrum"),
    MarkEntry("spread_spectrum", {"bits": 2048, "colluders": 5, "strength": 0.1}),
    MarkEntry("deepmarks", repeats=3),
)


def copy_figures(base: Ground, entry: MarkEntry) -> dict[str, Any]:
    """A mark on one plain model: every way of pooling by coalitions of every size, and what accuses nobody.

    Returns:
        ``pooled``, by way and size: coalitions tried, those that lost a member, the mean share of members
        named, innocents named and looked at, mean accuracy; ``controls``, models that nobody leaked.
    """
    mark = entry.make()
    names = _names(mark)
    holders, strangers = names[:_HOLDERS], names[_HOLDERS:]
    secret = mark.enroll(base.plain, base.task, users=names, rng=base.generator(f"{entry.title} secret"))
    copies = {user: mark.issue(base.plain, secret, user, task=base.task).model for user in holders}
    scores = [base.task.score(copy) for copy in list(copies.values())[:3]]

    def trace(model: nn.Module) -> Accusation:
        return mark.trace(WhiteBox(model), secret, holders + strangers, original=base.plain)

    return {
        "plain": base.accuracy,
        "copies": scores,
        "holders": len(holders),
        "looked at": len(names),
        "pooled": {
            way.title: {
                str(size): _pooled(base, entry, copies, way, size, trace)
                for size in entry.sizes
                if (size == 1) == (way.least == 1) and size >= way.least
            }
            for way in entry.ways
        },
        "controls": _controls(base, mark, secret, names),
    }


def _names(mark: UserMark) -> list[str]:
    room = mark.places or _HOLDERS + _STRANGERS
    return [f"user {number:04}" for number in range(min(room, _HOLDERS + _STRANGERS))]


def _pooled(
    base: Ground, entry: MarkEntry, copies: dict[str, nn.Module], way: Pooling, size: int, trace: Any
) -> dict[str, Any]:
    rng = base.generator(f"{entry.title} {way.title} {size}")
    named, framed, scores, logs = list[int](), 0, list[float](), list[float]()
    looked = 0
    for _ in range(entry.repeats):
        guilty = set(rng.choice(list(copies), size, replace=False).tolist())
        model = pooled(base, [copies[user] for user in sorted(guilty)], way, rng)
        found = trace(model)
        accused = {ranked.user for ranked in found.accused}
        named.append(len(accused & guilty))
        framed += len(accused - guilty)
        looked += found.users - size
        logs.append(found.ranking[0].log10_p)
        scores.append(base.task.score(model))
    return {
        "coalitions": entry.repeats,
        "caught": sum(count > 0 for count in named),
        "named": fmean(named) / size,
        "innocents named": framed,
        "innocents": looked,
        "log10 p": float(np.median(logs)),
        "accuracy": fmean(scores),
    }


def pooled(base: Ground, copies: list[nn.Module], way: Pooling, rng: np.random.Generator) -> nn.Module:
    """What a coalition makes of its copies; fine-tuning gets a tenth of the attacker's rows."""
    resources, held = Resources.of(base.task, 0.1), copies
    for name, parameters in way.steps:
        held = [registry.modification(name, **parameters).run(held, resources, rng=rng).model]
    return held[0]


def _controls(base: Ground, mark: UserMark, secret: Secret, names: list[str]) -> dict[str, Any]:
    """How many are accused on the original, an untrained model and another owner's copy: nobody, if all is well."""
    other = Secret(base.generator("another secret").bytes(32), secret.facts, secret.tensors)
    issued = mark.issue(base.plain, other, names[0], task=base.task).model
    suspects = {"the original": base.plain, "an untrained model": base.fresh, "another owner's copy": issued}
    return {
        title: len(mark.trace(WhiteBox(model), secret, names, original=base.plain).accused)
        for title, model in suspects.items()
    }


def slug(title: str) -> str:
    """A title as part of a file's name.

    Example:
        >>> slug("spread_spectrum (bits 2048, colluders 5)")
        'spread_spectrum-bits2048-colluders5'
    """
    return title.replace(" (", "-").replace(", ", "-").replace(" ", "").rstrip(")")


def joined(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One cell of several seeds: counts add up, with exact 95 % intervals; the rest is averaged."""
    coalitions = sum(cell["coalitions"] for cell in cells)
    caught = sum(cell["caught"] for cell in cells)
    framed, innocents = (sum(cell[name] for cell in cells) for name in ("innocents named", "innocents"))
    return {
        "coalitions": coalitions,
        "caught": caught,
        "caught interval": clopper_pearson(caught, coalitions),
        "named": fmean(cell["named"] for cell in cells),
        "innocents named": framed,
        "innocents": innocents,
        "innocents bound": clopper_pearson(framed, innocents)[1],
        "log10 p": fmean(cell["log10 p"] for cell in cells),
        "accuracy": fmean(cell["accuracy"] for cell in cells),
    }
