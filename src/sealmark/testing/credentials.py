"""Properties of credentials."""

from __future__ import annotations

import numpy as np
import torch

from sealmark.core.credentials import CredentialMark, Gate, Reason
from sealmark.core.errors import AccessError, ParameterError
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.stats.calibration import super_uniformity
from sealmark.testing.bench import USERS, Bench
from sealmark.testing.general import refuses

_OTHERS = tuple(f"user{number}" for number in range(40))


def check_fidelity(scheme: CredentialMark, bench: Bench) -> None:
    """Users with a credential are served about as well as by the plain model."""
    enrolled, holder = bench.enrolled(scheme), bench.credential(scheme, USERS[0])
    rows = bench.judges
    sent = scheme.present(holder, rows.inputs) if scheme.card.key_point == "query" else rows.inputs
    answers = WhiteBox(enrolled.model).logits(sent)[:, : bench.task.classes]
    drop = bench.accuracy(bench.plain) - bench.task.metric(answers, rows.targets)
    assert drop <= scheme.card.max_drop, f"accuracy fell by {drop:.4f}"


def check_users_are_recognized(scheme: CredentialMark, bench: Bench) -> None:
    """A credential is accepted as its user's, and as nobody else's."""
    enrolled = bench.enrolled(scheme)
    for user in USERS[:2]:
        found = scheme.authenticate(WhiteBox(enrolled.model), enrolled.secret, _shown(scheme, bench, user), USERS)
        assert (found.user, found.reason) == (user, Reason.ACCEPTED), found
        assert found.p_value <= found.alpha


def check_credentials_repeat(scheme: CredentialMark, bench: Bench) -> None:
    """A user gets the same credential again, and another user another."""
    enrolled, mine = bench.enrolled(scheme), bench.credential(scheme, USERS[0])
    again = scheme.issue(enrolled.model, enrolled.secret, USERS[0], task=bench.task)
    other = bench.credential(scheme, USERS[1])
    assert mine.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(mine.tensors[name], again.tensors[name]) for name in mine.tensors)
    assert any(not torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)


def check_the_revoked_are_known_and_refused(scheme: CredentialMark, bench: Bench) -> None:
    """A revoked user is recognized, refused for that reason, and can still be traced."""
    enrolled, rows = bench.enrolled(scheme), _shown(scheme, bench, USERS[0])
    suspect = WhiteBox(enrolled.model)
    found = scheme.authenticate(suspect, enrolled.secret, rows, USERS, revoked=USERS[:1])
    assert (found.user, found.reason, found.accepted) == (USERS[0], Reason.REVOKED, False)
    traced = scheme.trace(suspect, enrolled.secret, rows, USERS)
    assert [entry.user for entry in traced.accused] == [USERS[0]]


def check_strangers_are_not_recognized(scheme: CredentialMark, bench: Bench) -> None:
    """Noise, plain rows and the credential of somebody who is not on the list are nobody's."""
    enrolled = bench.enrolled(scheme)
    rng = np.random.default_rng(0)
    inputs = bench.task.attacker.inputs[:16]
    noise = torch.from_numpy(rng.uniform(float(inputs.min()), float(inputs.max()), inputs.shape)).to(inputs)
    for rows in (inputs, noise, _shown(scheme, bench, USERS[0])):
        found = scheme.authenticate(WhiteBox(enrolled.model), enrolled.secret, rows, USERS[1:])
        assert found.user is None, found
        assert not found.accepted


def check_p_values_of_others_hold(scheme: CredentialMark, bench: Bench) -> None:
    """Users whose credential was not shown do not look as if it was, more often than their p-values say."""
    enrolled, rows = bench.enrolled(scheme), _shown(scheme, bench, USERS[0])
    found = scheme.examine(WhiteBox(enrolled.model), enrolled.secret, rows, _OTHERS).suspicion
    fit = super_uniformity([float(np.exp(found.null.log_p(value))) for value in found.statistics])
    assert fit > 1e-4, f"p-values of others are too small: {fit:.2g}"


def check_another_secret_recognizes_nobody(scheme: CredentialMark, bench: Bench) -> None:
    """With another owner's secret for the same model, nobody is let in."""
    enrolled, rows = bench.enrolled(scheme), _shown(scheme, bench, USERS[0])
    for seed in range(3):
        found = scheme.authenticate(WhiteBox(enrolled.model), bench.fresh(scheme, seed), rows, USERS)
        assert not found.accepted, found


def check_the_gate_serves_its_users_alone(scheme: CredentialMark, bench: Bench) -> None:
    """Closed it is useless, open it answers as the model does; revoking closes it."""
    enrolled, rows = bench.enrolled(scheme), _shown(scheme, bench, USERS[0])
    gate = Gate(scheme, enrolled, USERS).eval()
    inputs, targets = bench.judges.inputs, bench.judges.targets
    if scheme.card.key_point == "query":
        inputs = scheme.present(bench.credential(scheme, USERS[0]), inputs)
    with torch.no_grad():
        closed = bench.task.metric(gate(inputs)[:, : bench.task.classes], targets)
        assert closed <= scheme.card.max_no_key, f"a closed gate leaves {closed:.3f}"
        assert gate.admit(rows).accepted
        assert torch.equal(gate(inputs), enrolled.model(inputs))
        gate.revoked.add(USERS[0])
        assert torch.equal(gate(inputs), scheme.spoil(enrolled.model(inputs), enrolled.secret))


def check_bad_credential_calls_are_refused(scheme: CredentialMark, bench: Bench) -> None:
    """No rows, rows of another shape, no users, no name, and too little access are errors."""
    enrolled, rows = bench.enrolled(scheme), _shown(scheme, bench, USERS[0])
    suspect, secret = WhiteBox(enrolled.model), enrolled.secret
    closed = BlackBox(lambda inputs: torch.zeros(len(inputs)), returns="label")
    assert refuses(ParameterError, lambda: scheme.authenticate(suspect, secret, rows[:0], USERS))
    assert refuses(ParameterError, lambda: scheme.authenticate(suspect, secret, rows[..., :-1], USERS))
    assert refuses(ParameterError, lambda: scheme.authenticate(suspect, secret, rows, []))
    assert refuses(ParameterError, lambda: scheme.issue(enrolled.model, secret, "", task=bench.task))
    assert refuses(ParameterError, lambda: scheme.enroll(bench.plain))
    if scheme.examines & closed.access != scheme.examines:
        assert refuses(AccessError, lambda: scheme.authenticate(closed, secret, rows, USERS))


def _shown(scheme: CredentialMark, bench: Bench, user: str) -> torch.Tensor:
    """What a user sends: his images, or some of the test rows as he must send them."""
    return scheme.present(bench.credential(scheme, user), bench.task.test.inputs[:32])
