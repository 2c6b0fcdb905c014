"""A prediction service on this machine, for tests of what talks HTTP; load it with `runpy`."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Reply:
    """What the service sends back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[dict[str, Any]], Any]


class Service:
    """Answers by a function from the parsed request to a document or a `Reply`; keeps what it was sent."""

    def __init__(self, answer: Answer, url: str) -> None:
        self.answer, self.url = answer, url
        self.requests: list[dict[str, Any]] = []

    @property
    def rows(self) -> int:
        """How many inputs it was sent, whatever it answered."""
        return sum(len(request["document"].get("inputs", [])) for request in self.requests)

    def reply(self, handler: BaseHTTPRequestHandler) -> Reply:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        document = json.loads(body) if handler.headers["content-type"] == "application/json" else {}
        self.requests.append(
            {"path": handler.path, "headers": dict(handler.headers.items()), "body": body, "document": document}
        )
        found = self.answer(document)
        return found if isinstance(found, Reply) else Reply(json.dumps(found).encode())


@contextmanager
def serving(answer: Answer) -> Iterator[Service]:
    """A service on a thread of its own, at a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = service.reply(self)
            self.send_response_only(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            with suppress(ConnectionError):  # the client may have heard enough
                self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = Service(answer, f"http://127.0.0.1:{server.server_port}/predict")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


def predicting(model: nn.Module, kind: str = "labels") -> Answer:
    """The answers of a model: ``labels``, ``probabilities`` or ``logits``."""

    def answer(document: dict[str, Any]) -> Any:
        with torch.no_grad():
            logits: Tensor = model(torch.tensor(document["inputs"], dtype=torch.float32))
        found = {"labels": logits.argmax(-1), "probabilities": logits.softmax(-1), "logits": logits}
        return {kind: found[kind].tolist()}

    return answer
