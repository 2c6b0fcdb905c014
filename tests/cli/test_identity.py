from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.errors import ServiceError
from sealmark.core.identity import Issued, Suspicion, UserMark
from sealmark.core.integrity import CodeNull
from sealmark.core.registry import scheme
from sealmark.core.suspect import Access
from sealmark.core.weights import weights_of
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.revocation import read_revocations
from sealmark.runtime import issuing
from sealmark.runtime.issuing import Copy
from sealmark.tasks.digits import task as digits_task

PLAIN = "plain.safetensors"
TO_THREE = f"issue {PLAIN} --user ada --user b/ob --user Çelik --out copies"


def listed(sealmark) -> dict:
    return json.loads(sealmark("vault list --json").stdout)


def copies() -> dict[str, str]:
    """Each user's copy, in the folder that `TO_THREE` makes."""
    files = sorted(Path("copies").glob("*.safetensors"))
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
    licenses = {held["user"]: held["id"] for held in listed(sealmark)["licenses"]}
    assert [entry.license for entry in first.entries] == [digests["ada"], licenses["ada"]]
    assert second.number > first.number
    both = {named[user] for named in (digests, licenses) for user in ("ada", "b/ob")}
    assert {entry.license for entry in second.entries} == both


def test_a_list_is_written_only_when_it_is_asked_for(sealmark, desk):
    sealmark(TO_THREE)
    told = json.loads(sealmark("revoke ada --json").stdout)
    assert (told["copies"], told["licenses"], told["list"]) == (1, 1, None)
    assert json.loads(sealmark("revoke b/ob --out list.json --json").stdout)["list"] == 1


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
        ("revoke eve --out list.json", 2, "nothing was issued"),
    ],
)
def test_a_wrong_call_writes_nothing_and_notes_nobody(sealmark, desk, contents, line, code, said):
    sealmark(f"keygen spread_spectrum --name team --weights {PLAIN}")
    before, kept = contents(), sealmark("vault list --json").stdout
    assert said in sealmark(line, code=code).stderr
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept


def stopping_at(monkeypatch, user, error):
    """Lets the copies of others be made, and stops at this user's, once it is written."""
    real = issuing.rewrite_file

    def stop(source, target, change, **options):
        real(source, target, change, **options)
        if target.name.startswith(user):
            raise error

    monkeypatch.setattr(issuing, "rewrite_file", stop)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ServiceError("disk full"), 4)])
def test_an_issue_that_stops_at_the_first_copy_leaves_nothing(sealmark, desk, contents, monkeypatch, error, code):
    before, kept = contents(), sealmark("vault list --json").stdout
    stopping_at(monkeypatch, "ada", error)
    sealmark(f"issue {PLAIN} --user ada --user bob --out copies", code=code)
    assert contents() == before
    assert not Path("copies").exists()
    assert sealmark("vault list --json").stdout == kept


def test_an_issue_that_stops_keeps_whole_copies_and_ends_when_run_again(sealmark, desk, monkeypatch):
    line = f"issue {PLAIN} --user ada --user bob --out copies --expires 30d"
    with monkeypatch.context() as patch:
        stopping_at(patch, "bob", ServiceError("disk full"))
        sealmark(line, code=4)
    assert sorted(path.name for path in Path("copies").iterdir()) == ["ada.lic", "ada.safetensors"]
    assert [user["user"] for user in listed(sealmark)["users"]] == ["ada"]
    first = Path("copies/ada.lic").read_bytes()
    told = json.loads(sealmark(f"{line} --json").stdout)
    assert [(copy["user"], copy["made"]) for copy in told["copies"]] == [("ada", False), ("bob", True)]
    assert Path("copies/ada.lic").read_bytes() == first
    assert len(listed(sealmark)["licenses"]) == 2


def test_a_copy_that_lost_a_bit_is_not_taken_for_whole(sealmark, desk, contents):
    sealmark(f"issue {PLAIN} --user ada --out ada.safetensors")
    data = bytearray(Path("ada.safetensors").read_bytes())
    data[-1] ^= 1
    Path("ada.safetensors").write_bytes(data)
    before = contents()
    assert "is there already" in sealmark(f"issue {PLAIN} --user ada --out ada.safetensors", code=2).stderr
    assert contents() == before
    sealmark(f"issue {PLAIN} --user ada --out ada.safetensors --force")
    assert Path("ada.safetensors").read_bytes() != data


def test_a_copy_without_its_license_gets_the_same_license_again(sealmark, desk):
    sealmark(TO_THREE)
    first = Path("copies/ada.lic").read_bytes()
    Path("copies/ada.lic").unlink()
    sealmark(TO_THREE)
    assert Path("copies/ada.lic").read_bytes() == first


def test_what_a_killed_run_left_behind_is_swept_away(sealmark, desk):
    Path("copies/.issuing").mkdir(parents=True)
    Path("copies/.issuing/ada.safetensors").write_bytes(b"half")
    sealmark(TO_THREE)
    assert not Path("copies/.issuing").exists()


def test_a_copy_that_is_not_the_one_issued_before_is_refused(sealmark, desk, monkeypatch):
    sealmark(f"issue {PLAIN} --user ada --out a.safetensors")
    monkeypatch.setattr(Copy, "digest", "0" * 64, raising=False)
    monkeypatch.setattr(
        Copy, "__init__", lambda self, user, target, digest: vars(self).update(user=user, target=target)
    )
    assert (
        "not the copy that ada got before"
        in sealmark(f"issue {PLAIN} --user ada --out b.safetensors", code=3).stderr
    )
    assert not Path("b.safetensors").exists()


def test_users_come_from_a_file_with_comments(sealmark, desk):
    Path("users.txt").write_text("# customers\nada\n\nbob\n")
    sealmark(f"issue {PLAIN} --users-file users.txt --out copies")
    names = ["ada.lic", "ada.safetensors", "bob.lic", "bob.safetensors"]
    assert sorted(path.name for path in Path("copies").iterdir()) == names


def test_one_user_in_a_file_gets_a_folder_too(sealmark, desk):
    Path("users.txt").write_text("ada\n")
    sealmark(f"issue {PLAIN} --users-file users.txt --out copies")
    assert Path("copies/ada.safetensors").is_file()


@pytest.mark.parametrize("form", ["missing", "binary", "empty", "key"])
def test_a_bad_file_of_users_is_refused(sealmark, desk, form):
    data = {"binary": b"\xff\xfe", "empty": b"# nobody\n", "key": b"ada\tsealmark-recipient-v1:nonsense\n"}
    if form in data:
        Path("users.txt").write_bytes(data[form])
    sealmark(f"issue {PLAIN} --users-file users.txt --out copies", code=3 if form == "key" else 2)
    assert not Path("copies").exists()


def test_a_mark_that_runs_the_model_takes_no_workers(sealmark, desk, stamp):
    line = f"issue {PLAIN} --user ada --scheme {stamp} --task digits --out a --workers 2"
    assert "no --workers" in sealmark(line, code=2).stderr


def test_workers_without_ray_say_how_to_get_it(sealmark, desk, contents, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = contents()
    error = sealmark(f"issue {PLAIN} --user ada --user bob --out copies --workers 2", code=2).stderr
    assert "pip install 'sealmark[ray]'" in error
    assert contents() == before


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
