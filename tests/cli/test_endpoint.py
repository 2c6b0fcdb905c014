from __future__ import annotations

import hashlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sealmark.core.weights import save_model
from sealmark.crypto.signing import VerifyKey
from sealmark.formats.evidence import read_evidence
from sealmark.runtime.models import load_weights
from sealmark.vault import Vault

ROOT = Path(__file__).parents[2]
TOKEN = "SEALMARK_ENDPOINT_TOKEN"


@pytest.fixture(scope="session")
def live() -> SimpleNamespace:
    """What `tests/live_service.py` defines."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests/live_service.py")))


@pytest.fixture(scope="module")
def marked(furnished, digits):
    """The desk's model, with its triggers."""
    model = digits.make()
    load_weights(model, furnished / "marked.safetensors")
    return model.eval()


@pytest.fixture
def stolen(live, marked):
    """A service that answers with the marked model's labels."""
    with live.serving(live.predicting(marked)) as service:
        yield service


def kept() -> int:
    with Vault.open(".sealmark", key_file="vault.key") as vault:
        return len(vault.evidence())


def test_a_stolen_model_behind_a_url_is_a_match_and_queries_are_saved(sealmark, desk, stolen):
    line = f"verify --endpoint {stolen.url} --budget 30 --secret triggers"
    found = json.loads(sealmark(f"{line} --json").stdout)
    assert (found["verdict"], found["details"]["stopped"]) == ("MATCH", "the verdict is sure")
    assert found["queries"] + found["details"]["queries_saved"] == 30
    assert stolen.rows == found["queries"] + 1 == found["details"]["endpoint"]["sent"]  # and the probe
    assert found["queries"] < 15
    assert re.search(r"queries +\d+, \d+ saved", sealmark(line).stdout)


@pytest.mark.parametrize("kind", ["labels", "probabilities", "logits"])
def test_an_innocent_model_behind_a_url_exits_with_1(sealmark, desk, live, plain, kind):
    with live.serving(live.predicting(plain, kind)) as service:
        told = sealmark(f"verify --endpoint {service.url} --secret triggers", code=1).stdout
    assert "NO_MATCH" in told
    assert f"returns {kind.replace('labels', 'label')}, sent" in told


def test_everything_is_asked_at_once_on_demand(sealmark, desk, stolen):
    line = f"verify --endpoint {stolen.url} --secret triggers --all-at-once --returns label --batch 20 --json"
    found = json.loads(sealmark(line).stdout)
    assert (found["queries"], stolen.rows, len(stolen.requests)) == (30, 30, 2)
    assert found["log10_p"] == pytest.approx(-30)


def test_a_file_may_be_asked_in_turn_too(sealmark, desk):
    line = "verify marked.safetensors --secret triggers --task digits --json"
    assert json.loads(sealmark(line).stdout)["queries"] == 30
    assert json.loads(sealmark(f"{line} --sequential").stdout)["queries"] < 15


def test_a_budget_ends_asking_in_turn_without_a_match(sealmark, desk, stolen):
    line = f"verify --endpoint {stolen.url} --budget 4 --secret triggers --returns label --json"
    told = sealmark(line, code=1)
    found = json.loads(told.stdout)
    assert (found["verdict"], found["queries"], stolen.rows) == ("INCONCLUSIVE", 4, 4)
    assert "more: queries" in told.stderr


def test_a_budget_too_small_for_everything_asks_for_nothing(sealmark, desk, stolen):
    line = f"verify --endpoint {stolen.url} --budget 29 --secret triggers --returns label --all-at-once"
    assert "0 queries were spent and there is no verdict" in sealmark(line, code=2).stderr
    assert stolen.rows == 0


def test_evidence_names_the_url_and_holds_the_digest_of_the_log(sealmark, desk, stolen):
    url = stolen.url.replace("http://", "http://bob:hunter2@") + "?key=swordfish"
    sealmark(f"verify --endpoint {url} --secret triggers --log log.jsonl --evidence-out e.json")
    key = VerifyKey.parse(json.loads(sealmark("vault list --json").stdout)["public"]["verify"])
    signed = read_evidence(Path("e.json").read_bytes(), [key])
    assert (signed.suspect.digest, signed.suspect.description) == ("", stolen.url)
    log = Path("log.jsonl")
    assert signed.evidence.details["endpoint"]["log"] == hashlib.sha256(log.read_bytes()).hexdigest()
    assert len(log.read_bytes().splitlines()) == signed.evidence.queries
    assert log.stat().st_mode & 0o777 == 0o600
    assert b"hunter2" not in Path("e.json").read_bytes() + log.read_bytes()


def test_the_token_comes_from_the_environment_and_is_not_shown(sealmark, desk, stolen):
    told = sealmark(f"verify --endpoint {stolen.url} --secret triggers", **{TOKEN: "sesame\n"})
    assert {request["headers"]["Authorization"] for request in stolen.requests} == {"Bearer sesame"}
    assert "sesame" not in told.output


def test_a_token_that_cannot_be_sent_is_a_wrong_call_and_not_shown(sealmark, desk, stolen):
    error = sealmark(f"verify --endpoint {stolen.url} --secret triggers", code=2, **{TOKEN: "ses\name"}).stderr
    assert TOKEN in error
    assert "ses" not in error.replace(TOKEN, "").replace("sealmark", "")
    assert stolen.rows == 0


def test_an_adapter_of_ones_own(sealmark, desk, live, marked):
    Path("spoken.py").write_text(
        "from sealmark.runtime.answers import Adapter, nested\n"
        "def ours():\n"
        "    return Adapter(lambda rows: ({'inputs': nested(rows), 'v': 3}, {}), lambda found: found['y'])\n"
    )

    def answer(document):
        return {"y": live.predicting(marked)(document)["labels"]} if document["v"] == 3 else {}

    with live.serving(answer) as service:
        sealmark(f"verify --endpoint {service.url} --adapter spoken:ours --secret triggers")


def test_a_judges_own_models_give_the_law(sealmark, desk, stolen, digits):
    for number in range(2):
        save_model(digits.model(np.random.default_rng(number)), f"{number}.safetensors")
    line = f"verify --endpoint {stolen.url} --secret triggers --reference 0.safetensors --reference 1.safetensors"
    found = json.loads(sealmark(f"{line} --task digits --json", code=1).stdout)
    assert (found["verdict"], found["basis"], found["queries"]) == ("INCONCLUSIVE", "population", 30)
    assert "--task NAME or --model" in sealmark(line, code=2).stderr


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        ({"status": 503}, 4, "SERVICE"),
        ({"status": 500}, 4, "SERVICE"),
        ({"body": b"<html></html>"}, 3, "BAD_FORMAT"),
        ({"body": b'{"labels": [99]}'}, 3, "from 0 to 9"),
        ({"body": b'{"labels": [1, 1]}'}, 3, "expected 1 rows, found 2"),
        ({"status": 401}, 2, "ACCESS"),
        ({"status": 404}, 2, "BAD_PARAMETER"),
        ({"status": 308, "headers": {"Location": "http://127.0.0.1:1/"}}, 2, "not followed"),
    ],
    ids=str,
)
def test_no_sound_answer_no_verdict(sealmark, desk, live, contents, monkeypatch, reply, code, said):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    before, known = contents(), kept()
    line = "--secret triggers --retries 1 --evidence-out e.json --log log.jsonl"
    with live.serving(lambda _: live.Reply(**reply)) as service:
        result = sealmark(f"verify --endpoint {service.url} {line}", code=code)
    assert said in result.stderr
    assert f"{len(service.requests)} queries were spent and there is no verdict" in result.stderr
    assert (result.stdout, contents(), kept()) == ("", before, known)


def test_a_service_that_turns_to_nonsense_midway_gives_no_verdict(sealmark, desk, live, marked, contents):
    good, before, known = live.predicting(marked), contents(), kept()
    with live.serving(lambda document: good(document) if service.rows < 5 else {}) as service:
        error = sealmark(
            f"verify --endpoint {service.url} --secret triggers --log l --evidence-out e", code=3
        ).stderr
    assert "5 queries were spent and there is no verdict" in error
    assert (contents(), kept()) == (before, known)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--secret triggers", "a file or --endpoint URL"),
        ("marked.safetensors --endpoint URL --secret triggers", "one of the two"),
        ("marked.safetensors --budget 3 --secret triggers", "no URL to ask"),
        ("--endpoint URL --secret mine", "uchida needs more than answers"),
        ("--endpoint URL --secret triggers --original plain.safetensors --task digits", "no --endpoint"),
        ("--endpoint URL --secret triggers --returns words", "bad answer type"),
        ("--endpoint URL --secret triggers --adapter nowhere:ours", "no module nowhere"),
        ("--endpoint URL --secret triggers --log vault.key", "--force"),
        ("--endpoint URL --secret triggers --rate 0", "rate > 0"),
        ("--endpoint ftp://x/ --secret triggers", "bad URL"),
        ("marked.safetensors --secret mine --sequential", "cannot ask in turn"),
        (
            "marked.safetensors --secret mine --original plain.safetensors --reference plain.safetensors",
            "--original",
        ),
    ],
)
def test_a_wrong_call_asks_nothing_and_writes_nothing(sealmark, desk, contents, stolen, line, said):
    before = contents()
    assert said in sealmark(f"verify {line.replace('URL', stolen.url)}", code=2).stderr
    assert (contents(), stolen.rows) == (before, 0)


def test_a_secret_without_a_form_of_inputs_asks_what_the_endpoint_returns(sealmark, desk, stolen, monkeypatch):
    monkeypatch.setattr("sealmark.core.secret.Secret.host", {"classes": 10})
    error = sealmark(f"verify --endpoint {stolen.url} --secret triggers", code=2).stderr
    assert "what does the endpoint return?" in error


def test_the_probe_is_an_ordinary_row_where_the_task_is_known(sealmark, desk, stolen, digits):
    sealmark(f"verify --endpoint {stolen.url} --secret triggers --task digits")
    sealmark(f"verify --endpoint {stolen.url} --secret triggers")
    first = [request["document"]["inputs"] for request in stolen.requests if request["document"]["inputs"]]
    assert first[0] == digits.test.inputs[:1].tolist()
    assert np.zeros((1, 1, 8, 8)).tolist() in first


def document(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/endpoint.md").read_text("utf-8"), re.DOTALL)
    return block


def test_the_command_in_the_document_runs(sealmark, desk, stolen):
    words = shlex.split(document("sh").replace("https://models.example/predict", stolen.url))
    assert words[0] == "sealmark"
    assert "MATCH" in sealmark(shlex.join([*words[1:], "--rate", "1000"])).stdout


def test_python_in_the_document_runs():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", document("python")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[0, 1, 2] 3\n", done.stderr
