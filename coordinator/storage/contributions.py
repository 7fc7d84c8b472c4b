"""Contributions in SQL: the steps of the store's transactions that are about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func, not_, select
from sqlalchemy.orm import Session

from coordinator import round as rounds
from coordinator.round import Round
from coordinator.storage.events import NewEvent
from coordinator.storage.rounds import TAKES_PART
from coordinator.storage.schema import Contribution
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb


def standing(session: Session, job: str, client_id: str) -> Contribution | None:
    """A client's contribution that no later one has replaced."""
    return session.scalar(
        select(Contribution).where(
            Contribution.job == job, Contribution.client_id == client_id, not_(Contribution.replaced)
        )
    )


def all_standing(session: Session, job: str) -> Sequence[Contribution]:
    query = select(Contribution).where(Contribution.job == job, not_(Contribution.replaced))
    return session.scalars(query.order_by(Contribution.received, Contribution.client_id)).all()


def taking_part(session: Session, job: str) -> int:
    """How many contributions of a job take part as they stand."""
    return session.scalar(select(func.count()).where(Contribution.job == job, TAKES_PART)) or 0


def add(session: Session, contribution: Contribution) -> Contribution:
    """Add a contribution, and return the one that stands: this one, or the one that was stored already."""
    earlier = standing(session, contribution.job, contribution.client_id)
    if earlier is not None:
        if not earlier.may_replace or earlier.digest == contribution.digest:
            return earlier
        earlier.replaced, earlier.may_replace = True, False
        contribution.revision = earlier.revision + 1
    session.add(contribution)
    return contribution


def set_soundness(row: Contribution, unsound: str, round: Round) -> None:
    """Take down why a contribution is unsound by itself, or, if empty, that it is sound. It is late when the round had
    closed before it came."""
    row.standing = "sound"
    verdict, reason = "admitted", ""
    if unsound:
        row.standing, verdict, reason = "unsound", "quarantined", unsound
    elif not rounds.takes_contributions(round, row.received):
        row.standing, verdict = "late", "quarantined"
        reason = f"it came in after the round had closed ({round.reason})"
    if row.by_hand == "":
        row.verdict, row.reason = verdict, reason


def set_verdicts(
    session: Session, job: str, version: int, verdicts: Mapping[str, tuple[str, str]], now: float
) -> list[NewEvent]:
    """Take down what the cohort of a version makes of its contributions: verdict and reason by client id. The
    operator's decisions stay. Returns what changed."""
    changed = []
    considered = select(Contribution).where(Contribution.job == job, Contribution.considered == version)
    for row in session.scalars(considered.order_by(Contribution.client_id)):
        verdict = verdicts.get(row.client_id)
        if verdict is None or row.by_hand or verdict == (row.verdict, row.reason):
            continue
        row.verdict, row.reason = verdict
        changed.append(judged(row, now, version))
    return changed


def decide(row: Contribution | None, decision: pb.Decision.ValueType, why: str) -> Contribution:
    """Take down the operator's decision.

    Raises:
        Refused: there is nothing to decide about, or the contribution cannot take part.
    """
    if row is None:
        raise Refused("this client has not contributed yet")
    if decision == pb.DECISION_ADMIT and row.standing in ("pending", "unsound"):
        raise Refused(f"this contribution cannot take part: {row.reason or 'its check is not finished'}")
    if decision == pb.DECISION_LET_REPLACE:
        row.may_replace = True
    else:
        by_hand = "admit" if decision == pb.DECISION_ADMIT else "exclude"
        set_by_hand(row, by_hand, f"by the operator: {why}" if why else "by the operator")
    return row


def set_by_hand(row: Contribution, decision: str, reason: str) -> None:
    """Let a decision, `admit` or `exclude`, hold from the next version on."""
    row.by_hand, row.considered = decision, 0
    row.verdict = "admitted" if decision == "admit" else "quarantined"
    row.reason = f"{'admitted' if decision == 'admit' else 'excluded'} {reason}"


def judgement(row: Contribution) -> pb.Judgement:
    """What holds of a contribution, as it goes over the wire."""
    verdict = pb.Verdict.Value(f"VERDICT_{row.verdict.upper()}")
    return pb.Judgement(verdict=verdict, reason=row.reason, by_hand=bool(row.by_hand))


def received(row: Contribution) -> NewEvent:
    """That a contribution is stored."""
    event = pb.ContributionReceived(
        revision=row.revision, digest=row.digest, size=row.size, num_examples=row.declaration.num_examples
    )
    return NewEvent(pb.Event(contribution_received=event), row.received, row.client_id)


def judged(row: Contribution, now: float, version: int = 0) -> NewEvent:
    """That a contribution has a verdict, by the cohort of a version or by itself."""
    event = pb.ContributionJudged(revision=row.revision, judgement=judgement(row), version=version)
    return NewEvent(pb.Event(contribution_judged=event), now, row.client_id)
