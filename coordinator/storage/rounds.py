"""A job's round in SQL: read from the rows that it is made of, and written to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import and_, case, func, not_, or_, select, update
from sqlalchemy.orm import Session

from coordinator.round import Round, Rules, State
from coordinator.storage.schema import Contribution, Job, Publication
from oneround.errors import NotFound
from oneround.rules import seconds
from oneround.v1 import federation_pb2 as pb

TAKES_PART = and_(not_(Contribution.replaced), Contribution.verdict.in_(["admitted", "clipped"]))
# What a new version looks at: sound by itself, whatever an earlier cohort made of it, and the operator's own.
CANDIDATE = and_(
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
class JobRecord:
    """What never changes of a job."""

    job: pb.Job
    base_folder: str
    opened: float
    rules: Rules


def read(session: Session, announced: JobRecord, *, counted: bool = True) -> Round:
    """A job's round; without `counted` only what says whether contributions are taken."""
    rules, name = announced.rules, announced.job.spec.name
    row = job(session, name)
    bare = Round(rules, State(row.state), row.reason, row.closed_at, tried_at=row.tried_at)
    if not counted:
        return bare
    pending, admitted, fresh = session.execute(
        select(
            func.count(case((Contribution.standing == "pending", 1))),
            func.count(case((TAKES_PART, 1))),
            func.count(case((_FRESH, 1))),
        ).where(Contribution.job == name)
    ).one()
    quorum_at = None
    if rules.grace is not None and admitted >= rules.min_clients:
        received = select(Contribution.received).where(Contribution.job == name, TAKES_PART)
        quorum_at = session.scalar(received.order_by(Contribution.received).offset(rules.min_clients - 1).limit(1))
    version = session.scalar(
        select(func.max(Publication.version)).where(Publication.job == name, Publication.publication.is_not(None))
    )
    return replace(bare, pending=pending, admitted=admitted, fresh=fresh, quorum_at=quorum_at, version=version or 0)


def write(session: Session, name: str, round: Round) -> None:
    """What a round keeps by itself; the rest of it follows from contributions and publications."""
    row = job(session, name)
    row.state, row.reason = round.state.value, round.reason
    row.closed_at, row.tried_at = round.closed_at, round.tried_at


def begin_version(
    session: Session, announced: JobRecord, round: Round, request: pb.PublishRequest | None, at_least: int
) -> None:
    """The row of the next version, and a note on each contribution that it is made of."""
    spec, version = announced.job.spec, round.version + 1
    merged = pb.PublishRequest(
        job=spec.name, aggregate=spec.aggregate, adapter_rank=spec.publish.adapter_rank, reason=round.reason
    )
    if request is not None:
        merged.MergeFrom(request)
    session.add(Publication(job=spec.name, version=version, request=merged, at_least=at_least))
    session.execute(
        update(Contribution)
        .where(Contribution.job == spec.name, Contribution.standing != "pending", not_(Contribution.replaced))
        .values(considered=version)
    )


def rules(job: pb.Job) -> Rules:
    """What the job file says of the round."""
    spec = job.spec.round
    return Rules(
        min_clients=spec.min_clients,
        target_clients=spec.target_clients,
        deadline=job.deadline_unix,
        grace=seconds(spec.grace) if spec.grace else None,
        renew_every=seconds(spec.renew_every) if spec.renew_every else None,
    )


def job(session: Session, name: str) -> Job:
    """Raises NotFound when there is no such job, or it is being deleted."""
    row = session.get(Job, name)
    if row is None or row.deleted:
        raise NotFound(f"there is no job {name!r} here")
    return row
