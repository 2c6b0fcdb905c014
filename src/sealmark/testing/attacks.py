"""Properties of attacks that modify a model."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.attack import Extraction, Modification, Resources
from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import Verdict
from sealmark.core.ownership import Watermark
from sealmark.core.suspect import WhiteBox
from sealmark.core.weights import ModelWeights
from sealmark.testing.bench import Bench, state_bytes
from sealmark.testing.general import refuses


def check_card_is_data(attack: Modification, bench: Bench) -> None:
    """The card can be read without importing the attack."""
    json.dumps(attack.card.as_dict())
    if attack.name in registry.items("attack"):
        assert registry.item("attack", attack.name).card() == attack.card, "the card is not in literals"


def check_target_is_untouched(attack: Modification, bench: Bench) -> None:
    """The attacker works on copies of his own, changes something, and keeps the form unless the card says so."""
    models = _targets(attack, bench)
    before = [ModelWeights(model).digest() for model in models]
    result = attack.run(models, _resources(attack, bench), rng=np.random.default_rng(0))
    assert [ModelWeights(model).digest() for model in models] == before
    assert ModelWeights(result.model).digest() not in before, "the attack changed nothing"
    after, form = ({k: i.shape for k, i in ModelWeights(model).info.items()} for model in (result.model, models[0]))
    assert (after != form) == attack.card.changes_form


def check_evasion_leaves_the_weights_and_changes_the_answers(attack: Modification, bench: Bench) -> None:
    """An attack of level 2 serves the very model that it got, and answers otherwise all the same."""
    if attack.card.level == 2:
        target = _targets(attack, bench)[0]
        served = attack.run(target, _resources(attack, bench), rng=np.random.default_rng(0)).model
        inside = [ModelWeights(part).digest() for part in served.modules()]
        assert ModelWeights(target).digest() in inside, "the stolen weights are not in the surrogate"
        before, after = (WhiteBox(model).probabilities(bench.judges.inputs) for model in (target, served))
        assert not torch.equal(before, after), "it answers as before"


def check_same_randomness_gives_the_same_surrogate(attack: Modification, bench: Bench) -> None:
    """An attack follows from its generator."""
    models, resources = _targets(attack, bench), _resources(attack, bench)
    one, two = (attack.run(models, resources, rng=np.random.default_rng(3)).model for _ in range(2))
    assert state_bytes(one) == state_bytes(two)


def check_cost_is_told(attack: Modification, bench: Bench) -> None:
    """Time, data and copies are accounted for, and a surrogate can be judged."""
    result = attack.run(_targets(attack, bench), _resources(attack, bench), rng=np.random.default_rng(0))
    assert result.cost.wall_seconds > 0
    assert result.cost.copies >= attack.card.copies
    assert (result.cost.rows > 0) == attack.card.needs_data
    assert (result.cost.queries > 0) == isinstance(attack, Extraction)
    assert math.isfinite(bench.accuracy(result.model))


def check_scratch_reference(attack: Modification, bench: Bench) -> None:
    """The same attacker's model from a random start has the same form and knows nothing of the target."""
    scratch = attack.scratch(_resources(attack, bench), np.random.default_rng(0))
    assert set(ModelWeights(scratch).info) == set(ModelWeights(bench.plain).info)
    if not attack.card.needs_data:
        assert bench.accuracy(scratch) < 0.4, "an untrained model is a weak reference"


def check_missing_means_are_refused(attack: Modification, bench: Bench) -> None:
    """Too few copies, and no data where some is needed, are errors."""
    rng = np.random.default_rng(0)
    assert refuses(ParameterError, lambda: attack.run([], _resources(attack, bench), rng=rng))
    if attack.card.needs_data:
        poor = Resources.of(bench.task, 0.0)
        assert refuses(ParameterError, lambda: attack.run(_targets(attack, bench), poor, rng=rng))


def check_attack_makes_no_mark(attack: Modification, bench: Bench) -> None:
    """Null control: on models that never had the mark, the attack does not produce a match."""
    result = attack.run(_targets(attack, bench), _resources(attack, bench), rng=np.random.default_rng(0))
    for name in registry.items("scheme"):
        scheme = registry.scheme(name)
        if isinstance(scheme, Watermark) and scheme.card.task == bench.task.name:
            secret = bench.secret(scheme)
            try:
                verdict = scheme.verify(WhiteBox(result.model), secret).verdict
            except ModelMismatchError:  # what cannot be read matches nothing
                assert attack.card.changes_form
                continue
            assert verdict is not Verdict.MATCH, f"{name} matches an innocent model"


def _targets(attack: Modification, bench: Bench) -> list[nn.Module]:
    return [bench.plain, *bench.strangers][: max(1, attack.card.copies)]


def _resources(attack: Modification, bench: Bench) -> Resources:
    return Resources.of(bench.task, 0.3 if attack.card.needs_data else 0.0)
