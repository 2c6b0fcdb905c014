"""The example service, its thieves and its customers, over real sockets."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import torch
import uvicorn

from sealmark.blackbox.answer_key import AnswerKey
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import BlackBox, WhiteBox
from sealmark.core.task import Batch, Recipe, Task
from sealmark.core.training import train_task
from sealmark.ownership.dawn import Dawn
from sealmark.runtime.answer_store import AnswerStore, Cap

ROOT = Path(__file__).parents[2]
SCHEME = Dawn(rate=0.05)
OTHERS = [f"customer {i}" for i in range(19)]


def load_example():
    spec = importlib.util.spec_from_file_location("example_service", ROOT / "examples" / "service.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


service = load_example()


@contextmanager
def running(app):
    """A real server on a port of its own; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def ask(address, client, images, returns="labels"):
    """A client's answers to images: (N,) labels or (N, 10) scores."""
    answers = []
    with httpx.Client(base_url=address, headers={"x-client": client}) as http:
        for part in images.split(50):
            reply = http.post("/predict", params={"returns": returns}, json={"inputs": part.tolist()})
            answers += reply.raise_for_status().json()[returns]
    return torch.tensor(answers)


@pytest.fixture(scope="module")
def secret(plain, digits):
    return SCHEME.keygen(plain, digits, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/answers.db"


@pytest.fixture(scope="module")
def address(plain, secret, url):
    with running(service.guarded(plain, secret, AnswerStore(url))) as where:
        yield where


def loot(digits: Task) -> torch.Tensor:
    """What the thief asks: his own rows, half of the test rows, and his own upside down."""
    mine = digits.attacker.inputs
    return torch.cat([mine, digits.test.inputs[:250], mine.flip(2)])


def surrogate(digits, images, labels):
    recipe = Recipe(epochs=25, batch_size=64, rate=0.05, weight_decay=0.0, clip=1.0)
    rows = Batch(images, labels)
    return train_task(digits, rng=np.random.default_rng(7), rows=rows, recipe=recipe).eval()


@pytest.fixture(scope="module")
def stolen(digits, address):
    return surrogate(digits, loot(digits), ask(address, "thief", loot(digits)))


@pytest.fixture(scope="module")
def answers(stolen, address, digits, secret, url):
    """All that is registered, after 19 customers asked about rows, too."""
    images = torch.cat([digits.test.inputs, digits.owner.inputs])
    for index, name in enumerate(OTHERS):
        ask(address, name, images[index * 20 : index * 20 + 600])

    async def read():
        store = AnswerStore(url)
        found = await store.answers(AnswerKey(secret).mark)
        await store.close()
        return found

    return asyncio.run(read())


def of(answers, client):
    return [answer for answer in answers if answer.client == client]


def test_a_stolen_model_is_verified_by_labels_alone(stolen, answers, secret, digits):
    theirs = of(answers, "thief")
    assert 0.03 < len(theirs) / len(loot(digits)) < 0.07
    suspect = BlackBox(lambda images: stolen(images).argmax(1))
    evidence = SCHEME.verify(suspect, SCHEME.register(secret, theirs))
    assert evidence.verdict is Verdict.MATCH
    assert evidence.log10_p < -19.3  # 2^-64, as the paper asks
    assert evidence.details["trigger_accuracy"] >= 0.6
    assert digits.score(stolen) >= 0.9


def test_the_thief_is_named_among_twenty_clients(stolen, answers, secret):
    accusation = SCHEME.name_client(WhiteBox(stolen), secret, answers)
    assert accusation.users == 20
    assert [entry.user for entry in accusation.accused] == ["thief"]
    assert all(entry.p_value > 0.5 for entry in accusation.ranking[1:])


def test_a_model_that_was_stolen_from_a_bare_service_accuses_nobody(plain, digits, answers, secret):
    with running(service.bare(plain)) as where:
        clean = surrogate(digits, loot(digits), ask(where, "thief", loot(digits)))
    accusation = SCHEME.name_client(WhiteBox(clean), secret, answers)
    assert not accusation.accused
    assert max(entry.statistic for entry in accusation.ranking) < 0.3


def test_the_owner_himself_and_another_key_do_not_match(plain, stolen, answers, secret, digits):
    registered = SCHEME.register(secret, of(answers, "thief"))
    assert SCHEME.verify(WhiteBox(plain), registered).verdict is Verdict.NO_MATCH
    other = SCHEME.keygen(plain, digits, rng=np.random.default_rng(2))
    theirs = other.with_learned({name: registered.tensors[name] for name in registered.facts["learned"]})
    evidence = SCHEME.verify(WhiteBox(stolen), theirs)
    assert evidence.verdict is Verdict.NO_MATCH
    assert evidence.details["trigger_accuracy"] < 0.3


def test_an_honest_client_loses_little(plain, digits, address):
    rows = digits.test
    served = (ask(address, "honest", rows.inputs) == rows.targets).double().mean().item()
    assert 0 < digits.score(plain) - served <= SCHEME.rate + 0.04


def test_who_is_exempt_gets_the_models_own_answers(plain, digits, address):
    images = digits.test.inputs
    with torch.no_grad():
        assert torch.equal(ask(address, "hospital", images), plain(images).argmax(1))


def test_labels_probabilities_and_logits_agree_and_one_client_is_not_another(digits, address, plain):
    images = digits.test.inputs[:300]
    labels = ask(address, "thief", images)
    for returns in ("probabilities", "logits"):
        assert torch.equal(ask(address, "thief", images, returns).argmax(1), labels)
    assert not torch.equal(ask(address, "customer 1", images), labels)
    with torch.no_grad():
        natural = plain(images).softmax(1)
    served = ask(address, "thief", images, "probabilities")
    assert torch.allclose(served.sort(1).values, natural.sort(1).values, atol=1e-6)  # a permutation
    assert not torch.allclose(served, natural, atol=1e-3)


def test_two_workers_and_a_restart_answer_alike(plain, digits, secret, url, address):
    images = digits.test.inputs
    first = ask(address, "thief", images)
    for _ in range(2):  # each with a store, a key and an event loop of its own
        with running(service.guarded(plain, secret, AnswerStore(url))) as second:
            assert torch.equal(ask(second, "thief", images), first)


def test_a_cap_bounds_wrong_answers_and_spares_the_rest_for_good(plain, digits, secret, tmp_path):
    images, natural = digits.test.inputs, None
    with torch.no_grad():
        natural = plain(images).argmax(1)
    store = f"sqlite:///{tmp_path}/capped.db"
    with running(service.guarded(plain, secret, AnswerStore(store, cap=Cap(5)))) as where:
        first = ask(where, "busy", images)
        assert int((first != natural).sum()) == 5
    with running(service.guarded(plain, secret, AnswerStore(store, cap=Cap(500)))) as where:
        assert torch.equal(ask(where, "busy", images), first)  # also when the cap was raised


def test_bad_requests_are_answered_as_by_the_bare_service(plain, address):
    bodies = [b"{}", b"nonsense", b'{"inputs": []}', b'{"inputs": [[1, 2]]}', b'{"inputs": "x"}']
    with running(service.bare(plain)) as where:
        for body in bodies:
            replies = [
                httpx.post(f"{place}/predict", content=body, headers={"content-type": "application/json"})
                for place in (where, address)
            ]
            assert replies[0].status_code == replies[1].status_code == 422
            assert replies[0].content == replies[1].content
        assert httpx.get(f"{where}/openapi.json").content == httpx.get(f"{address}/openapi.json").content


def test_the_secret_is_kept_between_starts(plain, digits, tmp_path):
    first = service.kept_secret(tmp_path / "secret", plain, digits, 0.005)
    assert service.kept_secret(tmp_path / "secret", plain, digits, 0.005) == first
