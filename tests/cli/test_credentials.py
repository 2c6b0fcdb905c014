from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sealmark.core import registry
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.identity import Suspicion
from sealmark.core.suspect import Access
from sealmark.core.weights import weights_of
from sealmark.crypto.recipients import Identity
from sealmark.stats.nulls import Binomial
from sealmark.tasks.digits import task as digits_task

BITS = 64


@dataclass(frozen=True)
class Keyed(CredentialMark):
    """Credentials of another package: keyed black and white images, and a served model of one class more."""

    examines = Access.MODULE
    own: bool = True

    def enroll(self, model, task=None, *, owner="", rng=None):
        served = copy.deepcopy(model)
        wider = nn.Linear(model.fc2.in_features, model.fc2.out_features + 1)
        with torch.no_grad():
            wider.weight.zero_()[:-1] = model.fc2.weight
            wider.bias.fill_(-9.0)[:-1] = model.fc2.bias
        served.fc2 = wider
        shape = list(task.owner.inputs.shape[1:])
        return Enrolled(served, self.new_secret(weights_of(model), host={"shape": shape}, owner=owner))

    def issue(self, model, secret, user, *, task=None):
        return Credential(user, {"images": self._image(secret, user)[None]})

    def examine(self, suspect, secret, rows, users):
        same = [
            float((self._bits(row) == self._bits(self._image(secret, user))).sum())
            for user in users
            for row in rows[:1]
        ]
        return Examination(
            served=suspect.model.fc2.out_features == 11,
            readable=True,
            suspicion=Suspicion(np.array(same), Binomial(BITS, 0.5)),
        )

    def _image(self, secret, user):
        shape = secret.host["shape"]
        bits = torch.from_numpy(secret.stream(f"user/{user}").bits(int(np.prod(shape))).astype(np.float32))
        return bits.reshape(shape)

    def _bits(self, row):
        return row.reshape(-1)[:BITS] > 0.5


@pytest.fixture(autouse=True)
def keyed(monkeypatch, desk):
    """Lists `Keyed` among the schemes, under the name that its module gives it."""
    name = Keyed.__module__.rpartition(".")[2]
    monkeypatch.setattr(Keyed, "card", registry.scheme("spread_spectrum").card, raising=False)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Keyed)
    known = registry.items("scheme") | {
        name: registry.Item(name, "identity", EntryPoint(name, "elsewhere", "sealmark.schemes"))
    }
    everything = registry.items
    monkeypatch.setattr(registry, "items", lambda kind: known if kind == "scheme" else everything(kind))
    monkeypatch.setattr(registry, "task", lambda name: digits_task())
    return name


@pytest.fixture
def served(sealmark, keyed) -> str:
    sealmark(f"embed --scheme {keyed} --weights plain.safetensors --task digits --out served.safetensors")
    return "issue served.safetensors --secret served --task digits"


ASK = "authenticate {} --served served.safetensors --task digits --secret served --json"


def test_embed_writes_the_served_model_and_keeps_the_secret(sealmark, keyed):
    line = f"embed --scheme {keyed} --weights plain.safetensors --task digits --out served.safetensors --name team"
    told = json.loads(sealmark(f"{line} --json").stdout)
    secrets = json.loads(sealmark("vault list --json").stdout)["secrets"]
    assert (secrets[-1]["name"], secrets[-1]["commitment"]) == ("team", told["commitment"])
    assert weights_of("served.safetensors").info["fc2.weight"].shape[0] == 11
    assert weights_of("served.safetensors").digest() == told["digest"]


def test_a_user_gets_a_credential_and_a_license(sealmark, served):
    told = json.loads(sealmark(f"{served} --user ada --expires 30d --out ada.credential --json").stdout)["copies"][
        0
    ]
    assert Path("ada.credential").stat().st_mode & 0o777 == 0o600
    assert Path("ada.lic").is_file()
    record = json.loads(sealmark("list --json").stdout)["licenses"][0]
    assert record["model"] == weights_of("served.safetensors").digest()
    assert json.loads(sealmark("vault list --json").stdout)["users"][0]["copy"] == told["digest"]


def test_a_credential_is_recognized_as_its_users_and_no_others(sealmark, served):
    sealmark(f"{served} --user ada --user b/ob --out held")
    for user in ("ada", "b/ob"):
        file = next(Path("held").glob(f"{user[0]}*.credential"))
        found = json.loads(sealmark(ASK.format(file)).stdout)
        assert (found["user"], found["reason"], found["accepted"]) == (user, "ACCEPTED", True)


def test_the_answer_tells_bound_and_rule(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    text = sealmark(ASK.format("ada.credential").removesuffix("--json")).stdout
    assert "ACCEPTED" in text
    assert "alpha 1e-06, 1 users" in text
    assert "lets it in" in text


def test_rows_that_nobody_was_issued_are_refused(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    save_file({"rows": digits_task().test.inputs[:3].contiguous()}, "rows.safetensors")
    found = json.loads(sealmark(ASK.format("rows.safetensors"), code=1).stdout)
    assert (found["user"], found["reason"]) == (None, "UNKNOWN_USER")


def test_rows_that_somebody_copied_pass(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    images = weights_of("ada.credential")["images"]
    save_file({"images": images, "more": images.clone()}, "rows.safetensors")
    assert json.loads(sealmark(ASK.format("rows.safetensors")).stdout)["user"] == "ada"


def test_a_revoked_user_is_recognized_and_not_let_in(sealmark, served):
    sealmark(f"{served} --user ada --user bob --out held")
    sealmark("revoke ada --out list.json")
    found = json.loads(sealmark(ASK.format("held/ada.credential"), code=1).stdout)
    assert (found["user"], found["reason"]) == ("ada", "REVOKED")
    sealmark(ASK.format("held/bob.credential"))


def test_a_model_that_was_not_trained_for_it_refuses(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    line = ASK.format("ada.credential").replace("served.safetensors", "plain.safetensors")
    assert json.loads(sealmark(line, code=1).stdout)["reason"] == "MODEL_REFUSES"


def test_the_same_user_keeps_his_credential(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    before = Path("ada.credential").read_bytes()
    told = json.loads(sealmark(f"{served} --user ada --out ada.credential --json").stdout)
    assert not told["copies"][0]["made"]
    sealmark(f"{served} --user ada --out again.credential")
    assert Path("again.credential").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("embed --task digits --out new", 2, "what is embedded?"),
        ("embed --scheme {keyed} --secret mine --task digits --out new", 2, "what is embedded?"),
        ("embed --scheme {keyed} --task digits --out new", 2, "starts from a trained model"),
        (
            "embed --scheme uchida --weights plain.safetensors --task digits --out new",
            2,
            "cannot embed with uchida",
        ),
        ("embed --scheme {keyed} --weights plain.safetensors --task digits --name mine --out new", 2, "already"),
        ("embed --scheme {keyed} --weights plain.safetensors --task digits --out served.safetensors", 2, "--force"),
        ("issue served.safetensors --user ada --out new", 2, "which network?"),
        ("issue served.safetensors --user ada --task digits --workers 2 --out new", 2, "no --workers"),
        ("issue served.safetensors --user ada --task digits --to me.txt --out new", 2, "encrypts nothing"),
        ("issue plain.safetensors --user ada --scheme {keyed} --task digits --out new", 2, "cannot issue"),
        (ASK.format("plain.safetensors"), 2, "nobody has a credential"),
        (ASK.format("plain.safetensors").replace("served --json", "mine"), 2, "cannot authenticate with uchida"),
    ],
)
def test_a_wrong_call_writes_nothing(sealmark, served, keyed, contents, line, code, said):
    Path("me.txt").write_text(json.loads(sealmark("vault list --json").stdout)["public"]["recipient"])
    before, kept = contents(), sealmark("vault list --json").stdout
    assert said in sealmark(line.format(keyed=keyed), code=code).stderr
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept


def test_a_credential_whose_license_has_ended_is_refused(sealmark, served):
    sealmark(f"{served} --user ada --expires 2020-01-01 --out ada.credential")
    told = json.loads(sealmark(ASK.format("ada.credential"), code=1).stdout)
    assert (told["reason"], told["accepted"], told["user"]) == ("EXPIRED", False, "ada")
    sealmark("renew ada --expires 30d --out ada2.lic")
    assert json.loads(sealmark(ASK.format("ada.credential")).stdout)["accepted"]


def test_a_served_model_has_no_lock_to_hand_out(sealmark, served):
    sealmark("lock plain.safetensors --scheme chaotic_weights --name key --out locked.safetensors")
    Path("ada.recipient").write_text(str(Identity.generate().recipient))
    line = f"{served} --lock-key key --to ada.recipient --user ada --out ada.credential"
    assert "UNSUPPORTED" in sealmark(line, code=2).stderr


def test_rows_of_several_names_and_other_schemes_are_refused(sealmark, served):
    sealmark(f"{served} --user ada --out ada.credential")
    assert "which rows?" in sealmark(ASK.format("plain.safetensors"), code=3).stderr
    data = Path("ada.credential").read_bytes().replace(b"test_credentials", b"test_credentialz")
    Path("other.credential").write_bytes(data)
    assert "another scheme" in sealmark(ASK.format("other.credential"), code=3).stderr
