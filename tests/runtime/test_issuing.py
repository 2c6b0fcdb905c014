from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sealmark.core.canonical import sha256_hex
from sealmark.core.errors import ModelMismatchError, ParameterError, ServiceError, UnsupportedError
from sealmark.core.secret import Secret
from sealmark.core.weights import FileWeights, save_model
from sealmark.formats.secret import secret_to_bytes
from sealmark.identity.spread_spectrum import SpreadSpectrum
from sealmark.runtime import issuing
from sealmark.runtime.issuing import Copy, Order, issue_copies, seal_copy, stands
from sealmark.vault import Vault, write_key_file

MARK = SpreadSpectrum(bits=32)
KEY = bytes(range(32))


@pytest.fixture
def model(tmp_path, rng) -> Path:
    with torch.no_grad():
        made = nn.Linear(64, 64)
        made.weight.copy_(torch.from_numpy(rng.standard_normal((64, 64)).astype(np.float32)))
    save_model(made, tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


@pytest.fixture
def folder(model) -> Path:
    """The model as a folder of one shard."""
    (model.parent / "parts").mkdir()
    shutil.copy(model, model.parent / "parts" / "model.safetensors")
    return model.parent / "parts"


def orders(folder: Path, *users: str) -> list[Order]:
    return [Order(user, folder / f"{user}.safetensors") for user in users]


def test_a_copy_is_what_the_scheme_itself_would_write(model, tmp_path):
    secret = MARK.enroll(model)
    (copy,) = issue_copies(MARK, model, secret, orders(tmp_path, "ada"))
    MARK.issue_file(model, tmp_path / "other", secret, "ada")
    assert copy.target.read_bytes() == (tmp_path / "other").read_bytes()
    assert copy.digest == FileWeights(tmp_path / "other").digest()


def test_nobody_has_anothers_copy(model, tmp_path):
    copies = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada", "bob"))
    assert len({copy.digest for copy in copies}) == 2


def test_copies_are_made_as_they_are_asked_for(model, tmp_path):
    copies = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada", "bob"))
    assert next(copies).user == "ada"
    assert not (tmp_path / "bob.safetensors").exists()


def test_another_model_is_refused_before_anything_is_written(model, tmp_path):
    secret = MARK.enroll(model)
    save_model(nn.Linear(64, 64), model)
    with pytest.raises(ModelMismatchError):
        issue_copies(MARK, model, secret, orders(tmp_path, "ada"))


@pytest.mark.parametrize(("user", "workers"), [("", 1), ("ada", 0)])
def test_a_bad_call_is_refused(model, tmp_path, user, workers):
    with pytest.raises(ParameterError):
        issue_copies(MARK, model, MARK.enroll(model), [Order(user, tmp_path / "a")], workers=workers)


def test_a_sealed_copy_stands_under_its_key_alone(model, tmp_path):
    (copy,) = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"))
    seal_copy(copy, tmp_path / "ada.sealed", KEY)
    assert not copy.target.exists()
    assert stands(tmp_path / "ada.sealed", copy.digest, KEY)
    assert not stands(tmp_path / "ada.sealed", copy.digest, bytes(32))
    assert not stands(tmp_path / "ada.sealed", "0" * 64, KEY)


def test_a_sealed_copy_that_lost_a_bit_does_not_stand(model, tmp_path):
    (copy,) = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"))
    seal_copy(copy, tmp_path / "ada.sealed", KEY)
    data = bytearray((tmp_path / "ada.sealed").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ada.sealed").write_bytes(data)
    assert not stands(tmp_path / "ada.sealed", copy.digest, KEY)


def test_a_sealed_folder_stands_and_without_a_shard_does_not(folder, tmp_path):
    save_model(nn.Linear(2, 2), folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "model.safetensors", "bias": "model.safetensors"}}'
    )
    (folder / "other.safetensors").unlink()
    (copy,) = issue_copies(MARK, folder, MARK.enroll(folder), [Order("ada", tmp_path / "ada")])
    seal_copy(copy, tmp_path / "ada.sealed", KEY)
    assert not copy.target.exists()
    assert len(list((tmp_path / "ada.sealed").iterdir())) == 2
    assert stands(tmp_path / "ada.sealed", copy.digest, KEY)
    (tmp_path / "ada.sealed" / "model.safetensors.sealed").rename(tmp_path / "ada.sealed" / "b.safetensors.sealed")
    (tmp_path / "ada.sealed" / "model.safetensors.index.json.sealed").rename(tmp_path / "ada.sealed" / "a.sealed")
    assert not stands(tmp_path / "ada.sealed", copy.digest, KEY)


def test_a_plain_copy_stands_by_its_digest(model):
    assert stands(model, FileWeights(model).digest())
    assert not stands(model, "0" * 64)
    assert not stands(model.parent / "nothing", FileWeights(model).digest())
    assert not stands(model.parent / "nothing", "0" * 64, KEY)


def test_a_worker_gets_the_secret_as_bytes_and_answers_with_a_digest(model, tmp_path):
    secret = MARK.enroll(model)
    told = issuing._made_there(str(model), str(tmp_path / "a"), secret_to_bytes(secret), "ada")
    assert told == FileWeights(tmp_path / "a").digest()


def test_a_worker_answers_with_an_error_of_ours(model, tmp_path):
    key = secret_to_bytes(MARK.enroll(model))
    assert isinstance(issuing._made_there(str(model), str(tmp_path / "no" / "a"), key, "ada"), ParameterError)


def test_a_worker_refuses_a_secret_of_another_kind(model, tmp_path):
    key = secret_to_bytes(Secret(bytes(32), {"scheme": "sealed", "model": "00"}))
    assert isinstance(issuing._made_there(str(model), str(tmp_path / "a"), key, "ada"), UnsupportedError)


@pytest.mark.parametrize("address", ["nonsense", "auto", ":1"])
def test_a_bad_address_is_refused_at_once(model, tmp_path, address):
    with pytest.raises(ParameterError, match="HOST:PORT"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"), address=address))


def test_a_cluster_that_does_not_answer_is_said_at_once(model, tmp_path):
    with pytest.raises(ServiceError, match="no cluster at 127"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"), address="127.0.0.1:1"))


class Fake:
    """Ray as far as it is used, in this process: each task runs when it is waited for."""

    class exceptions:  # noqa: N801 - a module of Ray
        RayError = RuntimeError

    def __init__(self, *, running=False, fails=None, dies=False):
        self.running, self.fails, self.dies, self.begun, self.down = running, fails, dies, [], 0

    def is_initialized(self):
        return self.running

    def init(self, **options):
        self.options = options
        if self.fails:
            raise self.fails

    def shutdown(self):
        self.down += 1

    def cluster_resources(self):
        return {"CPU": 3.0}

    def put(self, value):
        return value

    def remote(self, **options):
        fake = self

        class Task:
            def __init__(self, function):
                self.function = function

            def remote(self, *arguments):
                fake.begun.append(arguments)
                return (self.function, arguments)

        return Task

    def wait(self, references):
        return references[-1:], references[:-1]

    def get(self, reference):
        if self.dies:
            raise RuntimeError("the worker died\nout of memory")
        function, arguments = reference
        return function(*arguments)


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def test_workers_make_every_copy_and_begin_no_more_than_there_are(model, tmp_path, fake):
    copies = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, *"abcde"), workers=2)
    first = next(copies)
    assert len(fake.begun) == 2
    assert {copy.user for copy in [first, *copies]} == set("abcde")
    assert fake.options["address"] == "local"
    assert fake.options["num_cpus"] == 2
    assert fake.down == 1


def test_a_cluster_is_used_with_all_of_its_cores(model, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(issuing, "_check_answers", lambda address: None)
    copies = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, *"abcde"), address="head:6379")
    next(copies)
    assert len(fake.begun) == 3
    assert fake.options["address"] == "head:6379"


def test_who_stops_asking_leaves_no_cluster_running(model, tmp_path, fake):
    copies = issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, *"abcde"), workers=2)
    next(copies)
    copies.close()
    assert fake.down == 1


def test_a_workers_error_is_raised_here(model, tmp_path, fake):
    with pytest.raises(ParameterError, match="an existing folder"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path / "no", "ada"), workers=2))
    assert fake.down == 1


def test_a_worker_that_dies_is_a_fault_of_the_service(model, tmp_path, fake):
    fake.dies = True
    with pytest.raises(ServiceError, match="out of memory"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"), workers=2))


def test_ray_that_does_not_start_is_a_fault_of_the_service(model, tmp_path, fake):
    fake.fails = ConnectionError("refused")
    with pytest.raises(ServiceError, match="refused"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"), workers=2))


def test_somebody_elses_ray_is_left_alone(model, tmp_path, fake):
    fake.running = True
    with pytest.raises(ParameterError, match="in use"):
        list(issue_copies(MARK, model, MARK.enroll(model), orders(tmp_path, "ada"), workers=2))
    assert fake.down == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's own processes
def test_ray_makes_the_same_copies_as_this_process(model, tmp_path):
    pytest.importorskip("ray")
    secret = MARK.enroll(model)
    here = {copy.user: copy.digest for copy in issue_copies(MARK, model, secret, orders(tmp_path, *"abcd"))}
    for copy in issue_copies(MARK, model, secret, orders(tmp_path, *"abcd"), workers=2):
        assert copy == Copy(copy.user, copy.target, here.pop(copy.user))
    assert not here


def test_after_a_kill_the_same_command_makes_what_is_missing(tmp_path, rng):
    """kill -9 in the midst of ten copies, then again: all whole, each equal to that of a run without the kill."""
    made = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])
    save_model(made, tmp_path / "plain.safetensors")
    users = [f"user{number}" for number in range(10)]
    (tmp_path / "users.txt").write_text("\n".join(users))
    environment = {**os.environ, "SEALMARK_KEY_FILE": "vault.key", "OMP_NUM_THREADS": "1"}
    line = [
        sys.executable,
        "-c",
        "from sealmark.cli.main import main; main()",
        "issue",
        "plain.safetensors",
        "--users-file",
        "users.txt",
        "--expires",
        "2040-01-01",
        "--out",
    ]

    write_key_file(tmp_path / "vault.key")
    Vault.create(tmp_path / ".sealmark", key_file=tmp_path / "vault.key").close()
    started = subprocess.Popen([*line, "copies"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("copies/*.lic"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    stood = {path: path.stat().st_mtime_ns for path in tmp_path.glob("copies/*.safetensors")}
    assert 3 <= len(stood) < 10
    subprocess.run([*line, "copies"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with Vault.open(tmp_path / ".sealmark", key_file=tmp_path / "vault.key") as vault:
        secret, known = vault.secret("plain"), {record.user: record.copy for record in vault.users("plain")}
        licenses = {record.document for record in vault.license_records()}
    (tmp_path / "others").mkdir()
    others = issue_copies(
        SpreadSpectrum(), tmp_path / "plain.safetensors", secret, orders(tmp_path / "others", *users)
    )
    for copy in others:
        assert (tmp_path / "copies" / copy.target.name).read_bytes() == copy.target.read_bytes()
        assert known.pop(copy.user) == copy.digest
    assert not known
    assert licenses == {sha256_hex(path.read_bytes()) for path in tmp_path.glob("copies/*.lic")}
    assert len(list((tmp_path / "copies").iterdir())) == 20
    kept = [path for path, when in stood.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(stood) - 1  # the last one may have lacked its license
