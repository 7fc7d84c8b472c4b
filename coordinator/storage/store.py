"""What the coordinator knows, in SQL. Every public method is one transaction, committed when it returns; what it
changes and the events that tell of it are committed together."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, bindparam, delete, func, not_, select, update
from sqlalchemy.orm import Session

from coordinator import round as rounds
from coordinator.events import of_transition
from coordinator.round import Round, State, Trigger
from coordinator.storage import contributions, events, migrations
from coordinator.storage import rounds as round_rows
from coordinator.storage.contributions import standing
from coordinator.storage.database import Database
from coordinator.storage.events import NewEvent
from coordinator.storage.rounds import CANDIDATE, JobRecord
from coordinator.storage.schema import Client, Contribution, Evaluation, Job, Publication, RecordedEvent
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
            events.record(session, job.name, NewEvent(pb.Event(round_opened=pb.RoundOpened()), job.opened))

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
            return self._record(session, name)

    def round(self, name: str) -> Round:
        """Raises NotFound when there is no such job."""
        with self.database.reads() as session:
            return round_rows.read(session, self._record(session, name))

    def rounds(self) -> Mapping[str, Round]:
        """The rounds that time may change."""
        moving = [State.OPEN, State.PUBLISHING, State.PUBLISHED, State.FAILED]
        with self.database.reads() as session:
            names = session.scalars(select(Job.name).where(Job.state.in_(moving), not_(Job.deleted)))
            return {name: round_rows.read(session, self._record(session, name)) for name in names}

    def advance(
        self, name: str, trigger: Trigger, now: float, request: pb.PublishRequest | None = None
    ) -> tuple[Round, Round]:
        """Apply a trigger to a job's round; returns the round before and after.

        A round that begins to publish gets the row of its next version, with what it is to be made of, together.
        """
        with self.database.writes() as session:
            before = round_rows.read(session, self._record(session, name))
            after = rounds.apply(before, trigger, now)
            if after == before:
                return before, after
            round_rows.write(session, name, after)
            events.record(session, name, *(NewEvent(event, now) for event in of_transition(before, trigger, after)))
            if before.state is State.PUBLISHING:
                session.execute(delete(Publication).where(Publication.job == name, Publication.publication.is_(None)))
            if after.state is State.PUBLISHING:
                by_hand = after.closed_at is not None or isinstance(trigger, rounds.PublishByHand)
                at_least = 1 if by_hand else before.rules.min_clients
                round_rows.begin_version(session, self._record(session, name), after, request, at_least)
            return before, after

    def mark_deleted(self, name: str) -> None:
        """From now on the job is not there; its files and rows go one after another.

        Raises:
            NotFound: there is no such job.
            Refused: it is at work.
        """
        with self.database.writes() as session:
            round = round_rows.read(session, self._record(session, name))
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
            for table in (RecordedEvent, Evaluation, Publication, Contribution, Client):
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
            row = session.get(Client, (client.job, client.client_id))
            if row is None:
                joined = session.scalar(select(func.count()).where(Client.job == client.job)) or 0
                if joined >= most:
                    raise NotEnough(f"job {client.job!r} has its {most} clients; the operator sets round.max_clients")
                client.lease = secrets.token_hex(32)
                session.add(client)
                event = pb.Event(joined=pb.Joined(machine=client.machine))
                events.record(session, client.job, NewEvent(event, client.last_seen, client.client_id))
                return client
            row.name, row.machine, row.last_seen = client.name, client.machine, client.last_seen
            contribution = standing(session, client.job, client.client_id)
            row.withdrawn = row.withdrawn and contribution is not None
            return row

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

    def record_progress(
        self, progress: Iterable[Mapping[str, Any]], happened: Mapping[str, Sequence[NewEvent]]
    ) -> None:
        """Write down how training goes: each has the client's `lease`, and the columns of the same names. What happened
        to clients goes along, by job."""
        rows = [{f"_{name}": value for name, value in row.items()} for row in progress]
        if not rows:
            return
        columns: dict[str, Any] = {name[1:]: bindparam(name) for name in rows[0] if name != "_lease"}
        query = update(Client.__table__).where(Client.lease == bindparam("_lease")).values(columns)  # type: ignore[arg-type]
        with self.database.writes() as session:
            session.connection().execute(query, rows)
            for job, new in happened.items():
                if session.get(Job, job) is not None:  # a job may be deleted since its clients were heard of
                    events.record(session, job, *new)

    def withdraw(self, client: Client, now: float, before: Sequence[NewEvent] = ()) -> None:
        """A client leaves; what it contributed takes no part in the versions to come. What happened to it `before` goes
        along."""
        with self.database.writes() as session:
            row = session.get_one(Client, (client.job, client.client_id))
            contribution = standing(session, client.job, client.client_id)
            excludes = contribution is not None and contribution.by_hand != "exclude"
            if excludes or not row.withdrawn:
                revision = contribution.revision if contribution is not None else 0
                event = pb.Event(withdrawn=pb.Withdrawn(revision=revision))
                events.record(session, client.job, *before, NewEvent(event, now, client.client_id))
            row.withdrawn = True
            if contribution is not None and excludes:
                contributions.set_by_hand(contribution, "exclude", "withdrawn by its client")

    # Contributions

    def contribute(self, contribution: Contribution, before: Sequence[NewEvent] = ()) -> Contribution:
        """Commit a contribution, and return the one that stands: this one, or the one that was stored already. What
        happened to its client `before` goes along.

        One that comes when the round takes no more is kept, and takes no part unless the operator admits it.
        """
        with self.database.writes() as session:
            round_rows.job(session, contribution.job)
            stored = contributions.add(session, contribution)
            if stored is contribution:
                events.record(session, contribution.job, *before, contributions.received(contribution))
            return stored

    def contribution(self, job: str, client_id: str) -> Contribution | None:
        """The one of a client that stands."""
        with self.database.reads() as session:
            return standing(session, job, client_id)

    def contributions(self, job: str) -> Sequence[Contribution]:
        """Those that stand."""
        with self.database.reads() as session:
            return contributions.all_standing(session, job)

    def bytes_of(self, job: str) -> int:
        """Of all contributions to a job, replaced ones too."""
        with self.database.reads() as session:
            return session.scalar(select(func.sum(Contribution.size)).where(Contribution.job == job)) or 0

    def pending(self) -> Sequence[Contribution]:
        """Those that nobody has looked at yet, oldest first."""
        with self.database.reads() as session:
            query = select(Contribution).where(Contribution.standing == "pending").order_by(Contribution.received)
            return session.scalars(query).all()

    def record_soundness(self, contribution: Contribution, unsound: str, now: float) -> Contribution:
        """Write down why a contribution is unsound by itself, or, if empty, that it is sound."""
        with self.database.writes() as session:
            row = session.get_one(Contribution, (contribution.job, contribution.client_id, contribution.revision))
            if row.standing != "pending":
                return row
            announced = self._record(session, row.job)
            contributions.set_soundness(row, unsound, round_rows.read(session, announced, counted=False))
            events.record(session, row.job, contributions.judged(row, now))
            self._record_quorum(session, row.job, now)
            return row

    def decide(self, job: str, client_id: str, request: pb.JudgeRequest, now: float) -> Contribution:
        """Commit the operator's decision about a client's contribution.

        Raises:
            Refused: there is nothing to decide about, or the contribution cannot take part.
        """
        with self.database.writes() as session:
            row = contributions.decide(standing(session, job, client_id), request.decision, request.why)
            event = pb.Event(decided_by_hand=pb.DecidedByHand(decision=request.decision, why=request.why))
            events.record(session, job, NewEvent(event, now, client_id))
            self._record_quorum(session, job, now)
            return row

    def counts(self, job: str) -> Counts:
        with self.database.reads() as session:
            contributed = select(func.count()).where(Contribution.job == job, not_(Contribution.replaced))
            return Counts(
                joined=session.scalar(select(func.count()).where(Client.job == job)) or 0,
                contributed=session.scalar(contributed) or 0,
                admitted=contributions.taking_part(session, job),
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
            candidates = select(Contribution).where(
                Contribution.job == job, Contribution.considered == row.version, CANDIDATE
            )
            return row, session.scalars(candidates.order_by(Contribution.client_id)).all()

    def publish(
        self, job: str, publication: pb.Publication, findings: Mapping[str, tuple[str, str]], now: float
    ) -> tuple[Round, Round]:
        """A version, what its cohort made of each contribution (client id to verdict and reason), and the round's new
        state, together."""
        with self.database.writes() as session:
            before = round_rows.read(session, self._record(session, job))
            after = rounds.apply(before, rounds.Published(), now)
            row = session.get(Publication, (job, publication.version))
            if row is None or row.publication is not None:
                return before, before
            row.publication = publication
            judged = contributions.set_verdicts(session, job, publication.version, findings, now)
            published = pb.VersionPublished(version=publication.version, contributions=publication.contributions)
            events.record(session, job, *judged, NewEvent(pb.Event(version_published=published), now))
            round_rows.write(session, job, after)
            return before, after

    def record_delay(self, job: str, reason: str, now: float) -> None:
        """Write down what holds up the version that is being made."""
        with self.database.writes() as session:
            unmade = Publication.job == job, Publication.publication.is_(None)
            version = session.scalar(select(Publication.version).where(*unmade))
            if version is not None:
                delayed = pb.VersionDelayed(version=version, reason=reason)
                events.record(session, job, NewEvent(pb.Event(version_delayed=delayed), now))

    def publications(self, job: str) -> Sequence[pb.Publication]:
        """Those that are made, oldest first."""
        with self.database.reads() as session:
            query = select(Publication.publication).where(Publication.job == job, Publication.publication.is_not(None))
            return [
                publication
                for publication in session.scalars(query.order_by(Publication.version))
                if publication is not None
            ]

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
            row = session.get(Publication, (client.job, evaluation.version))
            if row is None or row.publication is None:
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
            event = pb.Event(evaluation_reported=pb.EvaluationReported(version=evaluation.version))
            events.record(session, client.job, NewEvent(event, now, client.client_id))

    def evaluations(self, job: str) -> Mapping[str, Sequence[pb.Evaluation]]:
        """By client id, oldest version first."""
        by_client: dict[str, list[pb.Evaluation]] = {}
        with self.database.reads() as session:
            for row in session.scalars(select(Evaluation).where(Evaluation.job == job).order_by(Evaluation.version)):
                by_client.setdefault(row.client_id, []).append(row.evaluation)
        return by_client

    # What happened

    def events(self, job: str, *, after: int = 0, limit: int = 1000) -> list[pb.Event]:
        """So many of a job's events that follow number `after`, oldest first."""
        with self.database.reads() as session:
            return events.read(session, job, after, limit)

    def newest_events(self, job: str, limit: int) -> list[pb.Event]:
        """A job's last so many events, oldest first."""
        with self.database.reads() as session:
            return events.newest(session, job, limit)

    def event_counts(self) -> Mapping[tuple[str, str], int]:
        """How many events of each kind each job has had, by job and kind."""
        with self.database.reads() as session:
            return events.counts(session)

    def _record_quorum(self, session: Session, job: str, now: float) -> None:
        """Record that the quorum is reached, once it is."""
        taking_part = contributions.taking_part(session, job)
        if taking_part >= self._record(session, job).rules.min_clients:
            reached = pb.Event(quorum_reached=pb.QuorumReached(contributions=taking_part))
            events.record(session, job, NewEvent(reached, now))

    def _record(self, session: Session, name: str) -> JobRecord:
        if name not in self._announced:
            row = round_rows.job(session, name)
            self._announced[name] = JobRecord(row.job, row.base_folder, row.opened, round_rows.rules(row.job))
        return self._announced[name]
