"""A suspect behind a URL: `Endpoint` asks it politely, counts what it was asked, and takes no nonsense.

Nothing but a whole, sound answer counts. A service that fails, refuses or answers nonsense ends in a typed
error that says how many queries it took; a verdict on half of the answers does not exist.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import (
    AccessError,
    FormatError,
    ParameterError,
    SealmarkError,
    ServiceError,
    UnsupportedError,
)
from sealmark.core.modes import chunks
from sealmark.core.suspect import BlackBox, Returns
from sealmark.formats.strict_json import parse_json
from sealmark.runtime.answers import DOCUMENTED, Adapter, checked, nested

if TYPE_CHECKING:
    import httpx2

PASSING = {408, 429, 502, 503, 504}  # statuses after which asking again may help
LONGEST_WAIT = 120.0  # seconds between two tries, whatever the service asks for
LARGEST_ANSWER = 16 * 2**20  # bytes
_FIRST_WAIT = 0.5  # seconds; doubles with each try
_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_VALUE = re.compile(r"([!-~]([ -~]*[!-~])?)?")
_HOME = ("localhost", "127.0.0.1", "::1")


class Clock(Protocol):
    """What tells the time and waits; the module `time` does."""

    def monotonic(self) -> float:
        """Seconds from some fixed moment."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


class Endpoint(BlackBox):
    """A suspect behind a URL. Use it in a ``with`` block, or `close` it.

    ``queries`` counts the rows of every request that went out, also of one that failed: nobody else knows what a
    service counts. The budget holds for all of them.

    Args:
        url: where to POST, http or https. Credentials in it are sent, and shown nowhere.
        returns: what the endpoint answers; None finds out with one query that is no evidence.
        probe: (1, ...) what to ask then; an ordinary input.
        classes: K, where it is known; an answer with other classes is refused.
        budget: rows that may be sent; None for no limit.
        batch: rows a request, at most.
        rate: requests a second, at most; None for no limit.
        timeout: seconds for a request, its answer included.
        retries: how often a request that failed is sent again, after a wait that doubles each time or as long
            as the service asks for, within `LONGEST_WAIT`.
        headers: sent with each request.
        adapter: for services that speak another shape than ``docs/endpoint.md``.
        log: gets every answered row as a line of canonical JSON, ``{"answer": ..., "input": ...}``.
        rng: jitter of waits; the operating system's randomness by default.
        clock: for tests.

    Attributes:
        address: the URL without credentials and query.
        returns: what the endpoint answers.

    Raises:
        ParameterError: an argument means nothing; a token would go out in the clear; the URL is wrong or
            redirects; the service says that the request is wrong.
        AccessError: the service refuses us.
        UnsupportedError: the extra ``endpoint`` is not installed.
        FormatError: the answer to the probe is nonsense.
        ServiceError: no answer to the probe, after all retries.
    """

    def __init__(
        self,
        url: str,
        *,
        returns: Returns | None = None,
        probe: Tensor | None = None,
        classes: int | None = None,
        budget: int | None = None,
        batch: int = 16,
        rate: float | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        adapter: Adapter = DOCUMENTED,
        log: BinaryIO | None = None,
        rng: np.random.Generator | None = None,
        clock: Clock = time,
    ) -> None:
        if batch < 1 or not timeout > 0 or retries < 0 or (rate is not None and not rate > 0):
            raise ParameterError(
                "bad way of asking",
                expected="batch >= 1, timeout > 0, retries >= 0, rate > 0",
                found=(batch, timeout, retries, rate),
            )
        if budget is not None and budget < 1:
            raise ParameterError("bad query budget", expected="1 or more", found=budget)
        self.budget, self.returns, self.adapter = budget, returns, adapter
        self._classes, self._batch, self._timeout, self._retries = classes, batch, timeout, retries
        self._gap, self._next = 0.0 if rate is None else 1 / rate, clock.monotonic()
        self._rng, self._clock = np.random.default_rng() if rng is None else rng, clock
        self._log, self._digest = log, hashlib.sha256()
        self._open(url, timeout, headers or {})
        super().__init__(self._answer, returns=returns or self._find_out(probe), budget=budget)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.address!r})"

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    @property
    def log_digest(self) -> str:
        """SHA-256 of the log so far: of every row that counts as evidence and its answer, in order."""
        return self._digest.hexdigest()

    def _open(self, url: str, timeout: float, headers: Mapping[str, str]) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise UnsupportedError(
                "asking an endpoint needs an extra", found=error, advice='pip install "sealmark[endpoint]"'
            ) from None
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = httpx2.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ParameterError("bad URL of an endpoint", expected="https://host/path")
        self._url = parsed.copy_with(userinfo=b"", fragment=None)
        self.address = str(self._url.copy_with(query=None))
        at_home = parsed.host in _HOME
        secret = bool(parsed.userinfo) or "authorization" in {name.lower() for name in headers}
        if secret and parsed.scheme == "http" and not at_home:
            raise ParameterError(
                "a token would go out in the clear", expected="https", found=self.address, advice="use https"
            )
        self._client = httpx2.Client(
            headers={"accept": "application/json", "accept-encoding": "identity", **_sound(headers)},
            auth=(parsed.username, parsed.password) if parsed.userinfo else None,
            timeout=timeout,
            trust_env=not at_home,  # no proxy leads to this machine
        )

    def _find_out(self, probe: Tensor | None) -> Returns:
        if probe is None:
            raise ParameterError(
                "what does the endpoint return?", expected="label, probabilities or logits, or an input to probe it"
            )
        try:
            return self._exchange(probe[:1])[0]
        except SealmarkError as error:
            self.close()
            raise self._with_cost(error) from error

    def _ask(self, inputs: Tensor) -> Tensor:
        try:
            return super()._ask(inputs)
        except SealmarkError as error:
            raise self._with_cost(error) from error

    def _with_cost(self, error: SealmarkError) -> SealmarkError:
        return type(error)(f"{str(error).rstrip('.')}. {self.queries} queries were spent and there is no verdict.")

    def _answer(self, inputs: Tensor) -> Tensor:
        self.queries -= len(inputs)  # counted as they go out instead
        answers = []
        for rows in chunks(inputs, self._batch):
            answers.append(self._exchange(rows)[1])
            for row, answer in zip(nested(rows), nested(answers[-1]), strict=True):
                self._keep({"input": row, "answer": answer})
        return torch.cat(answers)

    def _keep(self, entry: dict[str, object]) -> None:
        line = canonical_json(entry) + b"\n"
        self._digest.update(line)
        if self._log is not None:
            self._log.write(line)

    def _exchange(self, rows: Tensor) -> tuple[Returns, Tensor]:
        """Ask until there is an answer; what the first one settles about the endpoint holds for the rest."""
        body, headers = self.adapter.encode(rows)
        headers = _sound(headers)
        if not isinstance(body, bytes):
            body, headers = canonical_json(body), {"content-type": "application/json", **headers}
        kind, values = self.adapter.read(self._persist(body, headers, len(rows)), self.returns)
        answer = checked(values, kind, rows=len(rows), classes=self._classes)
        self.returns = kind
        if kind != "label":
            self._classes = answer.shape[1]
        return kind, answer

    def _persist(self, body: bytes, headers: Mapping[str, str], rows: int) -> Any:
        """Parsed JSON, after as many tries as it takes and may take."""
        for attempt in range(self._retries + 1):
            self._pace()
            self.queries += rows
            try:
                return self._send(body, headers)
            except _PassingError as error:
                last = error
            self.queries -= 0 if last.sent else rows
            wait = last.wait if last.wait is not None else self._backoff(attempt)
            afford = self.budget is None or self.queries + rows <= self.budget
            if attempt == self._retries or wait > LONGEST_WAIT or not afford:
                break
            self._clock.sleep(wait)
        raise ServiceError(
            f"{self.address} does not answer",
            found=f"{last}, {attempt + 1} times" + (f", wait {wait:g} s" if wait > LONGEST_WAIT else ""),
            advice="try again later" if afford else "the budget leaves no retry; try again later or raise it",
        )

    def _pace(self) -> None:
        wait = self._next - self._clock.monotonic()
        if wait > 0:
            self._clock.sleep(wait)
        self._next = self._clock.monotonic() + self._gap

    def _backoff(self, attempt: int) -> float:
        return min(LONGEST_WAIT, _FIRST_WAIT * 2.0**attempt) * float(self._rng.uniform(0.5, 1.0))

    def _send(self, body: bytes, headers: Mapping[str, str]) -> Any:
        """One request; `_PassingError` where another may fare better."""
        import httpx2

        start = self._clock.monotonic()
        try:
            with self._client.stream("POST", self._url, content=body, headers=dict(headers)) as response:
                self._check_status(response)
                return self._read(response, start)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _PassingError(f"no connection ({error})", sent=False) from None
        except httpx2.TransportError as error:
            raise _PassingError(type(error).__name__) from None

    def _read(self, response: httpx2.Response, start: float) -> Any:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FormatError("the endpoint's answer is compressed", expected="plain, as was asked for")
        data = bytearray()
        for part in response.iter_raw():
            data += part
            if len(data) > LARGEST_ANSWER:
                raise FormatError("the endpoint's answer is too large", expected=f"{LARGEST_ANSWER} bytes at most")
            if self._clock.monotonic() - start > self._timeout:  # the client's own limit is for each piece
                raise _PassingError("no end of the answer in time")
        kind = response.headers.get("content-type", "no type")[:40]
        return parse_json(bytes(data), limit=LARGEST_ANSWER, what=f"the endpoint's answer ({kind})")

    def _check_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status in PASSING:
            raise _PassingError(f"HTTP {status}", wait=_asked_wait(response.headers))
        if status in (401, 403):
            raise AccessError(
                f"{self.address} refuses us", found=f"HTTP {status}", advice="get a token that it accepts"
            )
        if 300 <= status < 400:
            raise ParameterError(
                f"{self.address} redirects, which is not followed",
                found=f"HTTP {status}",
                advice="pass the final URL, if you trust it",
            )
        if 400 <= status < 500:
            raise ParameterError(
                f"{self.address} does not take this request",
                found=f"HTTP {status}",
                advice="check the URL, the shape of its inputs, the batch size and the adapter",
            )
        if not 200 <= status < 300:
            raise ServiceError(f"{self.address} fails", found=f"HTTP {status}", advice="try again later")


def _sound(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that can be sent; a value may be a secret and is not shown."""
    for name, value in headers.items():
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise ParameterError(f"bad header {name!r}", expected="a token, and printable ASCII as its value")
    return dict(headers)


class _PassingError(Exception):
    """A request failed and another may not; ``wait``: what the service asked for; ``sent``: it went out."""

    def __init__(self, reason: str, *, wait: float | None = None, sent: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.sent = wait, sent


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After, a date by the service's own clock; None where it says nothing sound."""
    asked = headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked)
    try:
        until, now = parsedate_to_datetime(asked), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (until - now).total_seconds())
    except (TypeError, ValueError):
        return None
