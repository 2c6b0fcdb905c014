"""What ``verify`` is about where it is no file: a suspect behind a URL."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sealmark.cli.staging import check_free
from sealmark.core.errors import AccessError, ParameterError

if TYPE_CHECKING:
    from torch import Tensor

    from sealmark.core.evidence import Evidence
    from sealmark.core.ownership import Verifiable
    from sealmark.core.secret import Secret
    from sealmark.core.suspect import Returns
    from sealmark.core.task import Task
    from sealmark.formats.evidence import SuspectRecord
    from sealmark.runtime.endpoint import Endpoint

_option = functools.partial(typer.Option, rich_help_panel="With --endpoint")
TOKEN = "SEALMARK_ENDPOINT_TOKEN"  # noqa: S105 - the name of a variable


@dataclass(frozen=True)
class Remote:
    """A suspect behind a URL, and how to ask it."""

    endpoint: Annotated[
        str | None,
        _option(metavar="URL", help=f"A suspect behind a URL; ${TOKEN} is sent as a bearer token."),
    ] = None
    budget: Annotated[int | None, _option(min=1, help="Queries that it may be sent, at most.")] = None
    returns: Annotated[
        str | None,
        _option(
            metavar="KIND", help="It answers label, probabilities or logits; found out with one query without."
        ),
    ] = None
    batch: Annotated[int, _option(min=1, help="Queries a request, at most.")] = 16
    rate: Annotated[float | None, _option(min=0, help="Requests a second, at most.")] = None
    timeout: Annotated[float, _option(min=0, help="Seconds for a request.")] = 30.0
    retries: Annotated[int, _option(min=0, help="How often a request that failed is sent again.")] = 4
    adapter: Annotated[
        str | None,
        _option(metavar="MODULE:FACTORY", help="Speaks another JSON shape than docs/endpoint.md."),
    ] = None
    log: Annotated[
        Path | None,
        _option(metavar="FILE", help="Write every query and its answer; the evidence holds its SHA-256."),
    ] = None

    def check(self, suspect: Path | None, *, force: bool) -> None:
        """Refuse a suspect that is a file and a URL, or neither, before anything is asked.

        Raises:
            ParameterError: so; or an option for URLs without one; or the log would replace a file.
        """
        if (suspect is None) == (self.endpoint is None):
            raise ParameterError("which suspect?", expected="a file or --endpoint URL, one of the two")
        if self.endpoint is None and self != Remote():
            raise ParameterError("no URL to ask", expected="--endpoint URL beside how to ask it")
        if self.log is not None:
            check_free(self.log, force=force)

    @contextmanager
    def open(self, scheme: Verifiable, secret: Secret, task: Task | None) -> Iterator[Endpoint]:
        """The suspect; its log is kept when the block ends well.

        Raises:
            AccessError: the scheme reads what no endpoint shows, or the service refuses us.
            SealmarkError: as `Endpoint`.
        """
        from sealmark.core.files import atomic_write
        from sealmark.core.suspect import Access
        from sealmark.runtime.answers import DOCUMENTED, load_adapter
        from sealmark.runtime.endpoint import Endpoint

        if scheme.access & (Access.WEIGHTS | Access.MODULE):
            raise AccessError(
                f"{scheme.name} needs more than answers", expected=scheme.access.words(), found="an endpoint"
            )
        adapter = DOCUMENTED if self.adapter is None else load_adapter(self.adapter)
        with ExitStack() as stack:
            log = None if self.log is None else stack.enter_context(atomic_write(self.log, mode=0o600))
            yield stack.enter_context(
                Endpoint(
                    str(self.endpoint),
                    returns=cast("Returns | None", self.returns),
                    probe=_ordinary(secret, task),
                    classes=secret.host.get("classes"),
                    budget=self.budget,
                    batch=self.batch,
                    rate=self.rate,
                    timeout=self.timeout,
                    retries=self.retries,
                    headers=_credentials(),
                    adapter=adapter,
                    log=log,
                )
            )


def about(evidence: Evidence, suspect: Endpoint) -> Evidence:
    """The same evidence with what there is to say about an endpoint: no digest of weights, but one of the log."""
    told = {"returns": suspect.returns, "sent": suspect.queries, "log": suspect.log_digest}
    return dataclasses.replace(evidence, details={**evidence.details, "endpoint": told})


def record_of(suspect: Path | Endpoint) -> SuspectRecord:
    """What evidence says that it is about."""
    from sealmark.core.weights import weights_of
    from sealmark.formats.evidence import SuspectRecord

    if isinstance(suspect, Path):
        return SuspectRecord(weights_of(suspect).digest(), suspect.name)
    return SuspectRecord(description=suspect.address)


def _credentials() -> dict[str, str]:
    """From the environment: what stands on a command line, every user of the machine can read."""
    token = os.environ.get(TOKEN, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ParameterError(f"bad ${TOKEN}", expected="printable ASCII")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _ordinary(secret: Secret, task: Task | None) -> Tensor | None:
    """An input that says nothing: a row of the task, or the lowest of its range."""
    import torch

    if task is not None:
        return task.test.inputs[:1]
    host: dict[str, Any] = secret.host
    if not {"shape", "low"} <= host.keys():
        return None
    kind = torch.int64 if host.get("integer", False) else torch.float32
    return torch.full((1, *host["shape"]), host["low"], dtype=kind)
