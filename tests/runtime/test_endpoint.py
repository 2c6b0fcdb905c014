from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import sys
import threading

import numpy as np
import pytest
import torch

from sealmark.core import registry
from sealmark.core.errors import (
    AccessError,
    BudgetError,
    FormatError,
    ParameterError,
    ServiceError,
    UnknownNameError,
    UnsupportedError,
)
from sealmark.core.evidence import Verdict
from sealmark.core.suspect import Access
from sealmark.runtime import endpoint
from sealmark.runtime.answers import Adapter, load_adapter, nested
from sealmark.runtime.endpoint import LONGEST_WAIT, Endpoint

ROWS = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 10
LOGITS = torch.tensor([[0.5, 2.0, -1.0], [3.0, 0.1, 0.2], [0.0, 0.0, 1.0], [0.0, 4.0, 1.0]])


class FakeClock:
    """Time that passes only by sleeping, and by ``tick`` at each look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick, self.slept = 1000.0, tick, []

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def one_by_one(document):
    """The label of each row is ten times its first number."""
    return {"labels": [round(10 * row[0]) for row in document["inputs"]]}


def failing(times, reply):
    """Fails so many times with ``reply``, then answers."""
    left = [times]

    def answer(document):
        left[0] -= 1
        return one_by_one(document) if left[0] < 0 else reply

    return answer


def ask(url, **options) -> Endpoint:
    return Endpoint(url, **{"returns": "label", "retries": 0, "clock": FakeClock()} | options)


def refused(live, answer, error, said, rows=ROWS, **options):
    """The service, after asking it ended in that error."""
    with live.serving(answer) as service, ask(service.url, **options) as suspect:  # noqa: SIM117
        with pytest.raises(error, match=said):
            suspect.labels(rows)
    return service


# what it answers


@pytest.mark.parametrize("kind", ["label", "probabilities", "logits"])
def test_a_suspect_behind_a_url_answers_as_the_model_does(live, plain, digits, kind):
    rows = digits.test.inputs[:40]
    key = {"label": "labels"}.get(kind, kind)
    with live.serving(live.predicting(plain, key)) as service, ask(service.url, returns=kind) as suspect:
        logits = plain(rows).detach()
        if kind == "label":
            assert torch.equal(suspect.labels(rows), logits.argmax(-1))
            assert suspect.access == Access.LABELS
        elif kind == "probabilities":
            torch.testing.assert_close(suspect.probabilities(rows), logits.softmax(-1))
            assert Access.LOGITS not in suspect.access
        else:
            torch.testing.assert_close(suspect.logits(rows), logits)


@pytest.mark.parametrize("kind", ["label", "probabilities", "logits"])
def test_one_probing_query_finds_out_what_it_returns(live, plain, digits, kind):
    key = {"label": "labels"}.get(kind, kind)
    with (
        live.serving(live.predicting(plain, key)) as service,
        ask(service.url, returns=None, probe=digits.test.inputs[:1]) as suspect,
    ):
        assert suspect.returns == kind
        assert (suspect.queries, service.rows) == (1, 1)
        assert suspect.log_digest == hashlib.sha256().hexdigest()  # no evidence


def test_of_several_answers_the_richest_is_taken(live):
    both = {"labels": [1], "logits": [[0.0, 1.0]], "model": "v2"}
    with live.serving(lambda _: both) as service:
        with ask(service.url, returns=None, probe=ROWS[:1]) as suspect:
            assert suspect.returns == "logits"
        with ask(service.url, returns="label") as suspect:
            assert suspect.labels(ROWS[:1]).tolist() == [1]


def test_inputs_arrive_to_the_last_bit(live):
    rows = torch.tensor([[0.1, 1 / 3, 1e-45, 3.4e38, -0.0, 16777217.0]])
    with live.serving(lambda _: {"labels": [0]}) as service, ask(service.url) as suspect:
        suspect.labels(rows)
    (sent,) = service.requests[0]["document"]["inputs"]
    assert np.array(sent, np.float32).tobytes() == rows.numpy().tobytes()
    assert b"[0.1,0.33333334," in service.requests[0]["body"]


def test_words_and_doubles_are_sent_as_they_are():
    assert nested(torch.tensor([[2, 5]])) == [[2, 5]]
    assert nested(torch.tensor([1 / 3], dtype=torch.float64)) == [1 / 3]


def test_rows_go_out_in_batches_and_stay_in_order(live):
    with live.serving(one_by_one) as service, ask(service.url, batch=3) as suspect:
        assert suspect.labels(ROWS).tolist() == [0, 3, 6, 9]
    assert [len(request["document"]["inputs"]) for request in service.requests] == [3, 1]


# a verdict through HTTP


@pytest.fixture(scope="module")
def owned(digits):
    """A scheme, its secret, and a digits model that carries its triggers."""
    scheme, rng = registry.scheme("adi"), np.random.default_rng(7)
    secret = scheme.keygen(digits.model(rng), digits, rng=rng)
    return scheme, secret, scheme.embed(digits.model(rng), secret, digits, rng=rng).model.eval()


@pytest.mark.parametrize(("sequential", "most"), [(False, 30), (True, 12)])
def test_a_stolen_model_is_recognized_by_its_labels(live, owned, sequential, most):
    scheme, secret, model = owned
    with live.serving(live.predicting(model)) as service, ask(service.url, classes=10, budget=30) as suspect:
        found = scheme.verify(suspect, secret, sequential=sequential)
    assert found.verdict is Verdict.MATCH
    assert found.queries == suspect.queries == service.rows <= most


@pytest.mark.parametrize("sequential", [False, True])
def test_an_innocent_model_is_not(live, owned, plain, sequential):
    scheme, secret, _ = owned
    with live.serving(live.predicting(plain, "logits")) as service, ask(service.url, returns="logits") as suspect:
        assert scheme.verify(suspect, secret, sequential=sequential).verdict is Verdict.NO_MATCH


# cost


def test_the_budget_holds_for_what_the_server_sees(live):
    with live.serving(one_by_one) as service, ask(service.url, budget=3) as suspect:
        suspect.labels(ROWS[:2])
        with pytest.raises(BudgetError, match="2 queries were spent and there is no verdict"):
            suspect.labels(ROWS[:2])
        suspect.labels(ROWS[:1])
    assert service.rows == 3


def test_rows_of_a_failed_request_count(live):
    busy = live.Reply(status=503)
    with live.serving(failing(1, busy)) as service, ask(service.url, retries=1, budget=8) as suspect:
        suspect.labels(ROWS)
        assert suspect.queries == service.rows == 8


def test_a_budget_that_leaves_no_retry_ends_the_asking(live):
    answer, said = failing(1, live.Reply(status=503)), r"leaves no retry.* 4 queries were spent"
    assert refused(live, answer, ServiceError, said, retries=5, budget=7).rows == 4


def test_nothing_is_spent_where_nobody_listens():
    with (
        ask("http://127.0.0.1:1/predict", retries=2, budget=4) as suspect,
        pytest.raises(ServiceError, match=r"no connection .* 3 times.* 0 queries were spent"),
    ):
        suspect.labels(ROWS)


def test_requests_keep_their_distance(live):
    clock = FakeClock()
    with live.serving(one_by_one) as service, ask(service.url, batch=1, rate=4, clock=clock) as suspect:
        suspect.labels(ROWS)
    assert clock.slept == [0.25, 0.25, 0.25]


def test_without_a_rate_nobody_waits(live):
    clock = FakeClock()
    with live.serving(one_by_one) as service, ask(service.url, batch=1, clock=clock) as suspect:
        suspect.labels(ROWS)
    assert clock.slept == []


# failures that pass


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_service_that_fails_twice_is_asked_a_third_time(live, status):
    clock = FakeClock()
    answer = failing(2, live.Reply(status=status))
    with live.serving(answer) as service, ask(service.url, retries=2, clock=clock) as suspect:
        assert suspect.labels(ROWS).tolist() == [0, 3, 6, 9]
    assert len(service.requests) == 3
    assert 0.25 <= clock.slept[0] <= 0.5 <= clock.slept[1] <= 1.0


def test_waits_double_and_their_jitter_comes_from_the_generator(live):
    def waits(seed):
        clock = FakeClock()
        with (
            live.serving(lambda _: live.Reply(status=503)) as service,
            ask(service.url, retries=10, clock=clock, rng=np.random.default_rng(seed)) as suspect,
            pytest.raises(ServiceError, match="HTTP 503, 11 times"),
        ):
            suspect.labels(ROWS)
        return clock.slept

    first = waits(0)
    assert first == waits(0)
    assert first != waits(1)
    for attempt, wait in enumerate(first):
        longest = min(LONGEST_WAIT, 0.5 * 2**attempt)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 01 Jan 2031 00:00:09 GMT", "Date": "Wed, 01 Jan 2031 00:00:00 GMT"}, 9),
        ({"Retry-After": "Wed, 01 Jan 2031 00:00:00 GMT", "Date": "Wed, 01 Jan 2031 00:00:09 GMT"}, 0),
    ],
)
def test_the_service_says_how_long_to_wait(live, headers, wait):
    clock = FakeClock()
    answer = failing(1, live.Reply(status=429, headers=headers))
    with live.serving(answer) as service, ask(service.url, retries=1, clock=clock) as suspect:
        suspect.labels(ROWS)
    assert clock.slept == [wait]


def test_a_wait_that_means_nothing_is_not_obeyed(live):
    clock = FakeClock()
    answer = failing(1, live.Reply(status=429, headers={"Retry-After": "soon"}))
    with live.serving(answer) as service, ask(service.url, retries=1, clock=clock) as suspect:
        suspect.labels(ROWS)
    assert 0.25 <= clock.slept[0] <= 0.5


def test_who_asks_for_an_hour_is_told_to_the_user_at_once(live):
    clock = FakeClock()
    answer = failing(1, live.Reply(status=429, headers={"Retry-After": "3600"}))
    refused(live, answer, ServiceError, "wait 3600 s", retries=4, clock=clock)
    assert clock.slept == []


def test_silence_ends_in_a_service_error(live):
    heard = threading.Event()
    with live.serving(lambda _: heard.wait(30)) as service, ask(service.url, timeout=0.1, retries=1) as suspect:
        with pytest.raises(ServiceError, match=r"ReadTimeout, 2 times.* 8 queries were spent"):
            suspect.labels(ROWS)
        heard.set()


def test_an_answer_that_never_ends_is_given_up(live):
    refused(live, one_by_one, ServiceError, "no end of the answer in time", timeout=5, clock=FakeClock(tick=6))


def test_a_connection_that_breaks_is_a_service_error(live):
    def hang_up(_):
        raise ConnectionResetError

    refused(live, hang_up, ServiceError, r"RemoteProtocolError|ReadError")


# failures that do not


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (400, ParameterError, "does not take this request"),
        (401, AccessError, "refuses us"),
        (403, AccessError, "refuses us"),
        (404, ParameterError, "check the URL"),
        (413, ParameterError, "batch size"),
        (422, ParameterError, "shape of its inputs"),
        (500, ServiceError, "fails"),
        (302, ParameterError, "redirects"),
        (307, ParameterError, "redirects"),
    ],
)
def test_other_statuses_say_who_must_act_and_are_not_tried_again(live, status, error, said):
    with live.serving(one_by_one) as elsewhere:
        reply = live.Reply(status=status, headers={"Location": elsewhere.url})
        service = refused(live, lambda _: reply, error, f"(?=.*HTTP {status})(?i:.*{said})", retries=3)
    assert (len(service.requests), elsewhere.rows) == (1, 0)


NONSENSE = {
    "no JSON": (b"surely", "not strict JSON"),
    "an HTML page": (b"<html>Sign in</html>", "not strict JSON"),
    "nothing": (b"", "not strict JSON"),
    "NaN": (b'{"labels": [NaN, 1, 2, 3]}', "not strict JSON"),
    "a name twice": (b'{"labels": [1, 1, 1, 1], "labels": [2, 2, 2, 2]}', "a name stands twice"),
    "a list": (b"[1, 2, 3, 4]", "does not have its shape"),
    "another key": (b'{"classes": [1, 2, 3, 4]}', "expected labels, found none of these"),
    "another kind": (b'{"logits": [[1, 2], [1, 2], [1, 2], [1, 2]]}', "expected labels, found logits"),
    "words": (b'{"labels": ["cat", "dog", "cat", "dog"]}', "not numbers"),
    "null": (b'{"labels": null}', "not numbers"),
    "yes and no": (b'{"labels": [true, false, true, false]}', "not numbers"),
    "too few rows": (b'{"labels": [1, 2, 3]}', "expected 4 rows, found 3"),
    "one number": (b'{"labels": 1}', "wrong shape"),
    "a table of labels": (b'{"labels": [[1], [2], [3], [4]]}', "wrong shape"),
    "a label beyond": (b'{"labels": [1, 2, 3, 10]}', "whole numbers from 0 to 9, found 10"),
    "a label below": (b'{"labels": [1, 2, 3, -1]}', "found -1"),
    "half a label": (b'{"labels": [1, 2, 3, 0.5]}', "found 0.5"),
    "a huge label": (b'{"labels": [1, 2, 3, 1%s]}' % (b"0" * 40), "not numbers|not finite"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(live, name):
    body, said = NONSENSE[name]
    said = rf"({said}).*4 queries were spent and there is no verdict"
    service = refused(live, lambda _: live.Reply(body), FormatError, said, classes=10, retries=3)
    assert len(service.requests) == 1


BAD_TABLES = {
    "ragged": ("logits", [[0.0, 1.0], [0.0]], "not numbers"),
    "one class": ("logits", [[1.0], [1.0]], "wrong number of classes"),
    "other classes": ("logits", [[0.0, 1.0, 2.0]] * 2, "expected 4, found 3"),
    "beyond float32": ("logits", [[0.0, 1.0, 2.0, 1e39]] * 2, "not finite"),
    "labels": ("logits", [1.0, 2.0], "wrong shape"),
    "sums to 2": ("probabilities", [[0.5, 0.5, 0.5, 0.5]] * 2, "a sum of 2"),
    "negative": ("probabilities", [[-0.5, 0.5, 0.5, 0.5]] * 2, "least -0.5"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_is_refused(live, name):
    kind, table, said = BAD_TABLES[name]
    refused(live, lambda _: {kind: table}, FormatError, said, ROWS[:2], returns=kind, classes=4)


def test_rounded_probabilities_are_probabilities(live):
    rounded = {"probabilities": [[0.33, 0.33, 0.33]]}
    with live.serving(lambda _: rounded) as service, ask(service.url, returns="probabilities") as suspect:
        assert suspect.probabilities(ROWS[:1]).shape == (1, 3)


def test_a_number_of_classes_that_changes_is_refused(live):
    tables = iter([[[0.0, 1.0]], [[0.0, 1.0, 2.0]]])
    with live.serving(lambda _: {"logits": next(tables)}) as service, ask(service.url, returns="logits") as suspect:
        suspect.labels(ROWS[:1])
        with pytest.raises(FormatError, match="expected 2, found 3"):
            suspect.labels(ROWS[:1])


def test_a_kind_of_answer_that_changes_is_refused(live):
    answers = iter([{"logits": [[0.0, 1.0]]}, {"labels": [1]}])
    with (
        live.serving(lambda _: next(answers)) as service,
        ask(service.url, returns=None, probe=ROWS[:1]) as suspect,
        pytest.raises(FormatError, match="expected logits, found label"),
    ):
        suspect.labels(ROWS[:1])


def test_an_oversized_answer_is_not_read_to_its_end(live, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST_ANSWER", 1000)
    refused(live, lambda _: live.Reply(b" " * 10_000_000), FormatError, "too large")


def test_a_compressed_answer_is_refused_unopened(live):
    bomb = live.Reply(gzip.compress(bytes(10**6)), headers={"Content-Encoding": "gzip"})
    refused(live, lambda _: bomb, FormatError, "compressed")


def test_a_probe_that_fails_says_so(live):
    said = r"logits or probabilities or labels.* 1 queries were spent"
    with live.serving(lambda _: {"error": "no"}) as service, pytest.raises(FormatError, match=said):
        ask(service.url, returns=None, probe=ROWS)


def test_an_unreadable_address_is_a_wrong_call():
    for url in ("", "ftp://host/x", "http://", "host/path", "http://host:port/", "file:///etc/passwd"):
        with pytest.raises(ParameterError, match="bad URL"):
            ask(url)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"timeout": 0},
        {"timeout": math.nan},
        {"retries": -1},
        {"rate": 0},
        {"budget": 0},
        {"returns": "words"},
        {"returns": None},
    ],
    ids=str,
)
def test_a_way_of_asking_that_means_nothing_is_a_wrong_call(options):
    with pytest.raises(ParameterError):
        ask("http://127.0.0.1:1/", **options)


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(UnsupportedError, match=r"sealmark\[endpoint\]"):
        ask("http://127.0.0.1:1/")


# secrets


def test_credentials_are_sent_and_shown_nowhere(live, caplog):
    caplog.set_level(logging.DEBUG)
    with live.serving(failing(1, live.Reply(status=500))) as service:
        url = service.url.replace("http://", "http://bob:hunter2@") + "?key=swordfish#top"
        with ask(url, headers={"X-Key": "sesame"}) as suspect:
            with pytest.raises(ServiceError) as caught:
                suspect.labels(ROWS)
            assert suspect.address == service.url
            shown = f"{suspect!r} {caught.value!r} {caught.value.__cause__!r}"
    request = service.requests[0]
    assert request["path"] == "/predict?key=swordfish"
    assert request["headers"]["Authorization"] == "Basic Ym9iOmh1bnRlcjI="
    assert request["headers"]["X-Key"] == "sesame"
    for secret in ("hunter2", "Ym9iOmh1bnRlcjI", "sesame", "swordfish"):
        assert secret not in shown
        assert secret == "swordfish" or secret not in caplog.text  # the client's own log has the query


@pytest.mark.parametrize(
    ("url", "headers"),
    [("http://bob:hunter2@example.org/", {}), ("http://example.org/", {"authorization": "Bearer hunter2"})],
)
def test_a_token_does_not_go_out_in_the_clear(url, headers):
    with pytest.raises(ParameterError, match="in the clear") as caught:
        ask(url, headers=headers)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("headers", [{"X-Key": "sesame\n"}, {"X Key": "sesame"}, {"X-Key": "sesame\u2028"}])
def test_a_header_that_cannot_be_sent_is_a_wrong_call_and_not_shown(live, headers):
    with pytest.raises(ParameterError, match="bad header") as caught:
        ask("http://127.0.0.1:1/", headers=headers)
    assert "sesame" not in str(caught.value)
    spoken = Adapter(lambda rows: (nested(rows), headers), lambda answer: answer)
    with ask("http://127.0.0.1:1/", adapter=spoken) as suspect, pytest.raises(ParameterError, match="bad header"):
        suspect.labels(ROWS)


# the log


def test_the_log_holds_every_row_and_its_answer_and_the_digest_is_its_own(live):
    log = io.BytesIO()
    with live.serving(one_by_one) as service, ask(service.url, log=log, batch=3) as suspect:
        suspect.labels(ROWS)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert lines == [
        {"input": nested(row[None])[0], "answer": n} for row, n in zip(ROWS, (0, 3, 6, 9), strict=True)
    ]
    assert hashlib.sha256(log.getvalue()).hexdigest() == suspect.log_digest


def test_the_digest_does_not_depend_on_batches_but_on_answers(live):
    def digest(answer, batch):
        with live.serving(answer) as service, ask(service.url, returns="logits", batch=batch) as suspect:
            suspect.labels(ROWS)
        return suspect.log_digest

    def good(document):
        return {"logits": [LOGITS[round(10 * row[0]) // 3].tolist() for row in document["inputs"]]}

    def other(document):
        return {"logits": [row[::-1] for row in good(document)["logits"]]}

    assert digest(good, 1) == digest(good, 4) != digest(other, 4)


# adapters


def test_an_adapter_speaks_another_shape(live):
    spoken = Adapter(
        lambda rows: ({"pixels": nested(rows)}, {"X-Version": "3"}), lambda answer: [x["id"] for x in answer]
    )
    found = [{"id": 5}] * 4
    with live.serving(lambda _: found) as service, ask(service.url, adapter=spoken) as suspect:
        assert suspect.labels(ROWS).tolist() == [5, 5, 5, 5]
    assert service.requests[0]["headers"]["X-Version"] == "3"
    assert service.requests[0]["body"].startswith(b'{"pixels":[[')


def test_an_adapter_may_send_bytes(live):
    spoken = Adapter(
        lambda rows: (rows.numpy().tobytes(), {"Content-Type": "application/octet-stream"}), lambda answer: answer
    )
    with live.serving(lambda _: [1, 2, 3, 4]) as service, ask(service.url, adapter=spoken) as suspect:
        assert suspect.labels(ROWS).tolist() == [1, 2, 3, 4]
    assert service.requests[0]["body"] == ROWS.numpy().tobytes()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [([2], "label"), ([[0.25, 0.75]], "probabilities"), ([[0.25, 7.5]], "logits"), ([[0.6, 0.6]], "logits")],
)
def test_what_an_adapter_makes_is_told_by_its_looks(live, answer, kind):
    spoken = Adapter(lambda rows: (nested(rows), {}), lambda answer: answer["y"])
    with (
        live.serving(lambda _: {"y": answer}) as service,
        ask(service.url, returns=None, probe=ROWS, adapter=spoken) as suspect,
    ):
        assert suspect.returns == kind


def test_an_adapter_that_meets_something_else_is_a_format_error(live):
    spoken = Adapter(lambda rows: (nested(rows), {}), lambda answer: answer["result"]["labels"])
    refused(live, lambda _: {"result": []}, FormatError, "does not have its shape", adapter=spoken)


def test_an_adapter_is_loaded_from_a_module(monkeypatch, tmp_path):
    (tmp_path / "spoken_here.py").write_text(
        "from sealmark.runtime.answers import Adapter\n"
        "def ours(): return Adapter(lambda rows: (rows.tolist(), {}), lambda answer: answer)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_adapter("spoken_here:ours").encode(torch.ones(1)) == ([1.0], {})
    with pytest.raises(ParameterError, match="gives no adapter"):
        load_adapter("builtins:dict")
    with pytest.raises(ParameterError, match=r"package\.module:factory"):
        load_adapter("spoken_here")
    with pytest.raises(UnknownNameError):
        load_adapter("spoken_here:theirs")
