"""Mixed fingerprints: the model lets them in, and nobody is recognized who was not among the colluders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sealmark.attacks.ambiguity.fingerprint_mixing import FingerprintMixing
from sealmark.core.attack import Resources
from sealmark.core.credentials import Credential, Reason
from sealmark.core.errors import ParameterError, UnsupportedError

NAME = "fingerprint_mixing"


@pytest.fixture
def resources(digits):
    return Resources.of(digits)


@pytest.fixture
def images(club):
    return torch.stack([credential.tensors["images"] for credential in club.spoils(3).credentials])


def test_a_blend_is_the_mean_of_all_images(club, images, resources):
    torch.testing.assert_close(club.shown(NAME, resources, 3, strategy="blend").rows, images.mean(0))


def test_a_splice_takes_an_entry_from_the_same_credential_in_all_images(club, images, resources):
    rows = club.shown(NAME, resources, 3).rows
    origins = (rows == images).all(1)  # (credentials, ...): whose entry it can be, in all images
    assert origins.any(0).all()
    differing = ~(images == images[0]).all(0).all(0)
    for credential in origins:
        assert 0 < credential[differing].double().mean() < 1


@pytest.mark.parametrize("strategy", ["blend", "splice", "search"])
@pytest.mark.parametrize("count", [2, 3])
def test_known_break_the_model_lets_mixtures_in_and_no_user_is_recognized_in_them(strategy, count, club, resources):
    for seed in range(3):
        rows = club.shown(NAME, resources, count, seed, strategy=strategy, queries=300).rows
        found = club.examined(rows)
        assert (found.served, found.reason, found.user) == (True, Reason.UNKNOWN_USER, None)


def test_a_search_comes_nearer_to_what_credentials_answer(club, images, resources):
    spoils = club.spoils(3)
    aim = spoils.service.probabilities(images[:2].flatten(0, 1))[:, 10].mean()
    useless = Credential("user", {"images": torch.zeros_like(images[2])})
    spoils.credentials = [*spoils.credentials[:2], useless]
    results = [
        FingerprintMixing(strategy, 1200).run(spoils, resources, rng=np.random.default_rng(0))
        for strategy in ("splice", "search")
    ]
    far, near = ((spoils.service.probabilities(result.rows)[:, 10] - aim).abs().mean() for result in results)
    assert near < far / 2
    assert [result.cost.queries for result in results] == [0, 18 + 1200]


def test_credentials_on_queries_mix_as_well(club_of_queries, resources):
    rows = club_of_queries.shown(NAME, resources, 2).rows
    assert len(rows) == resources.rows.rows
    assert club_of_queries.examined(rows).user is None


def test_whole_numbers_splice_and_do_not_blend(club, resources):
    spoils = club.spoils(2)
    for number, credential in enumerate(spoils.credentials):
        spoils.credentials[number] = Credential(credential.user, {"images": torch.full((2, 30), 3 + number)})
    rows = FingerprintMixing().pretend(spoils, resources, np.random.default_rng(0))
    assert set(rows.unique().tolist()) == {3, 4}
    with pytest.raises(UnsupportedError, match="real numbers"):
        FingerprintMixing("blend").pretend(spoils, resources, np.random.default_rng(0))


def test_one_credential_does_not_mix(club, resources):
    with pytest.raises(ParameterError, match="more credentials"):
        club.shown(NAME, resources, 1)


def test_too_few_queries_for_one_answer_a_row_are_refused(club, resources):
    with pytest.raises(ParameterError, match="too few queries"):
        club.shown(NAME, resources, 2, strategy="search", queries=3)


@pytest.mark.parametrize("bad", [{"strategy": "luck"}, {"queries": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ParameterError, match="bad parameters"):
        FingerprintMixing(**bad)
