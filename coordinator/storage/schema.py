"""The tables. What changes here gets a step in migrations/versions; a test holds the two together.

Nothing here is known to SQLite alone. Records that travel are kept as the wire's own messages, as JSON; what queries
need stands in columns.
"""

from __future__ import annotations

from typing import Any, ClassVar

from google.protobuf import json_format
from google.protobuf.message import Message
from sqlalchemy import BigInteger, Dialect, Double, ForeignKeyConstraint, Index, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from oneround.v1 import federation_pb2 as pb


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


class Table(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double}  # times since the epoch need all of it


class Job(Table):
    """A job and its round."""

    __tablename__ = "jobs"
    name: Mapped[str] = mapped_column(primary_key=True)
    # What clients are told; holds the spec, the modules, the initial adapter and the base's files. Never changes.
    job: Mapped[pb.Job] = mapped_column(Proto(pb.Job), deferred=True)
    base_folder: Mapped[str]
    opened: Mapped[float]
    # The round; see round.py.
    state: Mapped[str]
    reason: Mapped[str]
    closed_at: Mapped[float | None]
    tried_at: Mapped[float]
    # Being deleted: what is left of it goes when the daemon next starts.
    deleted: Mapped[bool]


class Client(Table):
    """Someone who joined, and how it was going when that was last written down; jobs/leases.py has it to the second."""

    __tablename__ = "clients"
    __table_args__ = (ForeignKeyConstraint(["job"], ["jobs.name"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    lease: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    machine: Mapped[pb.Machine] = mapped_column(Proto(pb.Machine))
    withdrawn: Mapped[bool]
    last_seen: Mapped[float]
    step: Mapped[int] = mapped_column(BigInteger)
    total_steps: Mapped[int] = mapped_column(BigInteger)
    loss: Mapped[float]
    tokens_per_second: Mapped[float]

    @classmethod
    def joining(cls, job: str, client_id: str, name: str, machine: pb.Machine, now: float) -> Client:
        """One who joins now, and has no lease yet."""
        return cls(
            job=job,
            client_id=client_id,
            lease="",
            name=name,
            machine=machine,
            withdrawn=False,
            last_seen=now,
            step=0,
            total_steps=0,
            loss=0.0,
            tokens_per_second=0.0,
        )


class Contribution(Table):
    """What a client sent. Its bytes never change; a replacement is another row, with the next revision."""

    __tablename__ = "contributions"
    __table_args__ = (
        ForeignKeyConstraint(["job", "client_id"], ["clients.job", "clients.client_id"]),
        Index("contributions_by_digest", "digest"),
    )
    job: Mapped[str] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    replaced: Mapped[bool]  # by the next revision
    digest: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    received: Mapped[float]
    declaration: Mapped[pb.Declaration] = mapped_column(Proto(pb.Declaration))
    # Looked at by itself: `pending`, `sound`, `unsound`, or `late`, which is sound and came after the end.
    standing: Mapped[str]
    # What holds in the cohort: a Verdict in lower case, and why.
    verdict: Mapped[str]
    reason: Mapped[str]
    # The operator's decision, `admit` or `exclude`, and whether the client may send another one.
    by_hand: Mapped[str]
    may_replace: Mapped[bool]
    # The newest version whose making has taken note of all of this; 0: none.
    considered: Mapped[int]

    @classmethod
    def sent(cls, client: Client, declaration: pb.Declaration, now: float) -> Contribution:
        """One that nobody has looked at yet."""
        return cls(
            job=client.job,
            client_id=client.client_id,
            revision=1,
            replaced=False,
            digest=declaration.digest,
            size=declaration.size,
            received=now,
            declaration=declaration,
            standing="pending",
            verdict="pending",
            reason="",
            by_hand="",
            may_replace=False,
            considered=0,
        )


class Publication(Table):
    """A version, made or being made."""

    __tablename__ = "publications"
    __table_args__ = (ForeignKeyConstraint(["job"], ["jobs.name"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    # What was asked for, in full: the method, its parameters, the adapter's rank, the reason.
    request: Mapped[pb.PublishRequest] = mapped_column(Proto(pb.PublishRequest))
    at_least: Mapped[int]  # contributions that have to be left once the cohort is judged
    # Set once it is made; its `folder` is filled in on the way out, since a state folder may move.
    publication: Mapped[pb.Publication | None] = mapped_column(Proto(pb.Publication))


class Evaluation(Table):
    """How a version does on one client's held-out data, by that client's word; a later word replaces it."""

    __tablename__ = "evaluations"
    __table_args__ = (ForeignKeyConstraint(["job", "client_id"], ["clients.job", "clients.client_id"]),)
    job: Mapped[str] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    evaluation: Mapped[pb.Evaluation] = mapped_column(Proto(pb.Evaluation))
    received: Mapped[float]


class RecordedEvent(Table):
    """Something that happened in a round; see coordinator/events.py. Rows are added, and never changed."""

    __tablename__ = "events"
    __table_args__ = (
        ForeignKeyConstraint(["job"], ["jobs.name"]),
        UniqueConstraint("job", "once", name="events_once"),
    )
    job: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # 1, 2, … within the job
    at: Mapped[float]
    kind: Mapped[str]
    client_id: Mapped[str]  # empty: it is about the whole round
    once: Mapped[str | None]  # the same for what is not recorded twice; NULL, which is never the same, for all else
    # What happened; number, time and client are filled in on the way out.
    event: Mapped[pb.Event] = mapped_column(Proto(pb.Event))


class Person(Table):
    """A client's key that has asked for something, whatever job it was."""

    __tablename__ = "people"
    client_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    first_seen: Mapped[float]
    last_seen: Mapped[float]
    banned: Mapped[bool]
    why: Mapped[str]


class Pass(Table):
    """That a client may take part in a job, or has asked to. An empty job stands for every one."""

    __tablename__ = "passes"
    __table_args__ = (ForeignKeyConstraint(["client_id"], ["people.client_id"]),)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(primary_key=True)
    granted: Mapped[bool]
    how: Mapped[str]  # `open`, `approved`, or `token ID`
    at: Mapped[float]


class Token(Table):
    """What lets its holders in; of its secret only a digest is here."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    job: Mapped[str]
    note: Mapped[str]
    created: Mapped[float]
    expires: Mapped[float]
    uses: Mapped[int]  # 0: any number
    used: Mapped[int]
    revoked: Mapped[bool]
