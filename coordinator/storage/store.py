"""What the coordinator knows, in SQL. Every public method is one transaction, committed when it returns."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, bindparam, delete, func, not_, select, update
from sqlalchemy.orm import Session

from coordinator import round as rounds
from coordinator.round import Event, Round, State
from coordinator.storage import migrations
from coordinator.storage import rounds as round_rows
from coordinator.storage.database import Database
from coordinator.storage.rounds import CANDIDATE, TAKES_PART, JobRecord
from coordinator.storage.schema import Client, Contribution, Evaluation, Job, Publication
from oneround.errors import Denied, NotEnough, NotFound, Refused
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Counts:
    """How many joined, contributed and take part."""

    joined: int
    contributed: int
    admitted: int


class Store:
    """The coordinator's memory."""

    def __init__(self, url: str | URL) -> None:
        self.database = Database(url)
        self._announced: dict[str, JobRecord] = {}
        with self.database.writes() as session:
            migrations.upgrade(session.connection())

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()

    # Jobs and their rounds

    def add_job(self, job: Job) -> None:
        with self.database.writes() as session:
            session.add(job)

    def names(self) -> Sequence[str]:
        """Of all jobs, newest first."""
        with self.database.reads() as session:
            return session.scalars(select(Job.name).where(not_(Job.deleted)).order_by(Job.opened.desc())).all()

    def announced(self, name: str) -> JobRecord:
        """What clients are told of a job.

        Raises:
            NotFound: there is no such job.
        """
        if name in self._announced:
            return self._announced[name]
        with self.database.reads() as session:
            return self._known(session, name)

    def round(self, name: str) -> Round:
        """Raises NotFound when there is no such job."""
        with self.database.reads() as session:
            return round_rows.read(session, self._known(session, name))

    def rounds(self) -> Mapping[str, Round]:
        """The rounds that time may change."""
        moving = [State.OPEN, State.PUBLISHING, State.PUBLISHED, State.FAILED]
        with self.database.reads() as session:
            names = session.scalars(select(Job.name).where(Job.state.in_(moving), not_(Job.deleted)))
            return {name: round_rows.read(session, self._known(session, name)) for name in names}

    def advance(
        self, name: str, happened: Event, now: float, request: pb.PublishRequest | None = None
    ) -> tuple[Round, Round]:
        """Apply an event to a job's round; returns the round before and after.

        A round that begins to publish gets the row of its next version, with what it is to be made of, together.
        """
        with self.database.writes() as session:
            before = round_rows.read(session, self._known(session, name))
            after = rounds.apply(before, happened, now)
            if after == before:
                return before, after
            round_rows.write(session, name, after)
            if before.state is State.PUBLISHING:
                session.execute(delete(Publication).where(Publication.job == name, Publication.publication.is_(None)))
            if after.state is State.PUBLISHING:
                by_hand = after.closed_at is not None or isinstance(happened, rounds.PublishByHand)
                at_least = 1 if by_hand else before.rules.min_clients
                round_rows.begin_version(session, self._known(session, name), after, request, at_least)
            return before, after

    def mark_deleted(self, name: str) -> None:
        """From now on the job is not there; its files and rows go one after another.

        Raises:
            NotFound: there is no such job.
            Refused: it is at work.
        """
        with self.database.writes() as session:
            round = round_rows.read(session, self._known(session, name))
            if round.state in (State.OPEN, State.PUBLISHING):
                raise Refused(f"job {name!r} is {round.state}", hint=f"coordinator cancel {name}")
            round_rows.job(session, name).deleted = True
        self._announced.pop(name, None)

    def deleted(self) -> Sequence[str]:
        """Jobs whose deletion has begun."""
        with self.database.reads() as session:
            return session.scalars(select(Job.name).where(Job.deleted)).all()

    def forget(self, name: str) -> None:
        """Drop every row of a deleted job."""
        with self.database.writes() as session:
            for table in (Evaluation, Publication, Contribution, Client):
                session.execute(delete(table).where(table.job == name))
            session.execute(delete(Job).where(Job.name == name, Job.deleted))

    def digests(self) -> set[str]:
        """Of all blobs that some row stands for."""
        with self.database.reads() as session:
            initial = {row.initial.digest for row in session.scalars(select(Job.job))}
            return initial | set(session.scalars(select(Contribution.digest)))

    # Clients

    def join(self, client: Client) -> Client:
        """The client's row: a new one with a fresh lease, or the one that is there, with name and machine renewed.

        Raises:
            NotEnough: the job has all the clients that it may have.
        """
        most = self.announced(client.job).job.spec.round.max_clients
        with self.database.writes() as session:
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
        with self.database.reads() as session:
            client = session.scalar(select(Client).where(Client.lease == lease))
            if client is None:
                raise Denied("this lease is not known here", hint="edge-client join again")
            return client

    def clients(self, job: str) -> Sequence[Client]:
        with self.database.reads() as session:
            return session.scalars(select(Client).where(Client.job == job).order_by(Client.client_id)).all()

    def note(self, progress: Iterable[Mapping[str, Any]]) -> None:
        """Write down how training goes; each has the client's `lease`, and the columns of the same names."""
        if rows := [{f"_{name}": value for name, value in noted.items()} for noted in progress]:
            columns: dict[str, Any] = {name[1:]: bindparam(name) for name in rows[0] if name != "_lease"}
            query = update(Client.__table__).where(Client.lease == bindparam("_lease")).values(columns)  # type: ignore[arg-type]
            with self.database.writes() as session:
                session.connection().execute(query, rows)

    def withdraw(self, client: Client) -> None:
        """A client leaves; what it contributed takes no part in the versions to come."""
        with self.database.writes() as session:
            session.get_one(Client, (client.job, client.client_id)).withdrawn = True
            given = _contribution(session, client.job, client.client_id)
            if given is not None and given.by_hand != "exclude":
                _judge(given, "exclude", "withdrawn by its client")

    # Contributions

    def contribute(self, contribution: Contribution) -> Contribution:
        """Commit a contribution, and return the one that stands: this one, or the one that was there already.

        One that comes when the round takes no more is kept, and takes no part unless the operator admits it.
        """
        with self.database.writes() as session:
            round_rows.job(session, contribution.job)
            there = _contribution(session, contribution.job, contribution.client_id)
            if there is not None:
                if not there.may_replace or there.digest == contribution.digest:
                    return there
                there.replaced, there.may_replace = True, False
                contribution.revision = there.revision + 1
            session.add(contribution)
            return contribution

    def contribution(self, job: str, client_id: str) -> Contribution | None:
        with self.database.reads() as session:
            return _contribution(session, job, client_id)

    def contributions(self, job: str) -> Sequence[Contribution]:
        """Those that stand."""
        with self.database.reads() as session:
            query = select(Contribution).where(Contribution.job == job, not_(Contribution.replaced))
            return session.scalars(query.order_by(Contribution.received, Contribution.client_id)).all()

    def bytes_of(self, job: str) -> int:
        """Of all contributions to a job, replaced ones too."""
        with self.database.reads() as session:
            return session.scalar(select(func.sum(Contribution.size)).where(Contribution.job == job)) or 0

    def pending(self) -> Sequence[Contribution]:
        """Those that nobody has looked at yet, oldest first."""
        with self.database.reads() as session:
            query = select(Contribution).where(Contribution.standing == "pending").order_by(Contribution.received)
            return session.scalars(query).all()

    def stand(self, contribution: Contribution, unsound: str, now: float) -> Contribution:
        """Note what was found of a contribution by itself: why it is unsound, or nothing."""
        with self.database.writes() as session:
            row = session.get_one(Contribution, (contribution.job, contribution.client_id, contribution.revision))
            if row.standing != "pending":
                return row
            round = round_rows.read(session, self._known(session, row.job), counted=False)
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
        with self.database.writes() as session:
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
        with self.database.reads() as session:
            given = select(func.count()).where(Contribution.job == job, not_(Contribution.replaced))
            return Counts(
                joined=session.scalar(select(func.count()).where(Client.job == job)) or 0,
                contributed=session.scalar(given) or 0,
                admitted=session.scalar(given.where(TAKES_PART)) or 0,
            )

    # Publications

    def in_making(self, job: str) -> tuple[Publication, Sequence[Contribution]] | None:
        """The version that is being made, and the contributions that it is made of, in an order that does not depend on
        who came first, so that a publication made again is the same."""
        with self.database.reads() as session:
            query = select(Publication).where(Publication.job == job, Publication.publication.is_(None))
            row = session.scalar(query)
            if row is None:
                return None
            given = select(Contribution).where(
                Contribution.job == job, Contribution.considered == row.version, CANDIDATE
            )
            return row, session.scalars(given.order_by(Contribution.client_id)).all()

    def publish(
        self, job: str, publication: pb.Publication, findings: Mapping[str, tuple[str, str]], now: float
    ) -> tuple[Round, Round]:
        """A version, what its cohort made of each contribution (client id to verdict and reason), and the round's new
        state, together."""
        with self.database.writes() as session:
            before = round_rows.read(session, self._known(session, job))
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
            round_rows.write(session, job, after)
            return before, after

    def publications(self, job: str) -> Sequence[pb.Publication]:
        """Those that are made, oldest first."""
        with self.database.reads() as session:
            query = select(Publication.publication).where(Publication.job == job, Publication.publication.is_not(None))
            return [found for found in session.scalars(query.order_by(Publication.version)) if found is not None]

    def versions(self, job: str) -> Collection[int]:
        """Of all publications, the one in the making too."""
        with self.database.reads() as session:
            return set(session.scalars(select(Publication.version).where(Publication.job == job)))

    # What clients find of publications

    def report(self, client: Client, evaluation: pb.Evaluation, now: float) -> None:
        """Keep a client's evaluation of a version, in place of what it said of that version before.

        Raises:
            NotFound: there is no such version.
        """
        with self.database.writes() as session:
            round_rows.job(session, client.job)
            made = session.get(Publication, (client.job, evaluation.version))
            if made is None or made.publication is None:
                raise NotFound(f"job {client.job!r} has no version {evaluation.version}")
            session.merge(
                Evaluation(
                    job=client.job,
                    client_id=client.client_id,
                    version=evaluation.version,
                    evaluation=evaluation,
                    received=now,
                )
            )

    def evaluations(self, job: str) -> Mapping[str, Sequence[pb.Evaluation]]:
        """By client id, oldest version first."""
        found: dict[str, list[pb.Evaluation]] = {}
        with self.database.reads() as session:
            for row in session.scalars(select(Evaluation).where(Evaluation.job == job).order_by(Evaluation.version)):
                found.setdefault(row.client_id, []).append(row.evaluation)
        return found

    def _known(self, session: Session, name: str) -> JobRecord:
        if name not in self._announced:
            row = round_rows.job(session, name)
            self._announced[name] = JobRecord(row.job, row.base_folder, row.opened, round_rows.rules(row.job))
        return self._announced[name]


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
