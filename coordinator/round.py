"""The round as a pure state machine: a trigger and the time give the next state. No clock, no effects.

A round is open until it can publish; it goes on taking contributions until its deadline, and what comes in after a
publication makes the next version of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    """Where a round stands; the names are those of the wire's State, in lower case."""

    OPEN = "open"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Rules:
    """What the job says of its round. Times are in seconds."""

    min_clients: int
    target_clients: int  # 0: none, wait for the grace period or the deadline
    deadline: float  # since the Unix epoch
    grace: float | None = None  # after the quorum; None: until the target or the deadline
    renew_every: float | None = None  # least time between two versions; None: only by hand


@dataclass(frozen=True)
class Round:
    """A round's rules, and where it stands. Times are seconds since the Unix epoch."""

    rules: Rules
    state: State = State.OPEN
    reason: str = ""
    closed_at: float | None = None  # by hand: nothing more is taken
    pending: int = 0  # contributions that nobody has looked at yet
    admitted: int = 0  # contributions that take part
    fresh: int = 0  # contributions that the newest version, made or tried, does not know as they stand now
    quorum_at: float | None = None  # when as many as the quorum were in
    version: int = 0  # the newest that is published
    tried_at: float = 0.0  # when the newest was made or failed


@dataclass(frozen=True)
class Tick:
    """Time went by, or a contribution came in or was judged."""


@dataclass(frozen=True)
class CloseByHand:
    """The operator asks to take nothing more, and to publish what is in, whatever the quorum."""


@dataclass(frozen=True)
class CancelByHand:
    """The operator asks to end it without a publication."""


@dataclass(frozen=True)
class PublishByHand:
    """The operator asks for a version of what is in, whatever the quorum."""

    reason: str


@dataclass(frozen=True)
class Published:
    """A verified version is in place."""


@dataclass(frozen=True)
class PublishingFailed:
    """No version could be made."""

    reason: str


Trigger = Tick | CloseByHand | CancelByHand | PublishByHand | Published | PublishingFailed


def apply(round: Round, trigger: Trigger, now: float) -> Round:
    """The round after a trigger. Triggers that no longer matter leave it as it is, so replays are harmless."""
    match trigger, round.state:
        case Tick(), State.OPEN:
            return _publish_if_due(round, now)
        case Tick(), State.PUBLISHED | State.FAILED:
            return _renew_if_due(round, now)
        case CloseByHand(), State.OPEN:
            return _publish_if_due(replace(round, closed_at=now), now)
        case CloseByHand(), State.FAILED if round.admitted:
            return _publishing(replace(round, closed_at=now), "tried again by the operator")
        case CloseByHand(), State.PUBLISHING | State.PUBLISHED | State.FAILED:
            return replace(round, closed_at=now)
        case CancelByHand(), State.OPEN | State.PUBLISHING | State.FAILED if not round.version:
            return replace(round, closed_at=now, state=State.CANCELLED, reason="cancelled by the operator")
        case PublishByHand(reason), State.OPEN | State.PUBLISHED | State.EXPIRED | State.FAILED if round.admitted:
            return _publishing(round, reason)
        case Published(), State.PUBLISHING:
            return replace(round, state=State.PUBLISHED, version=round.version + 1, tried_at=now)
        case PublishingFailed(reason), State.PUBLISHING if round.version:
            failed = f"version {round.version + 1} could not be made: {reason}"
            return replace(round, state=State.PUBLISHED, reason=failed, tried_at=now)
        case PublishingFailed(reason), State.PUBLISHING:
            return replace(round, state=State.FAILED, reason=reason, tried_at=now)
    return round


def takes_contributions(round: Round, now: float) -> bool:
    """Whether an upload that is finished now takes part: until the deadline, published already or not."""
    over = round.state in (State.EXPIRED, State.CANCELLED) or (round.closed_at is not None and now >= round.closed_at)
    return not over and now < round.rules.deadline


def _publish_if_due(round: Round, now: float) -> Round:
    rules, count = round.rules, round.admitted
    if rules.target_clients and count >= rules.target_clients:
        return _publishing(round, f"all {count} contributions are in")
    if round.pending and (round.closed_at is not None or now >= rules.deadline):
        return round  # what came in time is looked at first
    if round.closed_at is not None:
        if count:
            return _publishing(round, "closed by the operator")
        return replace(round, state=State.EXPIRED, reason="closed by the operator with no contribution")
    if now >= rules.deadline:
        if count >= rules.min_clients:
            return _publishing(round, f"deadline, with {count} contributions")
        short = f"deadline, with {count} of at least {rules.min_clients} contributions"
        return replace(round, state=State.EXPIRED, reason=short)
    if rules.grace is not None and round.quorum_at is not None and now >= round.quorum_at + rules.grace:
        return _publishing(round, f"quorum and its grace period, with {count} contributions")
    return round


def _renew_if_due(round: Round, now: float) -> Round:
    rules = round.rules
    if not round.fresh or rules.renew_every is None or round.admitted < rules.min_clients:
        return round
    if now >= round.tried_at + rules.renew_every or now >= rules.deadline:
        return _publishing(round, f"{round.fresh} contributions came in or were judged anew")
    return round


def _publishing(round: Round, reason: str) -> Round:
    return replace(round, state=State.PUBLISHING, reason=reason)
