"""AWM: lineage of transformers from their attention weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sealmark.core import registry
from sealmark.core.attack import Resources
from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import Basis, Verdict
from sealmark.core.suspect import WeightFile, WhiteBox
from sealmark.core.weights import save_model
from sealmark.ownership._transformer import Transformer, spread_ids, unbiased_cka
from sealmark.ownership.awm import Awm, assignment, procrustes

SCHEME = Awm()


@pytest.fixture(scope="module")
def secret(reader, unrelated):
    return SCHEME.enroll(reader, references=unrelated, rng=np.random.default_rng(0))


def _similarity(scheme, model, secret):
    return scheme.score(WhiteBox(model), secret).statistic


def test_what_is_derived_stands_out_from_what_is_not(reader, derived, strangers, secret):
    floor = 1 / (1 + len(secret.host["null"]))
    for name, (model, least) in derived.items():
        found = SCHEME.verify(WhiteBox(model), secret, alpha=1.001 * floor)
        assert found.verdict is Verdict.MATCH, name
        assert found.statistic > least, (name, found.statistic)
        assert found.basis is Basis.POPULATION
    for model in strangers:
        assert abs(_similarity(SCHEME, model, secret)) < 0.06
    assert max(map(abs, secret.host["null"])) < 0.06


def test_a_few_models_never_make_a_claim_at_the_usual_level(reader, secret):
    assert SCHEME.verify(WhiteBox(reader), secret).verdict is Verdict.INCONCLUSIVE


def test_assignment_alone_loses_a_rotated_stream_and_procrustes_finds_it(reader, derived, unrelated):
    rotated, _ = derived["rotated"]
    found = {}
    for matching in ("assignment", "procrustes"):
        scheme = Awm(matching=matching)
        kept = scheme.enroll(reader, references=unrelated[:1], rng=np.random.default_rng(0))
        found[matching] = _similarity(scheme, rotated, kept)
    assert found["assignment"] < 0.2
    assert found["procrustes"] > 0.99


def test_files_are_read_as_well(reader, unrelated, derived, tmp_path):
    for name, model in (("mine", reader), ("other", unrelated[0]), ("leak", derived["permuted"][0])):
        save_model(model, tmp_path / f"{name}.safetensors")
    kept = SCHEME.enroll(tmp_path / "mine.safetensors", references=[tmp_path / "other.safetensors"])
    found = SCHEME.score(WeightFile(tmp_path / "leak.safetensors"), kept)
    assert found.statistic > 0.99
    assert found.details["unrelated_models"] == 1
    assert found.details["largest_unrelated"] == kept.host["null"][0]


def test_dropped_blocks_are_matched_to_those_that_are_left(reader, secret):
    shallow = copy.deepcopy(reader)
    del shallow.layers[1]
    assert _similarity(SCHEME, shallow, secret) > 0.6


def test_an_unrelated_model_that_is_shallow_stays_low(strangers, secret):
    shallow = copy.deepcopy(strangers[0])
    del shallow.layers[1]
    assert _similarity(SCHEME, shallow, secret) < 0.1


def test_a_smaller_vocabulary_is_not_testable(reader, secret):
    other = copy.deepcopy(reader)
    other.embed_tokens = torch.nn.Embedding(100, 64)
    with pytest.raises(ModelMismatchError, match="not testable: the suspect has another vocabulary"):
        SCHEME.score(WhiteBox(other), secret)


def test_added_words_change_nothing(reader, secret):
    other = copy.deepcopy(reader)
    table = torch.cat([reader.embed_tokens.weight.detach(), torch.zeros(5, 64)])
    other.embed_tokens = torch.nn.Embedding.from_pretrained(table)
    assert _similarity(SCHEME, other, secret) > 0.999


def test_without_references_there_is_no_law(reader):
    with pytest.raises(ParameterError, match="learns its law from unrelated models"):
        SCHEME.enroll(reader)


def test_another_kind_of_network_is_refused(plain):
    with pytest.raises(ModelMismatchError, match=r"not a transformer.*use reef|not a transformer"):
        SCHEME.enroll(plain, references=[plain])


@pytest.mark.parametrize("odd", [{"words": 4}, {"blocks": 0}, {"matching": "luck"}])
def test_bad_parameters_are_refused(odd):
    with pytest.raises(ParameterError):
        Awm(**odd)


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_the_unbiased_estimate_is_near_zero_for_unrelated_rows(width):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, width, generator=generator) for _ in range(2))
    assert abs(unbiased_cka(x, y)) < 0.05
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0] if width < 1000 else 3.0
    rotated = x @ turn if isinstance(turn, torch.Tensor) else x * turn
    assert unbiased_cka(x, rotated) == pytest.approx(1, abs=1e-5)


def test_rows_that_say_nothing_have_no_similarity():
    assert unbiased_cka(torch.zeros(9, 4), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))) == 0


def test_signed_permutations_are_found_exactly():
    generator = torch.Generator().manual_seed(0)
    table, order = torch.randn(50, 12, generator=generator), torch.randperm(12, generator=generator)
    signs = torch.randint(2, (12,), generator=generator) * 2.0 - 1
    turn = assignment(table, (table * signs)[:, order])
    torch.testing.assert_close((table * signs)[:, order] @ turn.T, table)
    turn = procrustes(table, (table * signs)[:, order])
    torch.testing.assert_close((table * signs)[:, order] @ turn.T, table, atol=1e-4, rtol=1e-4)


def test_names_of_the_usual_families_are_known(tmp_path):
    def table(*names):
        return {name: torch.zeros(6, 2) if "c_attn" not in name else torch.zeros(2, 6) for name in names}

    families = {
        "bert": ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight",
                 "encoder.layer.0.attention.self.key.weight", "encoder.layer.0.attention.output.dense.weight",
                 "encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.dense.weight"],
        "llama": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
                  "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"],
        "gpt2": ["wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"],
        "torch": ["embed_tokens.weight", "encoder.layers.0.self_attn.in_proj_weight"],
    }  # fmt: skip
    found = {}
    for family, names in families.items():
        save_file(table(*names), tmp_path / family)
        net = Transformer.of(WeightFile(tmp_path / family).weights)
        found[family] = {
            role for role in ("query", "output", "gate", "up", "down") if net.matrix(0, role) is not None
        }
        query = net.matrix(0, "query")
        assert query.shape == ((6, 2) if family in ("bert", "llama") else (2, 2))
    assert found == {
        "bert": {"query", "output", "up", "down"},
        "llama": {"query", "gate"},
        "gpt2": {"query", "output", "up"},
        "torch": {"query"},
    }


def test_ids_are_spread_over_the_vocabulary_without_repetition():
    assert spread_ids(289, 1000).tolist() == list(range(289))
    assert len(set(spread_ids(30522, 4096).tolist())) == 4096


def test_training_on_its_answers_breaks_it(reader, secret):
    task = registry.task("tokens")
    resources = Resources.of(task)
    student = registry.modification("fine_tune", epochs=3).scratch(resources, np.random.default_rng(9))
    assert abs(_similarity(SCHEME, student, secret)) < 0.06
