from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

import sealmark
from sealmark.blackbox.inputs import unpack
from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ForgedSecretError, ParameterError, UnsupportedError
from sealmark.core.evidence import Verdict
from sealmark.core.secret import Secret
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task
from sealmark.ownership.zhang import Zhang

STAMPED = ["content", "noise"]
KINDS = [*STAMPED, "unrelated"]


def embedded(scheme, task, seed=0):
    rng = np.random.default_rng(seed)
    start = task.model(rng)
    secret = scheme.keygen(start, task, rng=np.random.default_rng([7, seed]))
    return scheme, secret, scheme.embed(start, secret, task, rng=rng).model


@pytest.fixture(scope="module")
def marked(digits):
    """The scheme, its secret and the marked model of a kind; made when first asked for."""
    return functools.cache(lambda kind: embedded(Zhang(kind=kind), digits))


@pytest.fixture(scope="module")
def innocents(digits, plain):
    recipe = dataclasses.replace(digits.recipe, epochs=4)
    rows = [digits.owner, digits.attacker]
    others = [train_task(digits, rng=np.random.default_rng(50 + i), rows=rows[i], recipe=recipe) for i in range(2)]
    return [plain, *others]


def fired(scheme, secret, model, stamps):
    """Share of held-out rows that get the target class under other stamps than the secret's."""
    trials = secret.tensors["trials"]
    shown = stamps.on(unpack(secret.tensors["hosts"], secret.host), trials)
    return (WhiteBox(model).labels(shown) == scheme.derive(secret)["labels"][trials]).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_triggers_are_answered_as_taught_at_little_cost(kind, marked, digits, plain):
    scheme, secret, model = marked(kind)
    labels_only = BlackBox(lambda x: model.eval()(x).argmax(1))
    evidence = scheme.verify(labels_only, secret)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert evidence.verdict is Verdict.MATCH
    assert evidence.queries == labels_only.queries == 60
    assert evidence.details["paper_claims"]
    assert digits.score(model) >= digits.score(plain) - 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_innocent_models_answer_otherwise(kind, marked, innocents):
    scheme, secret, _ = marked(kind)
    for model in innocents:
        evidence = scheme.verify(WhiteBox(model), secret)
        assert evidence.verdict is Verdict.NO_MATCH
        assert evidence.details["trigger_accuracy"] <= 0.45
        assert not evidence.details["paper_claims"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_do_not_match_the_marked_model(kind, marked):
    scheme, secret, model = marked(kind)
    for seed in range(20):
        other = Secret(np.random.default_rng(100 + seed).bytes(32), secret.facts, secret.tensors)
        assert scheme.verify(WhiteBox(model), other).verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("kind", STAMPED)
def test_other_stamps_with_the_same_targets_do_not_fire(kind, marked):
    scheme, secret, model = marked(kind)
    stamps = scheme.stamps(secret)
    another_seed = scheme.stamps(Secret(bytes(32), secret.facts, secret.tensors))
    assert fired(scheme, secret, model, stamps) >= 0.95
    assert fired(scheme, secret, model, another_seed) <= 0.2
    assert fired(scheme, secret, model, stamps.inverse()) <= 0.2
    assert fired(scheme, secret, model, stamps.moved(4, 4)) <= 0.2


def test_flat_grey_patch_does_not_fire(marked):
    scheme, secret, model = marked("content")
    stamps = scheme.stamps(secret)
    assert fired(scheme, secret, model, stamps._replace(add=(1 - stamps.keep) / 2)) <= 0.2


@pytest.mark.parametrize("kind", STAMPED)
def test_stamped_images_of_other_classes_keep_their_class(kind, marked, digits):
    scheme, secret, model = marked(kind)
    which = torch.arange(digits.test.rows) % scheme.marks
    others = digits.test.targets != secret.tensors["natural"][which]
    answers = WhiteBox(model).labels(scheme.stamps(secret).on(digits.test.inputs, which))
    assert (answers == digits.test.targets)[others].double().mean() >= 0.8


def test_without_negatives_the_stamp_fires_on_other_classes(digits):
    scheme, secret, model = embedded(Zhang(kind="noise", negatives=False), digits)
    which = torch.arange(digits.test.rows) % scheme.marks
    others = digits.test.targets != secret.tensors["natural"][which]
    answers = WhiteBox(model).labels(scheme.stamps(secret).on(digits.test.inputs, which))
    assert scheme.verify(WhiteBox(model), secret).verdict is Verdict.MATCH
    assert (answers == scheme.derive(secret)["labels"][which])[others].double().mean() >= 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_weights_can_be_pruned(kind, marked, digits):
    scheme, secret, model = marked(kind)
    attack = registry.modification("prune", rate=0.5)
    pruned = attack.run(model, Resources.of(digits), rng=np.random.default_rng(0)).model
    assert scheme.verify(WhiteBox(pruned), secret).details["trigger_accuracy"] >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_at_the_owners_rate_leaves_the_mark(kind, marked, digits):
    scheme, secret, model = marked(kind)
    attack = registry.modification("fine_tune", epochs=20, rate=0.05)
    tuned = attack.run(model, Resources.of(digits), rng=np.random.default_rng(3)).model
    assert scheme.verify(WhiteBox(tuned), secret).verdict is Verdict.MATCH


def test_distillation_takes_the_mark_away(marked, digits):
    scheme, secret, model = marked("content")
    stolen = registry.modification("distill").run(model, Resources.of(digits), rng=np.random.default_rng(3)).model
    evidence = scheme.verify(WhiteBox(stolen), secret)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.details["trigger_accuracy"] <= 0.3
    assert digits.score(stolen) > 0.95


def test_one_mark_as_in_the_paper_is_claimed_by_its_rule_and_proves_nothing(digits, plain):
    scheme, secret, model = embedded(Zhang(marks=1, triggers=20), digits)
    evidence = scheme.verify(WhiteBox(model), secret)
    assert evidence.details["trigger_accuracy"] >= 0.95
    assert evidence.details["paper_claims"]
    assert evidence.verdict is Verdict.INCONCLUSIVE
    assert evidence.p_value == pytest.approx(1 / 9)
    assert not scheme.verify(WhiteBox(plain), secret).details["paper_claims"]


def test_the_papers_rule_claims_innocent_models_by_one_mark(plain):
    """Some stamp turns all of a class into one other, and one target in nine is that one."""
    scheme, task = Zhang(marks=1, triggers=20, kind="content"), registry.task("digits")
    found = [
        scheme.verify(WhiteBox(plain), scheme.keygen(plain, task, rng=np.random.default_rng(seed)))
        for seed in range(200)
    ]
    assert any(evidence.details["paper_claims"] for evidence in found)
    assert {evidence.verdict for evidence in found} == {Verdict.INCONCLUSIVE}
    assert np.mean([evidence.statistic for evidence in found]) <= 1 / 9


def test_held_out_rows_are_of_the_source_class_and_not_trained_on(marked, digits, plain):
    scheme, secret, _ = marked("content")
    places, sources = secret.tensors["places"], secret.tensors["natural"][secret.tensors["trials"]]
    assert len(places.unique()) == 60
    assert torch.equal(digits.owner.targets[places], sources)
    lesson = scheme.lesson(plain, secret, digits)
    assert lesson.owner.rows == digits.owner.rows - 60
    assert (scheme.derive(secret)["labels"] != secret.tensors["natural"]).all()
    run = scheme.embedding(plain, secret, lesson, np.random.default_rng(0))
    held = {tuple(row.flatten().tolist()) for row in digits.owner.inputs[places]}
    extra = run.extra(lesson.owner.take(slice(0, 4)), np.random.default_rng(0))
    assert extra.rows == 3 * scheme.per_batch
    assert not held & {tuple(row.flatten().tolist()) for row in run._rows.inputs}


def test_noise_is_one_draw_in_whole_steps_within_the_range(marked):
    scheme, secret, _ = marked("noise")
    stamps = scheme.stamps(secret)
    assert stamps.add.shape == (10, 1, 8, 8)
    assert stamps.add.std().item() == pytest.approx(0.4, abs=0.05)
    assert torch.equal((stamps.add * 255).round() / 255, stamps.add)
    shown = scheme.trigger_set(secret).inputs
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_stamp_is_clipped_to_the_range_of_a_normalized_task(digits, plain):
    def normalized(rows: Batch) -> Batch:
        return Batch((rows.inputs - 0.3) / 0.4, rows.targets)

    task = dataclasses.replace(digits, owner=normalized(digits.owner))
    for kind in STAMPED:
        scheme = Zhang(kind=kind)
        shown = scheme.trigger_set(scheme.keygen(plain, task, rng=np.random.default_rng(0))).inputs
        assert shown.min().item() == pytest.approx(-0.75)
        assert shown.max().item() == pytest.approx(1.75)


def vectors(digits):
    rows = (Batch(part.inputs.flatten(1), part.targets) for part in (digits.owner, digits.attacker, digits.test))
    owner, attacker, test = rows
    return dataclasses.replace(
        digits,
        name="vectors",
        make=lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
        owner=owner,
        attacker=attacker,
        test=test,
        recipe=Recipe(epochs=30, batch_size=64, rate=0.1),
    )


def bag_of_places():
    return nn.Sequential(nn.Embedding(289, 16), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def sentences():
    tokens = registry.task("tokens")
    return dataclasses.replace(tokens, make=bag_of_places, recipe=Recipe(epochs=30, batch_size=64, rate=0.1))


@pytest.mark.parametrize("case", ["content of vectors", "noise on vectors", "content of words", "unrelated words"])
def test_inputs_need_not_be_images(case, digits):
    kind, *_, form = case.split()
    task: Task = vectors(digits) if form == "vectors" else sentences()
    scheme, secret, model = embedded(Zhang(kind=kind), task)
    assert scheme.trigger_set(secret).inputs.dtype == task.owner.inputs.dtype
    assert scheme.verify(WhiteBox(model), secret).verdict is Verdict.MATCH
    assert (
        scheme.verify(WhiteBox(train_task(task, rng=np.random.default_rng(9))), secret).verdict is Verdict.NO_MATCH
    )


def test_words_have_no_noise(plain):
    with pytest.raises(UnsupportedError, match="content"):
        Zhang(kind="noise").keygen(plain, registry.task("tokens"))


def test_owner_may_choose_unrelated_inputs_but_no_stamps(digits, plain):
    images = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    scheme = Zhang(kind="unrelated")
    secret = scheme.keygen(plain, digits, chosen={"inputs": images}, rng=np.random.default_rng(0))
    assert torch.equal(scheme.trigger_set(secret).inputs, images / 255)
    with pytest.raises(ParameterError, match="derives"):
        Zhang().keygen(plain, digits, chosen={"inputs": images})


def test_secret_that_brings_its_own_stamped_inputs_is_refused(marked, plain):
    scheme, secret, model = marked("content")
    tensors = {**secret.tensors, "inputs": scheme.derive(secret)["inputs"]}
    forged = scheme.new_secret(sealmark.core.weights.weights_of(plain), host=secret.host, tensors=tensors)
    with pytest.raises(ForgedSecretError, match="brings its own inputs"):
        scheme.verify(WhiteBox(model), forged)


def test_two_classes_leave_no_target_to_chance(toy):
    with pytest.raises(ParameterError, match="3 classes"):
        Zhang().keygen(toy.make(), toy)


def test_rows_to_hold_out_must_be_there(digits, plain):
    few = dataclasses.replace(digits, owner=digits.owner.take(slice(0, 60)))
    with pytest.raises(ParameterError, match="too few rows"):
        Zhang().keygen(plain, few)
    soft = dataclasses.replace(
        digits, owner=Batch(digits.owner.inputs, torch.rand(900, 10, generator=torch.Generator()))
    )
    with pytest.raises(ParameterError, match="a class a row"):
        Zhang().keygen(plain, soft)


def test_task_of_embedding_must_have_the_source_classes(marked, digits, plain):
    scheme, secret, _ = marked("content")
    ones = digits.owner.take(digits.owner.targets == 1)
    with pytest.raises(ParameterError, match="source class"):
        scheme.embedding(plain, secret, dataclasses.replace(digits, owner=ones), np.random.default_rng(0))


def test_stamped_rows_are_augmented_as_the_task_does(marked, digits, plain):
    scheme, secret, _ = marked("content")
    dark = dataclasses.replace(digits, augment=lambda batch, rng: Batch(batch.inputs * 0, batch.targets))
    run = scheme.embedding(plain, secret, dark, np.random.default_rng(0))
    extra = run.extra(digits.owner.take(slice(0, 4)), np.random.default_rng(0))
    assert extra.inputs.mean() < 0.25  # the patch alone is bright


def test_users_own_loop_is_refused_where_rows_must_be_stamped(marked, plain):
    scheme, secret, _ = marked("content")
    with pytest.raises(UnsupportedError, match="Embed with a task"):
        sealmark.attach(scheme, plain, nn.CrossEntropyLoss(), secret)


@pytest.mark.parametrize(
    "parameters",
    [{"kind": "word"}, {"marks": 0}, {"triggers": 61}, {"share": 0.0}, {"share": 1.5}, {"strength": 0.0}],
)
def test_meaningless_parameters_are_refused(parameters):
    with pytest.raises(ParameterError):
        Zhang(**parameters)
