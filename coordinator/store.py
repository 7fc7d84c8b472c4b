"""What the coordinator knows, in SQL. Every public method is one transaction, committed when it returns."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    URL,
    and_,
    bindparam,
    case,
    delete,
    func,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from converters.errors import Conflict, Denied, NotEnough, NotFound, Refused, Unreachable
from coordinator import database, migrations
from coordinator import job as jobs
from coordinator import round as rounds
from coordinator.round import Event, Round, Rules, State
from coordinator.schema import Client, Contribution, Job, Publication
from oneround.v1 import federation_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = TypeVar("Row")

_TAKES_PART = and_(not_(Contribution.replaced), Contribution.verdict.in_(["admitted", "clipped"]))
# What a new version looks at: sound by itself, whatever an earlier cohort made of it, and the operator's own.
_CANDIDATE = and_(
    not_(Contribution.replaced),
    or_(
        and_(Contribution.standing == "sound", Contribution.by_hand != "exclude"),
        Contribution.by_hand == "admit",
    ),
)
# What no version, made or tried, has taken note of.
_FRESH = and_(
    not_(Contribution.replaced),
    Contribution.considered == 0,
    or_(Contribution.verdict.in_(["admitted", "clipped"]), Contribution.by_hand != ""),
)


@dataclass(frozen=True)
class Announced:
    """What never changes of a job."""

    job: pb.Job
    base_folder: str
    opened: float
    rules: Rules


@dataclass(frozen=True)
class Counts:
    """How many joined, contributed and take part."""

    joined: int
    contributed: int
    admitted: int


class Store:
    """The coordinator's memory. Rows that it returns are detached: reading them is free, changing them does nothing.

    One thread writes at a time, since SQLite lets no more, and waiting for a lock here is fairer than asking it again.
    """

    def __init__(self, url: str | URL) -> None:
        self._engine = database.engine(url)
        self._for_writing = self._engine.execution_options(writes=True)
        self._writer = threading.Lock()
        self._announced: dict[str, Announced] = {}
        with self._readable(), self._for_writing.begin() as connection:
            migrations.upgrade(connection)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @contextmanager
    def _writes(self) -> Iterator[Session]:
        with (
            self._readable(),
            self._writer,
            Session(self._for_writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def _reads(self) -> Iterator[Session]:
        with self._readable(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """A database that cannot write, or is not there, is told as one."""
        try:
            yield
        except OperationalError as error:
            why = str(error.orig).splitlines()[0]
            if self._engine.dialect.name == "sqlite":
                raise NotEnough(f"the coordinator cannot use its database: {why}") from error
            raise Unreachable(f"the coordinator's database does not answer: {why}") from error

    # Jobs and their rounds

    def add_job(self, job: Job) -> None:
        with self._writes() as session:
            session.add(job)

    def names(self) -> Sequence[str]:
        """Of all jobs, newest first."""
        with self._reads() as session:
            return session.scalars(select(Job.name).where(not_(Job.deleted)).order_by(Job.opened.desc())).all()

    def announced(self, name: str) -> Announced:
        """What clients are told of a job.

        Raises:
            NotFound: there is no such job.
        """
        if name in self._announced:
            return self._announced[name]
        with self._reads() as session:
            return self._known(session, name)

    def round(self, name: str) -> Round:
        """Raises NotFound when there is no such job."""
        with self._reads() as session:
            return self._round(session, name)

    def rounds(self) -> Mapping[str, Round]:
        """The rounds that time may change."""
        moving = [State.OPEN, State.PUBLISHING, State.PUBLISHED, State.FAILED]
        with self._reads() as session:
            names = session.scalars(select(Job.name).where(Job.state.in_(moving), not_(Job.deleted)))
            return {name: self._round(session, name) for name in names}

    def advance(
        self, name: str, happened: Event, now: float, request: pb.PublishRequest | None = None
    ) -> tuple[Round, Round]:
        """Apply an event to a job's round; returns the round before and after.

        A round that begins to publish gets the row of its next version, with what it is to be made of, together.
        """
        with self._writes() as session:
            before = self._round(session, name)
            after = rounds.apply(before, happened, now)
            if after == before:
                return before, after
            self._set_round(session, name, after)
            if before.state is State.PUBLISHING:
                session.execute(delete(Publication).where(Publication.job == name, Publication.publication.is_(None)))
            if after.state is State.PUBLISHING:
                by_hand = after.closed_at is not None or isinstance(happened, rounds.PublishByHand)
                self._begin_version(session, name, after, request, at_least=1 if by_hand else before.rules.min_clients)
            return before, after

    def mark_deleted(self, name: str) -> None:
        """From now on the job is not there; its files and rows go one after another.

        Raises:
            NotFound: there is no such job.
            Refused: it is at work.
        """
        with self._writes() as session:
            round = self._round(session, name)
            if round.state in (State.OPEN, State.PUBLISHING):
                raise Refused(f"job {name!r} is {round.state}", hint=f"coordinator cancel {name}")
            _job(session, name).deleted = True
        self._announced.pop(name, None)

    def deleted(self) -> Sequence[str]:
        """Jobs whose deletion has begun."""
        with self._reads() as session:
            return session.scalars(select(Job.name).where(Job.deleted)).all()

    def forget(self, name: str) -> None:
        """Drop every row of a deleted job."""
        with self._writes() as session:
            for table in (Publication, Contribution, Client):
                session.execute(delete(table).where(table.job == name))
            session.execute(delete(Job).where(Job.name == name, Job.deleted))

    def digests(self) -> set[str]:
        """Of all blobs that some row stands for."""
        with self._reads() as session:
            initial = {row.initial.digest for row in session.scalars(select(Job.job))}
            return initial | set(session.scalars(select(Contribution.digest)))

    # Clients

    def join(self, client: Client) -> Client:
        """The client's row: a new one with a fresh lease, or the one that is there, with name and machine renewed.

        Raises:
            NotEnough: the job has all the clients that it may have.
        """
        most = self.announced(client.job).job.spec.round.max_clients
        with self._writes() as session:
            there = session.get(Client, (client.job, client.client_id))
            if there is None:
                joined = session.scalar(select(func.count()).where(Client.job == client.job)) or 0
                if joined >= most:
                    raise NotEnough(f"job {client.job!r} has its {most} clients; the operator sets round.max_clients")
                client.lease = secrets.token_hex(32)
                session.add(client)
                return client
            there.name, there.machine, there.last_seen = client.name, client.machine, client.last_seen
            given = _contribution(session, client.job, client.client_id)
            there.withdrawn = there.withdrawn and given is not None
            return there

    def client(self, lease: str) -> Client:
        """Raises Denied when no client holds this lease."""
        with self._reads() as session:
            client = session.scalar(select(Client).where(Client.lease == lease))
            if client is None:
                raise Denied("this lease is not known here", hint="edge-client join again")
            return client

    def clients(self, job: str) -> Sequence[Client]:
        with self._reads() as session:
            return session.scalars(select(Client).where(Client.job == job).order_by(Client.client_id)).all()

    def note(self, progress: Iterable[Mapping[str, Any]]) -> None:
        """Write down how training goes; each has the client's `lease`, and the columns of the same names."""
        if rows := [{f"_{name}": value for name, value in noted.items()} for noted in progress]:
            columns: dict[str, Any] = {name[1:]: bindparam(name) for name in rows[0] if name != "_lease"}
            query = update(Client.__table__).where(Client.lease == bindparam("_lease")).values(columns)  # type: ignore[arg-type]
            with self._writes() as session:
                session.connection().execute(query, rows)

    def withdraw(self, client: Client) -> None:
        """A client leaves; what it contributed takes no part in the versions to come."""
        with self._writes() as session:
            session.get_one(Client, (client.job, client.client_id)).withdrawn = True
            given = _contribution(session, client.job, client.client_id)
            if given is not None and given.by_hand != "exclude":
                _judge(given, "exclude", "withdrawn by its client")

    # Contributions

    def contribute(self, contribution: Contribution) -> Contribution:
        """Commit a contribution, and return the one that stands: this one, or the one that was there already.

        One that comes when the round takes no more is kept, and takes no part unless the operator admits it.
        """
        with self._writes() as session:
            _job(session, contribution.job)
            there = _contribution(session, contribution.job, contribution.client_id)
            if there is not None:
                if not there.may_replace or there.digest == contribution.digest:
                    return there
                there.replaced, there.may_replace = True, False
                contribution.revision = there.revision + 1
            session.add(contribution)
            return contribution

    def contribution(self, job: str, client_id: str) -> Contribution | None:
        with self._reads() as session:
            return _contribution(session, job, client_id)

    def contributions(self, job: str) -> Sequence[Contribution]:
        """Those that stand."""
        with self._reads() as session:
            query = select(Contribution).where(Contribution.job == job, not_(Contribution.replaced))
            return session.scalars(query.order_by(Contribution.received, Contribution.client_id)).all()

    def bytes_of(self, job: str) -> int:
        """Of all contributions to a job, replaced ones too."""
        with self._reads() as session:
            return session.scalar(select(func.sum(Contribution.size)).where(Contribution.job == job)) or 0

    def pending(self) -> Sequence[Contribution]:
        """Those that nobody has looked at yet, oldest first."""
        with self._reads() as session:
            query = select(Contribution).where(Contribution.standing == "pending").order_by(Contribution.received)
            return session.scalars(query).all()

    def stand(self, contribution: Contribution, unsound: str, now: float) -> Contribution:
        """Note what was found of a contribution by itself: why it is unsound, or nothing."""
        with self._writes() as session:
            row = session.get_one(Contribution, (contribution.job, contribution.client_id, contribution.revision))
            if row.standing != "pending":
                return row
            round = self._round(session, row.job, counted=False)
            row.standing = "sound"
            verdict, reason = "admitted", ""
            if unsound:
                row.standing, verdict, reason = "unsound", "quarantined", unsound
            elif not rounds.takes_contributions(round, row.received):
                row.standing, verdict = "late", "quarantined"
                reason = f"it came in after the round had closed ({round.reason})"
            if row.by_hand == "":
                row.verdict, row.reason = verdict, reason
            return row

    def judge(self, job: str, client_id: str, decision: str, why: str) -> Contribution:
        """The operator's decision: `admit`, `exclude` or `replace`.

        Raises:
            Refused: there is nothing to judge, or what is there cannot take part.
        """
        with self._writes() as session:
            row = _contribution(session, job, client_id)
            if row is None:
                raise Refused("this client has not contributed yet")
            if decision == "admit" and row.standing in ("pending", "unsound"):
                raise Refused(f"this contribution cannot take part: {row.reason or 'it is still being looked at'}")
            if decision == "replace":
                row.may_replace = True
            else:
                _judge(row, decision, f"by the operator: {why}" if why else "by the operator")
            return row

    def counts(self, job: str) -> Counts:
        with self._reads() as session:
            given = select(func.count()).where(Contribution.job == job, not_(Contribution.replaced))
            return Counts(
                joined=session.scalar(select(func.count()).where(Client.job == job)) or 0,
                contributed=session.scalar(given) or 0,
                admitted=session.scalar(given.where(_TAKES_PART)) or 0,
            )

    # Publications

    def in_making(self, job: str) -> tuple[Publication, Sequence[Contribution]] | None:
        """The version that is being made, and the contributions that it is made of, in an order that does not depend on
        who came first, so that a publication made again is the same."""
        with self._reads() as session:
            query = select(Publication).where(Publication.job == job, Publication.publication.is_(None))
            row = session.scalar(query)
            if row is None:
                return None
            given = select(Contribution).where(
                Contribution.job == job, Contribution.considered == row.version, _CANDIDATE
            )
            return row, session.scalars(given.order_by(Contribution.client_id)).all()

    def publish(
        self, job: str, publication: pb.Publication, findings: Mapping[str, tuple[str, str]], now: float
    ) -> tuple[Round, Round]:
        """A version, what its cohort made of each contribution (client id to verdict and reason), and the round's new
        state, together."""
        with self._writes() as session:
            before = self._round(session, job)
            after = rounds.apply(before, rounds.Published(), now)
            row = session.get(Publication, (job, publication.version))
            if row is None or row.publication is not None:
                return before, before
            row.publication = publication
            for given in session.scalars(
                select(Contribution).where(Contribution.job == job, Contribution.considered == publication.version)
            ):
                if given.client_id in findings and given.by_hand == "":
                    given.verdict, given.reason = findings[given.client_id]
            self._set_round(session, job, after)
            return before, after

    def publications(self, job: str) -> Sequence[pb.Publication]:
        """Those that are made, oldest first."""
        with self._reads() as session:
            query = select(Publication.publication).where(Publication.job == job, Publication.publication.is_not(None))
            return [found for found in session.scalars(query.order_by(Publication.version)) if found is not None]

    def versions(self, job: str) -> Collection[int]:
        """Of all publications, the one in the making too."""
        with self._reads() as session:
            return set(session.scalars(select(Publication.version).where(Publication.job == job)))

    # Within a transaction

    def _known(self, session: Session, name: str) -> Announced:
        found = self._announced.get(name)
        if found is None:
            row = _job(session, name)
            found = self._announced[name] = Announced(row.job, row.base_folder, row.opened, _rules(row.job))
        return found

    def _round(self, session: Session, name: str, *, counted: bool = True) -> Round:
        """A job's round; without `counted` only what says whether contributions are taken."""
        job, rules = _job(session, name), self._known(session, name).rules
        bare = Round(rules, State(job.state), job.reason, job.closed_at, tried_at=job.tried_at)
        if not counted:
            return bare
        pending, admitted, fresh = session.execute(
            select(
                func.count(case((Contribution.standing == "pending", 1))),
                func.count(case((_TAKES_PART, 1))),
                func.count(case((_FRESH, 1))),
            ).where(Contribution.job == name)
        ).one()
        quorum_at = None
        if rules.grace is not None and admitted >= rules.min_clients:
            received = select(Contribution.received).where(Contribution.job == name, _TAKES_PART)
            quorum_at = session.scalar(received.order_by(Contribution.received).offset(rules.min_clients - 1).limit(1))
        version = session.scalar(
            select(func.max(Publication.version)).where(Publication.job == name, Publication.publication.is_not(None))
        )
        return replace(bare, pending=pending, admitted=admitted, fresh=fresh, quorum_at=quorum_at, version=version or 0)

    def _set_round(self, session: Session, name: str, round: Round) -> None:
        job = _job(session, name)
        job.state, job.reason = round.state.value, round.reason
        job.closed_at, job.tried_at = round.closed_at, round.tried_at

    def _begin_version(
        self, session: Session, name: str, round: Round, request: pb.PublishRequest | None, at_least: int
    ) -> None:
        version = round.version + 1
        spec = self._known(session, name).job.spec
        asked = pb.PublishRequest(
            job=name, aggregate=spec.aggregate, adapter_rank=spec.publish.adapter_rank, reason=round.reason
        )
        if request is not None:
            asked.MergeFrom(request)
        session.add(Publication(job=name, version=version, request=asked, at_least=at_least))
        session.execute(
            update(Contribution)
            .where(Contribution.job == name, Contribution.standing != "pending", not_(Contribution.replaced))
            .values(considered=version)
        )


def client(job: str, client_id: str, name: str, machine: pb.Machine, now: float) -> Client:
    """The row of a client that joins now; its lease is given by `join`."""
    return Client(
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


def contribution(client: Client, declaration: pb.Declaration, now: float) -> Contribution:
    """The row of a contribution that nobody has looked at yet."""
    return Contribution(
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


def conflict(given: Contribution) -> Conflict:
    """What a client hears that sends another contribution than the one that is in."""
    return Conflict(
        f"this client's contribution to {given.job!r} is in already, and it is another one",
        hint=f"ask the operator for `coordinator replace {given.job} CLIENT`",
    )


def _rules(job: pb.Job) -> Rules:
    said = job.spec.round
    return Rules(
        min_clients=said.min_clients,
        target_clients=said.target_clients,
        deadline=job.deadline_unix,
        grace=jobs.seconds(said.grace) if said.grace else None,
        renew_every=jobs.seconds(said.renew_every) if said.renew_every else None,
    )


def _job(session: Session, name: str) -> Job:
    job = session.get(Job, name)
    if job is None or job.deleted:
        raise NotFound(f"there is no job {name!r} here")
    return job


def _contribution(session: Session, job: str, client_id: str) -> Contribution | None:
    return session.scalar(
        select(Contribution).where(
            Contribution.job == job, Contribution.client_id == client_id, not_(Contribution.replaced)
        )
    )


def _judge(row: Contribution, decision: str, reason: str) -> None:
    row.by_hand, row.considered = decision, 0
    row.verdict = "admitted" if decision == "admit" else "quarantined"
    row.reason = f"{'admitted' if decision == 'admit' else 'excluded'} {reason}"
