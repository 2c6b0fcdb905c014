"""``sealmark trace``: whoever leaked, from whatever is left of the file; and from a credential's rows."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sealmark.core import registry
from sealmark.core.credentials import Credential, CredentialMark, Enrolled, Examination
from sealmark.core.identity import Suspicion
from sealmark.core.registry import scheme
from sealmark.core.suspect import Access
from sealmark.core.weights import FileWeights, weights_of
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.credential import HeldCredential, write_credential
from sealmark.formats.envelope import verify_document
from sealmark.stats.nulls import KeyedProjection
from sealmark.tasks.digits import task as digits_task
from sealmark.vault import Vault

PLAIN, LEAK = "plain.safetensors", "leak.safetensors"
TRACE = f"trace {LEAK} --secret team --original {PLAIN}"
USERS = ("ada", "bob", "eve")
TO_THREE = f"issue {PLAIN} --user ada --user b/ob --user Çelik --out copies"


def copies() -> dict[str, str]:
    """Each user's copy, in the folder that `TO_THREE` makes."""
    files = sorted(Path("copies").glob("*.safetensors"))
    starts = {"ada": "ada", "b/ob": "b_ob", "Çelik": "_elik"}
    return {user: str(next(f for f in files if f.name.startswith(start))) for user, start in starts.items()}


def marked(model: str, name: str = "team") -> None:
    """Copies of a file for three users, noted in the vault; ``bob.safetensors`` is bob's."""
    mark = scheme("spread_spectrum")
    secret = mark.enroll(model, rng=np.random.default_rng(5))
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        vault.add_secret(name, secret)
        for user in USERS:
            mark.issue_file(model, f"{user}.safetensors", secret, user)
            vault.issue_user(user, secret=name, model=str(secret.facts["model"]))


@pytest.fixture
def issued(desk):
    """The desk after three users got copies."""
    marked(PLAIN)
    return desk


def leak(change, source: str = "bob.safetensors", suffix: str = "") -> None:
    """What became of a copy: ``change`` takes all of its tensors and gives those of the leak."""
    save_file({name: t.contiguous() for name, t in change(load_file(source)).items()}, LEAK + suffix)


def traced(sealmark, line: str = TRACE, code: int = 0) -> dict:
    return json.loads(sealmark(f"{line} --json", code=code).stdout)


def prefixed(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def permuted(tensors):
    """The channels of the second convolution in another order."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    moved = {n: t[order] for n, t in tensors.items() if n.split(".")[0] in ("conv2", "norm2") and t.dim()}
    return tensors | moved | {"conv3.weight": tensors["conv3.weight"][:, order]}


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
    anchor = VerifyKey.parse(json.loads(sealmark("vault list --json").stdout)["public"]["verify"])
    body = verify_document(Path("e.json").read_bytes(), "evidence", [anchor])
    assert body["type"] == "accusation"
    assert body["evidence"]["accused"][0]["user"] == "ada"
    assert json.loads(sealmark("vault list --json").stdout)["evidence"][0]["kind"] == "accusation"


def test_trace_without_the_original_says_that_it_is_needed(sealmark, desk):
    sealmark(TO_THREE)
    assert "original" in sealmark(f"trace {copies()['ada']} --secret plain", code=2).stderr


def test_trace_against_another_original_is_refused(sealmark, desk):
    sealmark(TO_THREE)
    sealmark(f"trace {copies()['ada']} --secret plain --original marked.safetensors", code=3)


def test_a_renamed_leak_is_traced_and_the_page_says_what_was_undone(sealmark, issued):
    leak(prefixed)
    text = sealmark(TRACE).stdout
    assert "renamed" in text
    assert "bob" in text


def test_an_innocent_model_of_other_names_accuses_nobody(sealmark, issued):
    leak(prefixed, "marked.safetensors")
    found = traced(sealmark, code=1)
    assert (found["verdict"], found["accused"]) == ("NO_MATCH", [])


def test_moved_neurons_of_a_renamed_leak_are_put_back_with_the_network(sealmark, issued):
    leak(lambda tensors: prefixed(permuted(tensors)))
    result = sealmark(f"{TRACE} --task digits").stdout
    assert "moved" in result
    assert "as in the original" not in result
    assert [entry["user"] for entry in traced(sealmark, f"{TRACE} --task digits")["accused"]] == ["bob"]


def test_the_page_says_where_neurons_were_not_touched(sealmark, issued):
    assert "as in the original" in sealmark(f"{TRACE.replace(LEAK, 'bob.safetensors')} --task digits").stdout


def test_missing_layers_are_told(sealmark, issued):
    leak(lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("fc2")})
    found = traced(sealmark)
    assert found["details"]["form"] == {"missing": ["fc2.bias", "fc2.weight"]}
    assert "2 missing" in sealmark(TRACE).stdout


def test_the_signed_evidence_holds_all_that_the_accusation_rests_on(sealmark, issued):
    leak(prefixed)
    sealmark(f"{TRACE} --evidence-out e.json")
    anchor = VerifyKey.parse(json.loads(sealmark("vault list --json").stdout)["public"]["verify"])
    body = verify_document(Path("e.json").read_bytes(), "evidence", [anchor])
    found = body["evidence"]
    assert found["ranking"][0]["user"] == "bob"
    assert (found["alpha"], found["users"], found["basis"]) == (1e-6, 3, "bound")
    assert "Chernoff" in found["null"]
    assert len(found["commitment"]) == 64
    assert found["details"]["original"] == weights_of(PLAIN).digest()
    assert found["details"]["form"]["renamed"] > 10
    assert body["suspect"] == {"digest": FileWeights(LEAK).digest(), "description": LEAK}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_names_the_accused(sealmark, issued, suffix):
    leak(dict)
    sealmark(f"{TRACE} --explain why.{suffix}")
    drawn = Path(f"why.{suffix}").read_bytes()
    assert b"MATCH: bob accused" in drawn if suffix == "svg" else drawn[1:4] == b"PNG"


def test_the_plot_is_drawn_where_nobody_is_accused(sealmark, issued):
    leak(dict, "marked.safetensors")
    sealmark(f"{TRACE} --explain why.svg", code=1)
    assert "nobody is accused" in Path("why.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{TRACE} --explain why.gif", 2, ".svg or .png"),
        (f"{TRACE} --explain no/why.svg", 2, "an existing folder"),
        (f"{TRACE} --explain plain.safetensors", 2, "--force"),
        (f"{TRACE} --served {PLAIN}", 2, "marked copies"),
        (f"trace {LEAK} --secret team --lock-key key", 2, "--original PATH"),
        (f"{TRACE} --lock-key nobodys", 2, "nobodys"),
        (f"{TRACE} --lock-key team", 2, "cannot lock a leak again with spread_spectrum"),
    ],
)
def test_a_wrong_call_writes_nothing(sealmark, issued, contents, line, code, said):
    leak(dict)
    before, kept = contents(), sealmark("vault list --json").stdout
    assert said in sealmark(line, code=code).stderr
    assert contents() == before
    assert sealmark("vault list --json").stdout == kept


@pytest.fixture
def unlocked(sealmark, desk):
    """Copies of a locked model are issued; bob unlocks his, renames its tensors, and leaks it."""
    sealmark(f"lock {PLAIN} --scheme chaotic_weights --out locked.safetensors --name key")
    marked("locked.safetensors")
    # an altered file is refused by unlock, which checks what comes out; whoever has the key needs no permission
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        key = vault.secret("key")
    lock = registry.scheme_of(key)
    opened = lock.unlocker(lock.derive(key))
    leak(lambda tensors: prefixed(permuted({name: opened(name, tensor) for name, tensor in tensors.items()})))
    return f"trace {LEAK} --secret team --original locked.safetensors"


def test_an_unlocked_leak_is_traced_with_the_key_of_the_lock(sealmark, unlocked):
    found = traced(sealmark, f"{unlocked} --lock-key key --task digits")
    assert [entry["user"] for entry in found["accused"]] == ["bob"]
    told = found["details"]["relocked"]
    assert told["scheme"] == "chaotic_weights"
    assert told["form"]["renamed"] > 10
    assert told["alignment"]["moved"] > 20
    assert "moved" in sealmark(f"{unlocked} --lock-key key --task digits").stdout


def test_an_unlocked_leak_accuses_nobody_without_the_key(sealmark, unlocked):
    assert traced(sealmark, f"{unlocked} --task digits", code=1)["accused"] == []


def test_another_models_lock_key_is_refused(sealmark, unlocked):
    sealmark("lock marked.safetensors --scheme chaotic_weights --out other.safetensors --name other")
    assert "MODEL_MISMATCH" in sealmark(f"{unlocked} --lock-key other", code=3).stderr


@dataclass(frozen=True)
class Token(CredentialMark):
    """A credential of another package: one row of keyed normals, which the served model must answer."""

    examines = Access.LABELS

    def enroll(self, model, task=None, *, owner="", rng=None):
        return Enrolled(model, self.new_secret(weights_of(model), host={"shape": [1, 8, 8]}, owner=owner, rng=rng))

    def issue(self, model, secret, user, *, task=None):
        return Credential(user, {"images": self._row(secret, user)})

    def examine(self, suspect, secret, rows, users):
        served = len(suspect.labels(rows)) == len(rows)
        scores = [float((rows[0] * self._row(secret, user)[0]).sum() / rows[0].norm()) for user in users]
        return Examination(served, True, Suspicion(np.array(scores), KeyedProjection(signs=False)))

    def _row(self, secret, user):
        return torch.from_numpy(secret.stream(user).normal(64)).float().reshape(1, 1, 8, 8)


@pytest.fixture
def shown_rows(desk, monkeypatch):
    """``shown_rows("bob")`` writes bob's credential; three users have one."""
    name = Token.__module__.rpartition(".")[2]
    monkeypatch.setattr(Token, "card", scheme("spread_spectrum").card, raising=False)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Token)
    known = registry.items("scheme") | {name: registry.Item(name, "identity", EntryPoint(name, "x", "y"))}
    monkeypatch.setattr(registry, "items", lambda kind: known)
    monkeypatch.setattr(registry, "task", lambda name: digits_task())
    mark, model = Token(), digits_task().model(np.random.default_rng(0))
    secret = mark.enroll(model, rng=np.random.default_rng(0)).secret
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        vault.add_secret("team", secret)
        for user in USERS:
            vault.issue_user(user, secret="team", model=str(secret.facts["model"]))
    return functools.partial(mark.issue, model, secret)


ROWS = f"trace {LEAK} --secret team --served {PLAIN} --task digits"


@pytest.mark.parametrize("name", ["images", "anything"])
def test_a_credentials_rows_name_its_user(sealmark, shown_rows, name):
    save_file({name: shown_rows("eve").tensors["images"]}, LEAK)
    found = traced(sealmark, f"{ROWS} --explain why.svg")
    assert [entry["user"] for entry in found["accused"]] == ["eve"]
    assert Path("why.svg").is_file()


def test_a_credential_file_is_shown_as_its_holder_would(sealmark, shown_rows):
    name = Token.__module__.rpartition(".")[2]
    write_credential(HeldCredential(shown_rows("ada"), name, "00"), LEAK)
    assert [entry["user"] for entry in traced(sealmark, ROWS)["accused"]] == ["ada"]
    write_credential(HeldCredential(shown_rows("ada"), "another", "00"), LEAK)
    assert "another scheme" in sealmark(ROWS, code=3).stderr


def test_rows_that_nobody_was_issued_accuse_nobody(sealmark, shown_rows):
    save_file({"images": shown_rows("mallory").tensors["images"]}, LEAK)
    assert traced(sealmark, ROWS, code=1)["accused"] == []


def test_a_file_of_several_tensors_must_say_which_are_the_rows(sealmark, shown_rows):
    save_file({"one": torch.zeros(1, 1, 8, 8), "two": torch.zeros(1, 1, 8, 8)}, LEAK)
    assert "which rows?" in sealmark(ROWS, code=3).stderr


@pytest.mark.parametrize("extra", ["", f"--served {PLAIN} --original {PLAIN}", f"--served {PLAIN} --lock-key team"])
def test_a_credential_needs_the_served_model_and_no_original(sealmark, shown_rows, extra):
    save_file({"images": shown_rows("eve").tensors["images"]}, LEAK)
    line = f"trace {LEAK} --secret team --task digits {extra}"
    assert "this secret is of credentials" in sealmark(line, code=2).stderr
