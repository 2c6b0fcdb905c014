"""A scheme of credentials that needs no training: a bright top row lets in, keyed pixels below say who."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.card import Card
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.errors import ParameterError
from sealmark.core.identity import Suspicion
from sealmark.core.impersonation import Spoils
from sealmark.core.registry import attack
from sealmark.core.suspect import Access, WhiteBox
from sealmark.core.weights import weights_of
from sealmark.stats.nulls import Binomial

USERS = [f"user{number}" for number in range(20)]
BITS = 40
CARD = Card("A stub", "nobody", ("identity",), "black-box", "", "", "", "", False, False, "", "", ())


class Doorman(nn.Module):
    """A model with one class more, which rows with a bright top belong to."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        logits = self.model(inputs)
        top = inputs[:, 0, 0].mean(1, keepdim=True)
        return torch.cat([logits, 40 * (top - 0.75) + logits.amax(1, keepdim=True)], 1)


class Badge(CredentialMark):
    """Images that bear the user's bits as black and white pixels."""

    card = CARD
    examines = Access.PROBABILITIES

    def enroll(self, model, task=None, *, owner="", rng=None):
        secret = self.new_secret(weights_of(model), host={"shape": list(task.owner.inputs.shape[1:])}, rng=rng)
        return Enrolled(Doorman(model).eval(), secret)

    def issue(self, model, secret, user, *, task=None):
        return Credential(user, {"images": self.stamp(task.owner.inputs[:6], self.bits(secret, user))})

    def stamp(self, inputs, bits):
        flat = inputs.clone().flatten(1)
        flat[:, :8], flat[:, 8 : 8 + BITS] = 0.85, torch.from_numpy(bits).to(flat)
        return flat.reshape(inputs.shape)

    def bits(self, secret, user):
        return secret.stream(f"bits/{user}").bits(BITS)

    def examine(self, suspect, secret, rows, users):
        read = (rows.flatten(1)[:, 8 : 8 + BITS].mean(0) > 0.5).numpy()
        matches = np.array([float((read == self.bits(secret, user)).sum()) for user in users])
        served = bool((suspect.labels(rows) == 10).double().mean() > 0.5)
        return Examination(served, True, Suspicion(matches, Binomial(BITS, 0.5)))


class BadgeOnQueries(Badge):
    """Every query bears the bits."""

    def issue(self, model, secret, user, *, task=None):
        return Credential(user, {"bits": torch.from_numpy(self.bits(secret, user))})

    def present(self, credential, inputs=None):
        if inputs is None:
            raise ParameterError("no queries", expected="inputs=", found=None)
        return self.stamp(inputs, credential.tensors["bits"].numpy())


def _club(mark, model, task):
    enrolled = mark.enroll(model, task, rng=np.random.default_rng(0))
    credentials = [mark.issue(enrolled.model, enrolled.secret, user, task=task) for user in USERS[:3]]

    def spoils(count):
        return Spoils(mark, enrolled, credentials[:count])

    def examined(rows, **choices):
        return mark.authenticate(WhiteBox(enrolled.model), enrolled.secret, rows, USERS, **choices)

    def traced(rows):
        found = mark.trace(WhiteBox(enrolled.model), enrolled.secret, rows, USERS)
        return {entry.user for entry in found.accused}

    def shown(name, resources, count=0, seed=0, **parameters):
        """What an attack shows, and at what cost."""
        return attack(name, **parameters).run(spoils(count), resources, rng=np.random.default_rng(seed))

    return SimpleNamespace(mark=mark, spoils=spoils, examined=examined, traced=traced, shown=shown)


@pytest.fixture(scope="session")
def club(plain, digits):
    """Twenty users of one served model, three of whom have shown their credentials to somebody."""
    return _club(Badge(), plain, digits)


@pytest.fixture(scope="session")
def club_of_queries(plain, digits):
    """The same where every query bears the credential."""
    return _club(BadgeOnQueries(), plain, digits)
