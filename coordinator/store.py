"""What the coordinator knows, in SQL. Every public method is one transaction, committed when it returns."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from sqlalchemy import URL, Connection, Dialect, ForeignKeyConstraint, Text, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from converters.errors import Refused
from coordinator import round as rounds
from coordinator.round import Round, State
from oneround.v1 import federation_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = TypeVar("Row")


class Proto(TypeDecorator[Any]):
    """A protobuf message, as its JSON: one definition of every record, readable in the database."""

    impl = Text
    cache_ok = True

    def __init__(self, message: type[Message]) -> None:
        super().__init__()
        self.message = message

    def process_bind_param(self, value: Message | None, dialect: Dialect) -> str | None:
        return (
            None if value is None else json_format.MessageToJson(value, preserving_proto_field_name=True, indent=None)
        )

    def process_result_value(self, value: str | None, dialect: Dialect) -> Message | None:
        return None if value is None else json_format.Parse(value, self.message(), ignore_unknown_fields=True)


class Base(DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "jobs"
    name: Mapped[str] = mapped_column(primary_key=True)
    # What clients are told; holds the spec, the modules, the initial adapter and the base's files.
    job: Mapped[pb.Job] = mapped_column(Proto(pb.Job))
    base_folder: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    opened: Mapped[float]
    deadline: Mapped[float]


class Client(Base):
    __tablename__ = "clients"
    __table_args__ = (ForeignKeyConstraint(["job"], ["jobs.name"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    lease: Mapped[str] = mapped_column(unique=True)
    # Name, machine and progress, as operators see them.
    status: Mapped[pb.ClientStatus] = mapped_column(Proto(pb.ClientStatus))
    # What it declared it will send; set by OpenUpload.
    declaration: Mapped[pb.Declaration | None] = mapped_column(Proto(pb.Declaration))


class Contribution(Base):
    __tablename__ = "contributions"
    __table_args__ = (ForeignKeyConstraint(["job", "client_id"], ["clients.job", "clients.client_id"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    declaration: Mapped[pb.Declaration] = mapped_column(Proto(pb.Declaration))
    receipt: Mapped[pb.Receipt] = mapped_column(Proto(pb.Receipt))


class Publication(Base):
    __tablename__ = "publications"
    __table_args__ = (ForeignKeyConstraint(["job"], ["jobs.name"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    publication: Mapped[pb.Publication] = mapped_column(Proto(pb.Publication))


class Store:
    """The coordinator's memory. Rows that it returns are detached: reading them is free, changing them does nothing."""

    def __init__(self, url: str | URL) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _durable_sqlite)
            event.listen(self._engine, "begin", _begin_immediate)
        Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    # Jobs

    def add_job(self, job: Job) -> None:
        with self._transaction() as session:
            session.add(job)

    def job(self, name: str) -> Job:
        """Raises Refused when there is no such job."""
        with self._transaction() as session:
            return _found(session.get(Job, name), f"there is no job {name!r} here")

    def jobs(self) -> Sequence[Job]:
        """Newest first."""
        with self._transaction() as session:
            return session.scalars(select(Job).order_by(Job.opened.desc())).all()

    def advance(self, name: str, event: rounds.Event, now: float) -> tuple[Round, Round]:
        """Apply an event to a job's round; returns the round before and after."""
        with self._transaction() as session:
            before = _round(session, name)
            after = rounds.apply(before, event, now)
            _set_round(session, name, after)
            return before, after

    # Clients

    def join(self, job: str, client_id: str, status: pb.ClientStatus) -> Client:
        """The client's row: a new one with a fresh lease, or the one that is there, with name and machine renewed."""
        with self._transaction() as session:
            client = session.get(Client, (job, client_id))
            if client is None:
                client = Client(job=job, client_id=client_id, lease=secrets.token_hex(32), status=status)
                session.add(client)
            elif session.get(Contribution, (job, client_id)) is None:
                client.status = status
            return client

    def client(self, lease: str) -> Client:
        """Raises Refused when no client holds this lease."""
        with self._transaction() as session:
            client = session.scalar(select(Client).where(Client.lease == lease))
            return _found(client, "this lease is not known here; run `edge-client join` again")

    def clients(self, job: str) -> Sequence[Client]:
        with self._transaction() as session:
            return session.scalars(select(Client).where(Client.job == job).order_by(Client.client_id)).all()

    def update_client(
        self, client: Client, change: Callable[[pb.ClientStatus], None], declaration: pb.Declaration | None = None
    ) -> None:
        """Change a client's status where it stands, and what it declares; nothing once its contribution is in."""
        with self._transaction() as session:
            key = (client.job, client.client_id)
            if session.get(Contribution, key) is not None:
                return
            row = session.get_one(Client, key)
            _change(row, change)
            if declaration is not None:
                row.declaration = declaration

    # Contributions

    def contribute(self, contribution: Contribution, change: Callable[[pb.ClientStatus], None]) -> pb.Receipt:
        """Commit a contribution and return its receipt; if this client's is already there, the receipt of that one.

        One that comes when the round is no longer open is kept, and takes no part.
        """
        with self._transaction() as session:
            key = (contribution.job, contribution.client_id)
            there = session.get(Contribution, key)
            if there is not None:
                return there.receipt
            round = _round(session, contribution.job)
            if contribution.receipt.admitted and round.state is not State.OPEN:
                contribution.receipt.admitted = False
                contribution.receipt.reason = f"it came in after the round had closed ({round.reason})"
            session.add(contribution)
            _change(session.get_one(Client, key), change)
            return contribution.receipt

    def contribution(self, job: str, client_id: str) -> Contribution | None:
        with self._transaction() as session:
            return session.get(Contribution, (job, client_id))

    def contributions(self, job: str) -> Sequence[Contribution]:
        """In an order that does not depend on who came first, so that a publication made again is the same."""
        with self._transaction() as session:
            query = select(Contribution).where(Contribution.job == job).order_by(Contribution.client_id)
            return session.scalars(query).all()

    # Publications

    def publish(self, publication: Publication, now: float) -> None:
        """A publication and the round's new state, together."""
        with self._transaction() as session:
            session.merge(publication)
            name = publication.job
            _set_round(session, name, rounds.apply(_round(session, name), rounds.Published(), now))

    def publications(self, job: str) -> Sequence[Publication]:
        """Oldest first."""
        with self._transaction() as session:
            query = select(Publication).where(Publication.job == job).order_by(Publication.version)
            return session.scalars(query).all()


def _round(session: Session, name: str) -> Round:
    job = _found(session.get(Job, name), f"there is no job {name!r} here")
    rules = job.job.spec.round
    given = session.scalars(select(Contribution).where(Contribution.job == name))
    return Round(
        min_clients=rules.min_clients,
        target_clients=rules.target_clients,
        deadline=job.deadline,
        state=State(job.state),
        reason=job.reason,
        admitted=frozenset(contribution.client_id for contribution in given if contribution.receipt.admitted),
    )


def _set_round(session: Session, name: str, round: Round) -> None:
    job = session.get_one(Job, name)
    job.state, job.reason = round.state.value, round.reason


def _change(client: Client, change: Callable[[pb.ClientStatus], None]) -> None:
    """Change a copy and put it in place: a message that is changed where it is would not look changed to SQLAlchemy."""
    status = pb.ClientStatus()
    status.CopyFrom(client.status)
    change(status)
    client.status = status


def _found(row: Row | None, otherwise: str) -> Row:
    if row is None:
        raise Refused(otherwise)
    return row


def _durable_sqlite(connection: Any, _record: Any) -> None:
    """A commit is on the disk when it returns; on macOS that takes fullfsync."""
    connection.isolation_level = None  # transactions begin below, not where the driver thinks
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    """Take the write lock at once: a transaction that reads, then writes, would fail if another wrote between."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
