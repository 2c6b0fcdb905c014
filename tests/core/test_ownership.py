"""Watermarks and fingerprints: what `verify` and `embed` do for every scheme."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sealmark.core.embedding import Embedding
from sealmark.core.errors import AccessError, ForgedSecretError, MarkFailedError, ParameterError
from sealmark.core.evidence import Score, Verdict
from sealmark.core.ownership import Fingerprint, Verifiable, Watermark, embed_all
from sealmark.core.secret import Secret, tensor_digest
from sealmark.core.suspect import Access, BlackBox, Suspect, WeightFile, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.weights import weights_of
from sealmark.stats.nulls import Binomial, KeyedProjection

RECIPE = Recipe(epochs=20, batch_size=16, rate=0.1)


@dataclass(frozen=True)
class Direction(Watermark):
    """Turns a weight matrix towards a keyed direction of signs."""

    strength: float = 1.0

    access = Access.WEIGHTS

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"layer": "0.weight", "entries": model.get_parameter("0.weight").numel()}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        if secret.host["entries"] < 32:
            raise ParameterError("too small a host")
        return {"direction": torch.from_numpy(secret.stream("direction").signs(secret.host["entries"])).float()}

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        weight = model.get_parameter("0.weight").reshape(-1)
        return self.strength * (1 - torch.cosine_similarity(weight, self.derive(secret)["direction"], dim=0))

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        weight = suspect.weights["0.weight"].reshape(-1)
        return Score(float(weight @ self.derive(secret)["direction"] / weight.norm()), KeyedProjection())


@dataclass(frozen=True)
class Triggers(Watermark):
    """Inputs, keyed or the owner's, with keyed labels, trained on beside each batch."""

    count: int = 24
    access = Access.LABELS
    carries_payload: ClassVar[bool] = True
    choices: ClassVar[frozenset[str]] = frozenset({"images"})

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"chosen": sorted(chosen)}, dict(chosen)

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        inputs = 5 * torch.from_numpy(secret.stream("inputs").normal(4 * self.count)).float().reshape(-1, 4)
        return {"inputs": inputs, "labels": torch.from_numpy(secret.stream("labels").integers(self.count, 2))}

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        return Batch(*self.derive(secret).values())

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        key = self.derive(secret)
        return Score(int((suspect.labels(key["inputs"]) == key["labels"]).sum()), Binomial(self.count, 0.5))


@dataclass(frozen=True)
class Answers(Fingerprint):
    """Records the model's probabilities on inputs of its own choice."""

    access = Access.PROBABILITIES

    def enroll(
        self,
        model: Any,
        task: Task | None = None,
        *,
        references: Any = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        assert task
        answers = WhiteBox(model).labels(task.test.inputs)
        tensors = {"inputs": task.test.inputs, "answers": answers}
        return self.new_secret(weights_of(model), tensors=tensors, owner=owner, rng=rng)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        same = suspect.probabilities(secret.tensors["inputs"]).argmax(-1) == secret.tensors["answers"]
        return Score(int(same.sum()), Binomial(len(same), 0.5), {"agreement": float(same.double().mean())})


MARK = Direction()


@pytest.fixture
def model(toy: Task) -> nn.Module:
    return toy.model(np.random.default_rng(0))


@pytest.fixture
def secret(model: nn.Module) -> Secret:
    return MARK.keygen(model, rng=np.random.default_rng(1))


@pytest.fixture
def marked(model: nn.Module, secret: Secret, toy: Task) -> nn.Module:
    return MARK.embed(model, secret, toy, rng=np.random.default_rng(2), recipe=RECIPE).model


def test_a_marked_model_matches_and_still_does_its_task(marked: nn.Module, secret: Secret, toy: Task) -> None:
    evidence = MARK.verify(WhiteBox(marked), secret)
    assert evidence.verdict is Verdict.MATCH
    assert evidence.p_value <= 1e-6
    assert (evidence.scheme, evidence.commitment) == ("test_ownership", secret.commitment)
    assert toy.score(marked) > 0.8


def test_an_unmarked_model_does_not_match(model: nn.Module, secret: Secret) -> None:
    assert MARK.verify(WhiteBox(model), secret).verdict is Verdict.NO_MATCH


def test_another_secret_does_not_match(marked: nn.Module, model: nn.Module) -> None:
    other = MARK.keygen(model, rng=np.random.default_rng(9))
    assert MARK.verify(WhiteBox(marked), other).verdict is Verdict.NO_MATCH


def test_a_weight_file_of_the_marked_model_matches(marked: nn.Module, secret: Secret, tmp_path: Path) -> None:
    save_file(marked.state_dict(), tmp_path / "m.safetensors")
    assert MARK.verify(WeightFile(tmp_path / "m.safetensors"), secret).verdict is Verdict.MATCH


def test_p_values_of_an_unmarked_model_over_secrets_stay_under_the_diagonal(model: nn.Module) -> None:
    secrets = [MARK.keygen(model, rng=np.random.default_rng(seed)) for seed in range(200)]
    p_values = np.array([MARK.verify(WhiteBox(model), secret).p_value for secret in secrets])
    for level in (0.01, 0.05, 0.2):
        assert (p_values <= level).mean() <= level + 3 * math.sqrt(level / 200)


def test_embedding_leaves_the_given_model_as_it_was(model: nn.Module, secret: Secret, toy: Task) -> None:
    before = copy.deepcopy(model.state_dict())
    MARK.embed(model, secret, toy, rng=np.random.default_rng(2), recipe=RECIPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_embedding_is_determined_by_secret_and_generator(
    marked: nn.Module, model: nn.Module, secret: Secret, toy: Task
) -> None:
    again = MARK.embed(model, secret, toy, rng=np.random.default_rng(2), recipe=RECIPE).model
    assert weights_of(again).digest() == weights_of(marked).digest()


def test_rows_beside_the_batch_mark_the_answers(toy: Task) -> None:
    wide = replace(toy, make=lambda: nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 2)))
    model, scheme, ticks = wide.model(np.random.default_rng(0)), Triggers(), []
    secret = scheme.keygen(model, toy, payload=b"hi", rng=np.random.default_rng(1))
    assert secret.facts["payload"] == "6869"
    recipe = Recipe(epochs=100, batch_size=64, rate=0.3, weight_decay=0)
    marked = scheme.embed(
        model, secret, toy, rng=np.random.default_rng(2), recipe=recipe, on_epoch=lambda *tick: ticks.append(tick)
    ).model
    assert len(ticks) == 100
    evidence = scheme.verify(BlackBox(lambda x: marked(x).argmax(-1)), secret)
    assert (evidence.verdict, evidence.queries) == (Verdict.MATCH, 24)
    assert scheme.verify(WhiteBox(model), secret).verdict is Verdict.NO_MATCH


def test_two_marks_are_embedded_in_one_run(model: nn.Module, toy: Task) -> None:
    marks = [(MARK, MARK.keygen(model, rng=np.random.default_rng(n))) for n in (1, 2)]
    marked, secrets = embed_all(list(marks), model, toy, rng=np.random.default_rng(2), recipe=RECIPE)
    assert [MARK.verify(WhiteBox(marked), secret).verdict for secret in secrets] == [Verdict.MATCH] * 2


def test_a_mark_that_did_not_take_is_an_error(model: nn.Module, secret: Secret, toy: Task) -> None:
    with pytest.raises(MarkFailedError, match="did not take: expected p <= 1e-06"):
        MARK.embed(model, secret, toy, rng=np.random.default_rng(2), recipe=Recipe(epochs=0))


def test_embedding_by_the_tasks_own_recipe_is_the_default(toy: Task, model: nn.Module, secret: Secret) -> None:
    ticks: list[object] = []
    task = replace(toy, recipe=RECIPE)
    MARK.embed(model, secret, task, rng=np.random.default_rng(2), on_epoch=lambda *tick: ticks.append(tick))
    assert len(ticks) == RECIPE.epochs


def test_a_secret_of_other_parameters_is_refused_before_training(
    model: nn.Module, secret: Secret, toy: Task
) -> None:
    with pytest.raises(ParameterError, match="other parameters"):
        Direction(strength=2.0).embed(model, secret, toy, rng=np.random.default_rng(2))


def test_a_scheme_without_terms_or_rows_contributes_none(secret: Secret, toy: Task) -> None:
    assert Embedding(Triggers(), secret).terms == []
    assert Embedding(MARK, secret).extras == []
    assert len(Embedding(MARK, secret).terms) == len(Embedding(Triggers(), secret).extras) == 1


def test_the_neutral_term_is_zero_and_the_neutral_rows_are_none(
    model: nn.Module, secret: Secret, toy: Task, rng: np.random.Generator
) -> None:
    assert float(Triggers().loss(model, secret, toy.owner)) == 0
    assert MARK.extra(secret, toy.owner, rng).rows == 0


def test_a_watermark_needs_nothing_but_a_score(model: nn.Module, rng: np.random.Generator) -> None:
    class Least(Watermark):
        access = Access.WEIGHTS

        def score(self, suspect: Suspect, secret: Secret) -> Score:
            return Score(0, Binomial(40, 0.5))

    secret = Least().keygen(model, rng=rng)
    assert (secret.host, dict(secret.tensors), Least().derive(secret)) == ({}, {}, {})
    assert Least().verify(WhiteBox(model), secret).verdict is Verdict.NO_MATCH


def test_a_payload_is_refused_by_a_scheme_that_carries_none(model: nn.Module) -> None:
    with pytest.raises(ParameterError, match="carries no payload: expected none, found 2 bytes"):
        MARK.keygen(model, payload=b"hi")


def test_what_the_owner_chooses_is_committed_where_the_scheme_has_such_a_mode(model: nn.Module) -> None:
    images = torch.arange(4.0)
    secret = Triggers().keygen(model, chosen={"images": images})
    assert secret.host == {"chosen": ["images"]}
    assert secret.facts["tensors"] == {"images": tensor_digest(images)}


def test_a_choice_of_what_the_scheme_derives_is_refused(model: nn.Module) -> None:
    with pytest.raises(ParameterError, match=r"derives what you chose: expected \['images'\], found \['labels'\]"):
        Triggers().keygen(model, chosen={"labels": torch.zeros(24)})


def test_a_host_that_does_not_fit_is_refused_when_the_secret_is_made() -> None:
    with pytest.raises(ParameterError, match="too small a host"):
        MARK.keygen(nn.Sequential(nn.Linear(2, 2)))


def test_verify_refuses_a_suspect_that_shows_too_little(secret: Secret) -> None:
    with pytest.raises(AccessError, match="expected weights, found labels"):
        MARK.verify(BlackBox(lambda x: x[:, 0]), secret)


def test_verify_refuses_a_secret_of_another_scheme(marked: nn.Module, secret: Secret) -> None:
    other = Secret(secret.reveal_seed(), secret.facts | {"scheme": "uchida"})
    with pytest.raises(ParameterError, match="another scheme"):
        MARK.verify(WhiteBox(marked), other)


def test_verify_refuses_a_secret_with_other_parameters(marked: nn.Module, secret: Secret) -> None:
    with pytest.raises(ParameterError, match="other parameters"):
        Direction(strength=0.5).verify(WhiteBox(marked), secret)


def test_verify_holds_the_secret_to_its_commitment(marked: nn.Module, secret: Secret) -> None:
    assert MARK.verify(WhiteBox(marked), secret, commitment=secret.commitment).verdict is Verdict.MATCH
    with pytest.raises(ForgedSecretError, match="does not open"):
        MARK.verify(WhiteBox(marked), secret, commitment="0" * 64)


def _carrying(secret: Secret, **tensors: Tensor) -> Secret:
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return Secret(secret.reveal_seed(), secret.facts | {"tensors": digests}, tensors)


def test_a_key_that_was_solved_for_the_model_is_refused_although_it_is_committed(
    model: nn.Module, secret: Secret
) -> None:
    fitted = model.get_parameter("0.weight").detach().reshape(-1).sign()
    with pytest.raises(ForgedSecretError, match="brings its own direction"):
        MARK.verify(WhiteBox(model), _carrying(secret, direction=fitted))


def test_a_derived_part_cannot_be_carried_because_its_digest_changes_every_stream(
    model: nn.Module, secret: Secret
) -> None:
    with pytest.raises(ForgedSecretError, match="brings its own direction"):
        MARK.verify(WhiteBox(model), _carrying(secret, direction=MARK.derive(secret)["direction"]))


def test_what_the_scheme_does_not_derive_may_be_carried(model: nn.Module, secret: Secret) -> None:
    assert MARK.verify(WhiteBox(model), _carrying(secret, note=torch.zeros(1))).verdict is Verdict.NO_MATCH


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 1.0}, {"tries": 0}])
def test_verify_refuses_levels_that_mean_nothing(
    model: nn.Module, secret: Secret, options: dict[str, float]
) -> None:
    with pytest.raises(ParameterError, match="bad"):
        MARK.verify(WhiteBox(model), secret, **options)


def test_tries_weaken_the_evidence(marked: nn.Module, secret: Secret) -> None:
    once = MARK.verify(WhiteBox(marked), secret)
    often = MARK.verify(WhiteBox(marked), secret, tries=2.0**64)
    assert often.log10_p == pytest.approx(min(0, once.log10_p + 64 * math.log10(2)))
    assert often.verdict is Verdict.NO_MATCH


def test_a_fingerprint_matches_the_model_that_it_was_taken_of(toy: Task, rng: np.random.Generator) -> None:
    model, scheme = toy.model(rng), Answers()
    before = weights_of(model).digest()
    secret = scheme.enroll(model, toy, owner="ab", rng=rng)
    evidence = scheme.verify(WhiteBox(model), secret)
    assert (evidence.verdict, evidence.queries, evidence.details) == (Verdict.MATCH, 64, {"agreement": 1.0})
    inverted = BlackBox(lambda x: model(x).softmax(-1).flip(-1), returns="probabilities")
    assert scheme.verify(inverted, secret).verdict is Verdict.NO_MATCH
    assert weights_of(model).digest() == before


def test_earlier_queries_of_a_suspect_are_not_counted_again(toy: Task, rng: np.random.Generator) -> None:
    model, scheme = toy.model(rng), Answers()
    secret, suspect = scheme.enroll(model, toy, rng=rng), WhiteBox(model)
    suspect.labels(toy.test.inputs)
    assert scheme.verify(suspect, secret).queries == 64


def test_verifying_changes_neither_weights_nor_mode(marked: nn.Module, secret: Secret) -> None:
    marked.train()
    before = weights_of(marked).digest()
    MARK.verify(WhiteBox(marked), secret)
    assert weights_of(marked).digest() == before
    assert marked.training


def test_no_scheme_can_be_made_without_a_score() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Verifiable()  # type: ignore[abstract]
