"""A job's events in SQL: added in the transaction that changes what they tell of, never changed, read in order.

Each job counts its own events, rather than the database: numbers have no gaps, and a backup that is brought back into
any database goes on counting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from coordinator import events
from coordinator.storage.schema import Client, RecordedEvent
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb

_AT_A_TIME = 500  # keys in one query


@dataclass(frozen=True)
class NewEvent:
    """An event that is not recorded yet. `at` is in seconds since the Unix epoch; without a client_id it is about the
    whole round."""

    event: pb.Event
    at: float
    client_id: str = ""


def record(session: Session, job: str, *happened: NewEvent) -> None:
    """Add events to a job's, in this order; those that are no news are left out."""
    keys = [events.once(new.event, new.client_id) for new in happened]
    recorded = _recorded(session, job, [key for key in keys if key is not None])
    number = session.scalar(select(func.max(RecordedEvent.number)).where(RecordedEvent.job == job)) or 0
    for new, key in zip(happened, keys, strict=True):
        if key in recorded:
            continue
        if key is not None:
            recorded.add(key)
        number += 1
        session.add(
            RecordedEvent(
                job=job,
                number=number,
                at=new.at,
                kind=events.kind(new.event),
                client_id=new.client_id,
                once=key,
                event=new.event,
            )
        )
    session.flush()


def _recorded(session: Session, job: str, keys: Sequence[str]) -> set[str | None]:
    recorded: set[str | None] = set()
    for start in range(0, len(keys), _AT_A_TIME):
        some = RecordedEvent.once.in_(keys[start : start + _AT_A_TIME])
        recorded.update(session.scalars(select(RecordedEvent.once).where(RecordedEvent.job == job, some)))
    return recorded


def read(session: Session, job: str, after: int, limit: int) -> list[pb.Event]:
    """So many events of a job that follow number `after`, oldest first."""
    query = _of(job).where(RecordedEvent.number > after).order_by(RecordedEvent.number).limit(limit)
    return _named(session, job, session.scalars(query).all())


def newest(session: Session, job: str, limit: int) -> list[pb.Event]:
    """The last so many events of a job, oldest first."""
    query = _of(job).order_by(RecordedEvent.number.desc()).limit(limit)
    return _named(session, job, session.scalars(query).all()[::-1])


def counts(session: Session) -> Mapping[tuple[str, str], int]:
    """How many events of each kind each job has had, by job and kind."""
    grouped = select(RecordedEvent.job, RecordedEvent.kind, func.count()).group_by(
        RecordedEvent.job, RecordedEvent.kind
    )
    return {(job, kind): count for job, kind, count in session.execute(grouped)}


def _of(job: str) -> Select[Any]:
    return select(RecordedEvent).where(RecordedEvent.job == job)


def _named(session: Session, job: str, rows: Sequence[RecordedEvent]) -> list[pb.Event]:
    """Rows as events, with what people call their clients now."""
    clients = {row.client_id for row in rows}
    query = select(Client.client_id, Client.name).where(Client.job == job, Client.client_id.in_(clients))
    names: dict[str, str] = dict(session.execute(query).all())
    return [_event(row, names.get(row.client_id, "")) for row in rows]


def _event(row: RecordedEvent, name: str) -> pb.Event:
    event = pb.Event()
    event.CopyFrom(row.event)
    event.number, event.at_unix = row.number, row.at
    event.client, event.client_name = public_id(row.client_id), name
    return event
