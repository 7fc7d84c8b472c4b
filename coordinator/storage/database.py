"""The database as SQLAlchemy reaches it. The one place that knows SQLite from others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from oneround.errors import NotEnough, Unreachable


class Database:
    """Transactions. Rows that come out of them are detached: reading them is free, changing them does nothing.

    One thread writes at a time, since SQLite lets no more, and waiting for a lock here is fairer than asking it again.
    """

    def __init__(self, url: str | URL) -> None:
        self._engine = engine(url)
        self._for_writing = self._engine.execution_options(writes=True)
        self._writer = threading.Lock()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def writes(self) -> Iterator[Session]:
        """A transaction that is committed, and on the disk, when its block is left without an error.

        Raises:
            NotEnough: the file cannot be used, as on a full disk.
            Unreachable: the server does not answer.
        """
        with (
            self._readable(),
            self._writer,
            Session(self._for_writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def reads(self) -> Iterator[Session]:
        """A transaction that sees one moment; raises as `writes` does."""
        with self._readable(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            why = str(error.orig).splitlines()[0]
            if self._engine.dialect.name == "sqlite":
                raise NotEnough(f"the coordinator cannot use its database: {why}") from error
            raise Unreachable(f"the coordinator's database does not answer: {why}") from error


def engine(url: str | URL) -> Engine:
    """An engine whose commits are on the disk when they return, and whose transactions each see one moment.

    A transaction that will write is begun on `engine.execution_options(writes=True)`.
    """
    created = create_engine(url)
    if created.dialect.name == "sqlite":
        event.listen(created, "connect", _durable_sqlite)
        event.listen(created, "begin", _begin)
    return created


def _durable_sqlite(connection: Any, _record: Any) -> None:
    """On macOS a commit that is on the disk takes fullfsync."""
    connection.isolation_level = None  # transactions begin below, not where the driver thinks
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """What will write takes the lock at once: a transaction that reads first would fail if another wrote between."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
