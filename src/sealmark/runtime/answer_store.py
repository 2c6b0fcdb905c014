"""The evidence store of a watermarked service: which client was answered wrongly to what.

SQLite in a file, or PostgreSQL by its URL. It is the one place where workers agree: a wrong answer is written
here before it leaves, once, and whether a cap spared a query is remembered so that it stays spared.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sealmark.blackbox.answer_key import Answered
from sealmark.core.errors import ParameterError, ServiceError, UnsupportedError

try:
    from sqlalchemy import (
        Boolean,
        Column,
        Double,
        Index,
        Integer,
        LargeBinary,
        MetaData,
        String,
        Table,
        bindparam,
        event,
        func,
        select,
        true,
    )
    from sqlalchemy.dialects import postgresql, sqlite
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
except ImportError as error:  # pragma: no cover
    raise UnsupportedError(
        "the evidence store needs an extra", found=error, advice='pip install "sealmark[service]"'
    ) from None

_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "postgres": "asyncpg"}
_AT_ONCE = 500
_REMEMBERED = 100_000
_ATTEMPTS = 5

_TABLES = MetaData()
_CLIENTS = Table(
    "sealmark_clients",
    _TABLES,
    Column("mark", String(64), primary_key=True),
    Column("client", String, primary_key=True),
    Column("seen", Double, nullable=False),
    Column("flagged", Double),
    Column("statistic", Double),
)
_ANSWERS = Table(
    "sealmark_answers",
    _TABLES,
    Column("mark", String(64), primary_key=True),
    Column("client", String, primary_key=True),
    Column("bits", LargeBinary, primary_key=True),
    Column("query", LargeBinary, nullable=False),
    Column("natural", Integer, nullable=False),
    Column("time", Double, nullable=False),
    Column("marked", Boolean, nullable=False),
    Index("sealmark_answers_in_time", "mark", "client", "time"),
)


@dataclass(frozen=True)
class Cap:
    """The most wrong answers to different queries that a client gets within a time.

    250 convict a surrogate beyond any doubt; more would cost honest clients and prove nothing.

    Args:
        answers: how many.
        seconds: within which.
    """

    answers: int = 250
    seconds: float = 30 * 86400.0

    def __post_init__(self) -> None:
        if self.answers < 0 or not self.seconds > 0:
            raise ParameterError("bad cap", expected="answers >= 0, seconds > 0", found=self)


@dataclass(frozen=True)
class Client:
    """What is known of a client.

    Attributes:
        name: as the service calls him.
        answers: wrong answers so far.
        flagged: when his queries first looked like extraction, in seconds since 1970; None for never.
        statistic: of that test.
    """

    name: str
    answers: int
    flagged: float | None
    statistic: float | None


class AnswerStore:
    """Where wrong answers are registered; belongs to one event loop, and is opened at its first use.

    Args:
        url: ``sqlite:///answers.db``, ``postgresql://user:password@host/database``, or the path of a SQLite
            file. Give it to nobody: whoever reads it knows which answers were wrong.
        cap: None for none.
        timeout: seconds after which a write is given up.

    Raises:
        ParameterError: no such database.
    """

    def __init__(
        self, url: str | Path = "sqlite:///answers.db", *, cap: Cap | None = Cap(), timeout: float = 5.0
    ) -> None:
        self.url, self.cap, self.timeout = _url(url), cap, timeout
        self._engine: AsyncEngine | None = None
        self._opening = asyncio.Lock()
        self._waiting: list[tuple[str, list[Answered], asyncio.Future[list[bool]]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._known: OrderedDict[tuple[str, str, bytes], bool] = OrderedDict()

    async def register(self, mark: str, answers: Sequence[Answered]) -> list[bool]:
        """Write down what is about to be answered wrongly; whether each may be, or is spared by the cap.

        The first decision on a query holds for good, in every worker. Calls that wait together are written
        together.

        Args:
            mark: of `AnswerKey.mark`.
            answers: that the key selects.

        Raises:
            ServiceError: the database failed; nothing of this may be answered wrongly.
        """
        keys = [(mark, answer.client, answer.bits) for answer in answers]
        new = [answer for key, answer in zip(keys, answers, strict=True) if key not in self._known]
        decided = {}
        if new:
            future: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
            self._waiting.append((mark, new, future))
            if self._writer is None or self._writer.done():
                self._writer = asyncio.create_task(self._write())
            written = await future
            decided = {(a.client, a.bits): chosen for a, chosen in zip(new, written, strict=True)}
        return [self._known[key] if key in self._known else decided[key[1:]] for key in keys]

    async def flag(self, mark: str, client: str, statistic: float, when: float) -> None:
        """Note that a client's queries look like extraction; the first time counts.

        Raises:
            ServiceError: the database failed.
        """
        row = {"mark": mark, "client": client, "seen": when, "flagged": when, "statistic": statistic}

        async def write(connection: AsyncConnection) -> None:
            statement = self._insert(_CLIENTS).values(row)
            first = func.coalesce(_CLIENTS.c.flagged, statement.excluded.flagged)
            kept = func.coalesce(_CLIENTS.c.statistic, statement.excluded.statistic)
            await connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["mark", "client"], set_={"flagged": first, "statistic": kept}
                )
            )

        await self._run(write)

    async def answers(self, mark: str, client: str | None = None) -> list[Answered]:
        """The wrong answers to one client, or to all, in order of time.

        Raises:
            ServiceError: the database failed.
        """
        columns = (_ANSWERS.c.client, _ANSWERS.c.bits, _ANSWERS.c.query, _ANSWERS.c.natural, _ANSWERS.c.time)
        asked = select(*columns).where(_ANSWERS.c.mark == mark, _ANSWERS.c.marked).order_by(_ANSWERS.c.time)
        if client is not None:
            asked = asked.where(_ANSWERS.c.client == client)

        async def read(connection: AsyncConnection) -> list[Answered]:
            return [Answered(*row) for row in (await connection.execute(asked)).all()]

        found: list[Answered] = await self._run(read)
        return found

    async def clients(self, mark: str) -> list[Client]:
        """Everyone who was answered wrongly or flagged, by name.

        Raises:
            ServiceError: the database failed.
        """
        told = (_ANSWERS.c.mark == _CLIENTS.c.mark) & (_ANSWERS.c.client == _CLIENTS.c.client) & _ANSWERS.c.marked
        count = select(func.count()).where(told).correlate(_CLIENTS).scalar_subquery()
        asked = select(_CLIENTS.c.client, count, _CLIENTS.c.flagged, _CLIENTS.c.statistic)
        asked = asked.where(_CLIENTS.c.mark == mark).order_by(_CLIENTS.c.client)

        async def read(connection: AsyncConnection) -> list[Client]:
            return [Client(*row) for row in (await connection.execute(asked)).all()]

        found: list[Client] = await self._run(read)
        return found

    async def close(self) -> None:
        """Let go of the database; a later call opens it again."""
        if self._writer is not None:
            await self._writer
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
            rows = {(mark, a.client, a.bits): a for mark, answers, _ in batch for a in answers}

            async def write(connection: AsyncConnection, rows: Any = rows) -> dict[Any, bool]:
                return await self._decide(connection, rows)

            try:
                decided = await self._run(write)
            except ServiceError as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self._known.update(decided)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            for mark, answers, future in batch:
                if not future.done():  # the client may have hung up
                    future.set_result([decided[mark, a.client, a.bits] for a in answers])

    async def _decide(
        self, connection: AsyncConnection, rows: dict[tuple[str, str, bytes], Answered]
    ) -> dict[tuple[str, str, bytes], bool]:
        now = time.time()
        since = 0.0 if self.cap is None else now - self.cap.seconds
        for mark, client in sorted({key[:2] for key in rows}):  # in one order, so that workers do not block
            await connection.execute(self._touch, {"m": mark, "c": client, "now": now})
        decided = {}
        for (mark, client, bits), answer in rows.items():
            values = {"m": mark, "c": client, "b": bits, "q": answer.query, "n": answer.natural}
            found = await connection.execute(self._enter, values | {"now": now, "since": since})
            decided[mark, client, bits] = bool(found.scalar_one())
        return decided

    @cached_property
    def _touch(self) -> Any:
        """Locks a client to the end of the transaction, so that two workers cannot both use up a cap."""
        values: dict[str, Any] = {"mark": bindparam("m"), "client": bindparam("c"), "seen": bindparam("now")}
        statement = self._insert(_CLIENTS).values(values)
        return statement.on_conflict_do_update(
            index_elements=["mark", "client"], set_={"seen": statement.excluded.seen}
        )

    @cached_property
    def _enter(self) -> Any:
        """Writes an answer down, unless it is there; gives the decision on it, of now or of then."""
        names = {"mark": "m", "client": "c", "bits": "b", "query": "q", "natural": "n", "time": "now"}
        values: dict[str, Any] = {column: bindparam(name) for column, name in names.items()}
        values["marked"] = true()
        if self.cap is not None:
            old = _ANSWERS.alias()
            here = (old.c.mark == values["mark"]) & (old.c.client == values["client"]) & old.c.marked
            used = select(func.count()).select_from(old).where(here, old.c.time > bindparam("since"))
            values["marked"] = used.scalar_subquery() < self.cap.answers
        return (
            self._insert(_ANSWERS)
            .values(values)
            .on_conflict_do_update(index_elements=["mark", "client", "bits"], set_={"marked": _ANSWERS.c.marked})
            .returning(_ANSWERS.c.marked)
        )

    def _insert(self, table: Table) -> Any:
        return (sqlite if self.url.get_backend_name() == "sqlite" else postgresql).insert(table)

    async def _run(self, work: Any) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                engine = await self._open()
                async with engine.begin() as connection:
                    return await work(connection)
        except Exception as error:  # while connecting, drivers raise what they like
            raise ServiceError(
                "the evidence store failed",
                found=f"{type(error).__name__} at {self.url.render_as_string()}",
                advice="see that the database is there and may be written",
            ) from error

    async def _open(self) -> AsyncEngine:
        async with self._opening:
            if self._engine is None:
                in_a_file = self.url.get_backend_name() == "sqlite"
                engine = create_async_engine(self.url, pool_pre_ping=not in_a_file)
                if in_a_file:
                    event.listen(engine.sync_engine, "connect", _write_ahead)
                try:
                    await _create(engine)
                except BaseException:
                    await engine.dispose()
                    raise
                self._engine = engine
        return self._engine


def _write_ahead(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for one another
    cursor.close()


async def _create(engine: AsyncEngine) -> None:
    for attempt in range(_ATTEMPTS):  # other workers may be creating the same tables
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_TABLES.create_all)
            return
        except DBAPIError:
            if attempt == _ATTEMPTS - 1:
                raise
            await asyncio.sleep(0.05 * 2**attempt)


def _url(url: str | Path) -> URL:
    text = f"sqlite:///{url}" if isinstance(url, Path) or "://" not in url else url
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        parsed = None
    driver = _DRIVERS.get(parsed.get_backend_name() if parsed else "")
    if parsed is None or driver is None:
        raise ParameterError(
            "no such evidence store", expected="sqlite:///FILE or postgresql://...", found=parsed or "no URL"
        )
    backend = "postgresql" if driver == "asyncpg" else "sqlite"
    return parsed.set(drivername=f"{backend}+{driver}")
