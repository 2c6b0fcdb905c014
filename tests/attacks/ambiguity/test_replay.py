"""A stolen credential passes: what it says, and how it ends."""

from __future__ import annotations

import pytest
import torch

from sealmark.core.attack import Resources
from sealmark.core.credentials import Reason
from sealmark.core.errors import ParameterError


@pytest.fixture
def rows(digits, club):
    return club.shown("replay", Resources.of(digits), 1).rows


def test_known_break_whoever_shows_a_credential_passes_as_its_user(club, rows):
    found = club.examined(rows)
    assert (found.user, found.reason) == ("user0", Reason.ACCEPTED)


def test_a_leaked_credential_names_whose_it_was(club, rows):
    assert club.traced(rows) == {"user0"}


def test_revoking_the_user_ends_it(club, rows):
    assert club.examined(rows, revoked=["user0"]).reason is Reason.REVOKED
    assert club.examined(rows, revoked=["user1"]).reason is Reason.ACCEPTED


def test_the_thief_shows_a_copy_and_asks_nothing(club, digits):
    result = club.shown("replay", Resources.of(digits), 1)
    held = club.spoils(1).credentials[0].tensors["images"]
    assert torch.equal(result.rows, held)
    assert result.rows.data_ptr() != held.data_ptr()
    assert (result.cost.copies, result.cost.queries) == (1, 0)


def test_where_queries_bear_the_credential_the_thief_sends_his_own(club_of_queries, digits):
    resources = Resources.of(digits, 0.1)
    made = club_of_queries.shown("replay", resources, 1).rows
    assert len(made) == resources.rows.rows
    assert club_of_queries.examined(made).user == "user0"
    assert club_of_queries.examined(resources.rows.inputs).user is None


def test_without_a_credential_or_queries_it_is_refused(club, club_of_queries, digits):
    with pytest.raises(ParameterError, match="more credentials"):
        club.shown("replay", Resources.of(digits))
    with pytest.raises(ParameterError, match="no queries"):
        club_of_queries.shown("replay", Resources.of(digits, 0.0), 1)
