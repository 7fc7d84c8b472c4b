"""The round as a pure state machine: what happened, and the time, give the next state. No clock, no effects."""

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


@dataclass(frozen=True)
class Round:
    """A round's rules, and where it stands. Times are seconds since the Unix epoch."""

    min_clients: int
    target_clients: int  # 0: none, wait for the deadline
    deadline: float
    state: State = State.OPEN
    reason: str = ""
    admitted: frozenset[str] = frozenset()  # client ids


@dataclass(frozen=True)
class Admitted:
    """A client's contribution is committed and takes part in the average."""

    client_id: str


@dataclass(frozen=True)
class Tick:
    """Time went by."""


@dataclass(frozen=True)
class CloseByHand:
    """The operator asks to close now, whatever the quorum; or to publish again after a failure."""


@dataclass(frozen=True)
class Published:
    """A verified publication is in place."""


@dataclass(frozen=True)
class PublishingFailed:
    """No publication could be made."""

    reason: str


Event = Admitted | Tick | CloseByHand | Published | PublishingFailed


def apply(round: Round, event: Event, now: float) -> Round:
    """The round after an event. Events that no longer matter leave it as it is, so replays are harmless."""
    match event, round.state:
        case Admitted(client_id), State.OPEN:
            return _close_if_due(replace(round, admitted=round.admitted | {client_id}), now)
        case Tick(), State.OPEN:
            return _close_if_due(round, now)
        case CloseByHand(), State.OPEN if round.admitted:
            return replace(round, state=State.PUBLISHING, reason="closed by the operator")
        case CloseByHand(), State.FAILED if round.admitted:
            return replace(round, state=State.PUBLISHING, reason="tried again by the operator")
        case CloseByHand(), State.OPEN:
            return replace(round, state=State.EXPIRED, reason="closed by the operator with no contribution")
        case Published(), State.PUBLISHING:
            return replace(round, state=State.PUBLISHED)
        case PublishingFailed(reason), State.PUBLISHING:
            return replace(round, state=State.FAILED, reason=reason)
    return round


def _close_if_due(round: Round, now: float) -> Round:
    count = len(round.admitted)
    if round.target_clients and count >= round.target_clients:
        return replace(round, state=State.PUBLISHING, reason=f"all {count} contributions are in")
    if now < round.deadline:
        return round
    if count >= round.min_clients:
        return replace(round, state=State.PUBLISHING, reason=f"deadline, with {count} contributions")
    return replace(
        round, state=State.EXPIRED, reason=f"deadline, with {count} of at least {round.min_clients} contributions"
    )
