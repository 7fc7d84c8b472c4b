"""The database as SQLAlchemy reaches it. The one place that knows SQLite from others."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event


def engine(url: str | URL) -> Engine:
    """An engine whose commits are on the disk when they return, and whose transactions each see one moment.

    A transaction that will write is begun on `engine.execution_options(writes=True)`.
    """
    made = create_engine(url)
    if made.dialect.name == "sqlite":
        event.listen(made, "connect", _durable_sqlite)
        event.listen(made, "begin", _begin)
    return made


def _durable_sqlite(connection: Any, _record: Any) -> None:
    """On macOS a commit that is on the disk takes fullfsync."""
    connection.isolation_level = None  # transactions begin below, not where the driver thinks
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """What will write takes the lock at once: a transaction that reads first would fail if another wrote between."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
