from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.errors import ServiceError
from sealmark.core.identity import Issued, Suspicion, UserMark, WeightMark
from sealmark.core.integrity import CodeNull
from sealmark.core.registry import scheme
from sealmark.core.suspect import Access
from sealmark.core.weights import weights_of
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.envelope import verify_document
from sealmark.formats.license import License, sign_license
from sealmark.formats.revocation import read_revocations
from sealmark.tasks.digits import task as digits_task
from sealmark.vault import Vault

PLAIN = "plain.safetensors"
TO_THREE = f"issue {PLAIN} --user ada --user b/ob --user Çelik --out copies"


def listed(sealmark) -> dict:
    return json.loads(sealmark("vault list --json").stdout)


def copies() -> dict[str, str]:
    """Each user's copy, in the folder that `TO_THREE` makes."""
    files = sorted(Path("copies").iterdir())
    starts = {"ada": "ada", "b/ob": "b_ob", "Çelik": "_elik"}
    return {user: str(next(f for f in files if f.name.startswith(start))) for user, start in starts.items()}


def test_the_first_issue_makes_a_secret_named_after_the_model(sealmark, desk):
    result = sealmark(f"issue {PLAIN} --user ada --out ada.safetensors")
    assert "vault commitment plain" in result.stderr
    vault = listed(sealmark)
    assert vault["secrets"][-1]["name"] == "plain"
    assert vault["users"][0]["user"] == "ada"
    assert len(vault["users"][0]["copy"]) == 64


def test_a_later_issue_uses_the_same_secret(sealmark, desk):
    sealmark(f"issue {PLAIN} --user ada --out ada.safetensors")
    assert "Made" not in sealmark(f"issue {PLAIN} --user bob --out bob.safetensors").stderr
    assert Path("ada.safetensors").read_bytes() != Path("bob.safetensors").read_bytes()
    assert {user["secret"] for user in listed(sealmark)["users"]} == {"plain"}


def test_several_users_get_a_file_each_whatever_their_names(sealmark, desk):
    sealmark(TO_THREE)
    assert len({Path(file).read_bytes() for file in copies().values()}) == 3


def test_issuing_again_gives_the_very_same_copy(sealmark, desk):
    sealmark(f"issue {PLAIN} --user ada --out a.safetensors")
    sealmark(f"issue {PLAIN} --user ada --out b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert len(listed(sealmark)["users"]) == 1


def test_a_secret_made_by_keygen_is_used_by_name(sealmark, desk):
    sealmark(f"keygen spread_spectrum --name team --weights {PLAIN} --set strength=0.08")
    told = json.loads(sealmark(f"issue {PLAIN} --user ada --secret team --out a.safetensors --json").stdout)
    assert told["secret"] == "team"


def test_a_folder_of_shards_gives_folders_of_shards(sealmark, desk):
    Path("parts").mkdir()
    Path(PLAIN).rename("parts/model.safetensors")
    sealmark("issue parts --user ada --user bob --out copies")
    assert Path("copies/ada/model.safetensors").is_file()


@pytest.mark.parametrize("user", ["ada", "b/ob", "Çelik"])
def test_trace_names_the_leaker_and_nobody_else(sealmark, desk, user):
    sealmark(TO_THREE)
    found = json.loads(sealmark(f"trace '{copies()[user]}' --secret plain --original {PLAIN} --json").stdout)
    assert [entry["user"] for entry in found["accused"]] == [user]
    assert found["alpha"] == 1e-6


def test_trace_prints_the_bound_and_a_ranking(sealmark, desk):
    sealmark(TO_THREE)
    text = sealmark(f"trace {copies()['ada']} --secret plain --original {PLAIN}").stdout
    assert "anyone innocent of 3 users is accused with chance at most 1e-06" in text
    assert "b/ob" in text


def test_trace_of_an_average_names_a_colluder(sealmark, desk):
    sealmark(TO_THREE)
    files = " ".join(f"'{copies()[user]}'" for user in ("ada", "Çelik"))
    sealmark(f"attack average {files} --task digits --out average.safetensors")
    found = json.loads(sealmark(f"trace average.safetensors --secret plain --original {PLAIN} --json").stdout)
    accused = {entry["user"] for entry in found["accused"]}
    assert accused
    assert accused <= {"ada", "Çelik"}


def test_trace_of_an_innocent_model_accuses_nobody(sealmark, desk):
    sealmark(TO_THREE)
    result = sealmark(f"trace marked.safetensors --secret plain --original {PLAIN}", code=1)
    assert "nobody" in result.stdout


def test_trace_of_the_original_itself_is_inconclusive(sealmark, desk):
    sealmark(TO_THREE)
    result = sealmark(f"trace {PLAIN} --secret plain --original {PLAIN}", code=1)
    assert "INCONCLUSIVE" in result.stdout
    assert "cannot reach alpha" in result.stderr


def test_trace_keeps_a_signed_accusation(sealmark, desk):
    sealmark(TO_THREE)
    line = f"trace {copies()['ada']} --secret plain --original {PLAIN} --evidence-out e.json"
    sealmark(line)
    anchor = VerifyKey.parse(listed(sealmark)["public"]["verify"])
    body = verify_document(Path("e.json").read_bytes(), "evidence", [anchor])
    assert body["type"] == "accusation"
    assert body["evidence"]["accused"][0]["user"] == "ada"
    assert listed(sealmark)["evidence"][0]["kind"] == "accusation"


def test_a_revoked_user_gets_no_copy(sealmark, desk, contents):
    sealmark(TO_THREE)
    sealmark("revoke ada --reason 'did not pay'")
    before = contents()
    error = sealmark(f"issue {PLAIN} --user eve --user ada --out more", code=1).stderr
    assert "error [REVOKED]: ada was revoked" in error
    assert "did not pay" in error
    assert contents() == before
    assert not Path("more").exists()


def test_a_revoked_user_is_still_traced(sealmark, desk):
    sealmark(TO_THREE)
    sealmark("revoke ada")
    sealmark(f"trace {copies()['ada']} --secret plain --original {PLAIN}")


def test_the_revocation_list_is_signed_and_its_number_grows(sealmark, desk):
    sealmark(TO_THREE)
    anchors = [VerifyKey.parse(listed(sealmark)["public"]["verify"])]
    sealmark("revoke ada --reason leak --out one.json")
    sealmark("revoke b/ob --out two.json")
    first = read_revocations(Path("one.json").read_bytes(), anchors)
    second = read_revocations(Path("two.json").read_bytes(), anchors, seen=first.number)
    digests = {user["user"]: user["copy"] for user in listed(sealmark)["users"]}
    assert [entry.license for entry in first.entries] == [digests["ada"]]
    assert second.number > first.number
    assert {entry.license for entry in second.entries} == {digests["ada"], digests["b/ob"]}


def test_a_revoked_users_licenses_are_on_the_list(sealmark, desk):
    sealmark(TO_THREE)
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        for user in ("ada", "Çelik"):
            vault.add_license(sign_license(License(f"n-{user}", user, model="00"), vault.signing_key))
    told = json.loads(sealmark("revoke ada --json").stdout)
    copy = next(user["copy"] for user in listed(sealmark)["users"] if user["user"] == "ada")
    assert [entry["license"] for entry in told["entries"]] == [copy, "n-ada"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"issue {PLAIN} --user ada --user ada --out new", 2, "a user twice"),
        (f"issue {PLAIN} --user '' --out new", 2, "bad user"),
        (f"issue {PLAIN} --user ada --out marked.safetensors", 2, "--force"),
        (f"issue {PLAIN} --user ada --user bob --out marked.safetensors", 2, "is there already"),
        (f"issue {PLAIN} --user ada --out no/new", 2, "an existing folder"),
        (f"issue {PLAIN} --user ada --secret nobodys --out new", 2, "no secret 'nobodys'"),
        (f"issue {PLAIN} --user ada --secret mine --out new", 2, "spread_spectrum, found a scheme for ownership"),
        (f"issue {PLAIN} --user ada --scheme uchida --out new", 2, "cannot issue with uchida"),
        (f"issue {PLAIN} --user ada --set strenght=1 --out new", 2, "strength"),
        ("issue marked.safetensors --user ada --secret team --out new", 3, "MODEL_MISMATCH"),
        ("issue vault.key --user ada --out new", 3, "safetensors"),
        (f"trace {PLAIN} --secret team --original {PLAIN} --evidence-out e.json", 2, "nobody has a copy"),
        (f"trace {PLAIN} --secret mine --original {PLAIN}", 2, "cannot trace with uchida"),
        ("revoke eve --out list.json", 2, "no copy was issued"),
    ],
)
def test_a_wrong_call_writes_nothing_and_notes_nobody(sealmark, desk, contents, line, code, said):
    sealmark(f"keygen spread_spectrum --name team --weights {PLAIN}")
    before, kept = contents(), sealmark("vault list --json").stdout
    assert said in sealmark(line, code=code).stderr
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept


def test_trace_without_the_original_says_that_it_is_needed(sealmark, desk):
    sealmark(TO_THREE)
    assert "original" in sealmark(f"trace {copies()['ada']} --secret plain", code=2).stderr


def test_trace_against_another_original_is_refused(sealmark, desk):
    sealmark(TO_THREE)
    sealmark(f"trace {copies()['ada']} --secret plain --original marked.safetensors", code=3)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ServiceError("disk full"), 4)])
def test_an_interrupted_issue_leaves_no_copy_and_no_user(sealmark, desk, contents, monkeypatch, error, code):
    real = WeightMark.issue_file

    def stop_at_bob(self, source, target, secret, user, **options):
        real(self, source, target, secret, user, **options)
        if user == "bob":
            raise error

    before, kept = contents(), sealmark("vault list --json").stdout
    monkeypatch.setattr(WeightMark, "issue_file", stop_at_bob)
    sealmark(f"issue {PLAIN} --user ada --user bob --out copies", code=code)
    assert contents() == before
    assert not Path("copies").exists()
    assert sealmark("vault list --json").stdout == kept


def test_a_further_user_joins_a_folder_of_copies(sealmark, desk):
    sealmark(TO_THREE)
    sealmark(f"issue {PLAIN} --user dan --out copies")
    assert Path("copies/dan.safetensors").is_file()


@dataclass(frozen=True)
class Stamp(UserMark):
    """A user mark of another package that must run the model: a keyed number in one bias."""

    access = Access.MODULE

    def enroll(self, model, task=None, *, users=(), owner="", rng=None):
        return self.new_secret(weights_of(model), owner=owner, rng=rng)

    def issue(self, model, secret, user, *, task=None):
        marked = copy.deepcopy(model)
        with torch.no_grad():
            marked.fc2.bias[0] += self._number(secret, user)
        return Issued(user, marked)

    def suspicion(self, suspect, secret, users, original):
        moved = float(suspect.model.fc2.bias.detach()[0] - original["fc2.bias"][0])
        found = [float(abs(moved - self._number(secret, user)) < 1e-5) for user in users]
        return Suspicion(np.array(found), CodeNull(64))

    def _number(self, secret, user):
        return float(secret.stream(user).normal(1)[0])


@pytest.fixture
def stamp(monkeypatch):
    """Lists `Stamp` among the schemes, under the name that its module gives it."""
    name = Stamp.__module__.rpartition(".")[2]
    monkeypatch.setattr(Stamp, "card", scheme("spread_spectrum").card, raising=False)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Stamp)
    point = EntryPoint(name, "elsewhere", "sealmark.schemes")
    known = registry.items("scheme") | {name: registry.Item(name, "identity", point)}
    monkeypatch.setattr(registry, "items", lambda kind: known)
    return name


def test_a_mark_that_runs_the_model_is_issued_and_traced_with_its_network(sealmark, desk, stamp, monkeypatch):
    monkeypatch.setattr(registry, "task", lambda name: digits_task())
    sealmark(f"issue {PLAIN} --user ada --user bob --scheme {stamp} --task digits --out copies")
    line = f"trace copies/bob.safetensors --secret plain --original {PLAIN} --task digits --json"
    assert [entry["user"] for entry in json.loads(sealmark(line).stdout)["accused"]] == ["bob"]
    sealmark(f"trace {PLAIN} --secret plain --original {PLAIN} --task digits", code=1)


def test_a_mark_that_runs_the_model_asks_which_network(sealmark, desk, stamp):
    assert "which network?" in sealmark(f"issue {PLAIN} --user ada --scheme {stamp} --out a", code=2).stderr


def test_keygen_enrolls_a_live_model_for_a_mark_that_runs_it(sealmark, desk, stamp, monkeypatch):
    monkeypatch.setattr(registry, "task", lambda name: digits_task())
    sealmark(f"keygen {stamp} --name team --weights {PLAIN} --task digits")
    assert listed(sealmark)["secrets"][-1]["scheme"] == stamp
