"""Properties of attacks that forge a secret."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from sealmark.core import registry
from sealmark.core.attack import Forgery, ForgeryResult, Resources
from sealmark.core.errors import ForgedSecretError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, Verdict
from sealmark.core.ownership import Fingerprint, Verifiable
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.stats.populations import population_of
from sealmark.testing.bench import Bench
from sealmark.testing.general import refuses


def check_card_is_data(attack: Forgery, bench: Bench) -> None:
    """The card can be read without importing the attack."""
    json.dumps(attack.card.as_dict())
    if attack.name in registry.items("attack"):
        assert registry.item("attack", attack.name).card() == attack.card, "the card is not in literals"


def check_forgery_fits_and_is_refused(attack: Forgery, bench: Bench) -> None:
    """The forged secret fits a model that never had a mark, and `verify` refuses it for not re-deriving.

    A fingerprint has nothing to re-derive: there a judge's own models refuse, which answer the points alike.
    """
    found = 0
    for scheme in _victims(attack):
        forged, suspect = _forge(attack, scheme, bench).secret, WhiteBox(bench.plain)
        score = scheme.score(suspect, forged)
        fits = max(math.log(DEFAULT_ALPHA), score.null.floor + 1e-9)
        assert score.null.log_p(score.statistic) <= fits, f"{scheme}: the forgery does not fit"
        if isinstance(scheme, Fingerprint):
            law = population_of(scheme, forged, map(WhiteBox, bench.references))
            claim = partial(scheme.verify, secret=forged, population=law, alpha=1.001 * math.exp(law.floor))
            innocent = [bench.twin(seed) for seed in range(3)]  # of the judge's rows, as his own models are
            accused = sum(claim(WhiteBox(model)).verdict is Verdict.MATCH for model in innocent)
            assert accused <= 1, f"{scheme}: {accused} innocent models accused, at a level of one in twenty"
        else:
            assert refuses(ForgedSecretError, partial(scheme.verify, suspect, forged)), scheme
        found += 1
    assert found, "the attack fits no scheme"


def check_target_is_untouched(attack: Forgery, bench: Bench) -> None:
    """Forging leaves the model as it is and tells what it cost."""
    before = ModelWeights(bench.plain).digest()
    result = _forge(attack, next(_victims(attack)), bench)
    assert ModelWeights(bench.plain).digest() == before
    assert result.cost.wall_seconds > 0
    assert result.cost.copies == 1


def check_other_schemes_are_refused(attack: Forgery, bench: Bench) -> None:
    """A scheme that the attack does not know is an error."""
    strange = [s for s in map(registry.scheme, registry.items("scheme")) if isinstance(s, Verifiable)]
    for scheme in strange:
        if not attack.fits(scheme):
            assert refuses(UnsupportedError, partial(_forge, attack, scheme, bench))


def _victims(attack: Forgery) -> Iterator[Verifiable]:
    schemes = map(registry.scheme, registry.items("scheme"))
    able = (scheme for scheme in schemes if isinstance(scheme, Verifiable) and attack.fits(scheme))
    if attack.card.needs_data:  # he has images, and crafts on them
        able = (scheme for scheme in able if scheme.card.task == "digits")
    return able


def _forge(attack: Forgery, scheme: Verifiable, bench: Bench) -> ForgeryResult:
    resources = Resources.of(bench.task, 1.0 if attack.card.needs_data else 0.0)
    return attack.run(bench.plain, scheme, resources, rng=np.random.default_rng(0))
