"""The round's decisions, as a table: where it stands, what happens, when, and where it stands then."""

from dataclasses import replace

import pytest

from coordinator import round as rounds
from coordinator.round import (
    CancelByHand,
    CloseByHand,
    PublishByHand,
    Published,
    PublishingFailed,
    Round,
    Rules,
    State,
    Tick,
)

DEADLINE = 1000.0
RULES = Rules(min_clients=2, target_clients=3, deadline=DEADLINE)
OPEN = Round(RULES)
PUBLISHING = replace(OPEN, state=State.PUBLISHING, admitted=2)
PUBLISHED = replace(OPEN, state=State.PUBLISHED, admitted=2, version=1, tried_at=500.0)
FAILED = replace(OPEN, state=State.FAILED, admitted=2, tried_at=500.0)


def with_rules(round: Round, **changes: float | None) -> Round:
    return replace(round, rules=replace(round.rules, **changes))


@pytest.mark.parametrize(
    ("before", "event", "now", "state", "reason"),
    [
        # The first publication.
        (OPEN, Tick(), 10, State.OPEN, ""),
        (replace(OPEN, admitted=2), Tick(), 10, State.OPEN, ""),
        (replace(OPEN, admitted=3), Tick(), 10, State.PUBLISHING, "all 3 contributions"),
        (replace(OPEN, admitted=2), Tick(), DEADLINE, State.PUBLISHING, "deadline, with 2"),
        (replace(OPEN, admitted=1), Tick(), DEADLINE, State.EXPIRED, "1 of at least 2"),
        (with_rules(replace(OPEN, admitted=99), target_clients=0), Tick(), 10, State.OPEN, ""),
        # The grace period runs from the quorum.
        (with_rules(replace(OPEN, admitted=2, quorum_at=5), grace=60), Tick(), 64, State.OPEN, ""),
        (with_rules(replace(OPEN, admitted=2, quorum_at=5), grace=60), Tick(), 65, State.PUBLISHING, "grace"),
        (with_rules(replace(OPEN, admitted=1), grace=60), Tick(), 900, State.OPEN, ""),
        # By hand.
        (replace(OPEN, admitted=1), CloseByHand(), 10, State.PUBLISHING, "closed by the operator"),
        (OPEN, CloseByHand(), 10, State.EXPIRED, "no contribution"),
        (FAILED, CloseByHand(), 10, State.PUBLISHING, "tried again"),
        (PUBLISHED, CloseByHand(), 10, State.PUBLISHED, ""),
        (OPEN, CancelByHand(), 10, State.CANCELLED, "cancelled"),
        (PUBLISHING, CancelByHand(), 10, State.CANCELLED, "cancelled"),
        (PUBLISHED, CancelByHand(), 10, State.PUBLISHED, ""),
        (replace(OPEN, admitted=1), PublishByHand("why"), 10, State.PUBLISHING, "why"),
        (OPEN, PublishByHand("why"), 10, State.OPEN, ""),
        (PUBLISHED, PublishByHand("why"), 10, State.PUBLISHING, "why"),
        (replace(OPEN, state=State.EXPIRED, admitted=1), PublishByHand("why"), 10, State.PUBLISHING, "why"),
        (PUBLISHING, PublishByHand("why"), 10, State.PUBLISHING, ""),
        # The publisher.
        (PUBLISHING, Published(), 10, State.PUBLISHED, ""),
        (PUBLISHING, PublishingFailed("no room"), 10, State.FAILED, "no room"),
        (replace(PUBLISHING, version=1), PublishingFailed("no"), 10, State.PUBLISHED, "version 2 could not be made"),
        (PUBLISHED, PublishingFailed("late word"), 10, State.PUBLISHED, ""),
        (replace(OPEN, state=State.CANCELLED), Published(), 10, State.CANCELLED, ""),
        # What comes in after a publication.
        (replace(PUBLISHED, fresh=1), Tick(), 2000, State.PUBLISHED, ""),
        (with_rules(PUBLISHED, renew_every=60), Tick(), 2000, State.PUBLISHED, ""),
        (with_rules(replace(PUBLISHED, fresh=1), renew_every=60), Tick(), 559, State.PUBLISHED, ""),
        (with_rules(replace(PUBLISHED, fresh=2), renew_every=60), Tick(), 560, State.PUBLISHING, "2 contributions"),
        (with_rules(replace(PUBLISHED, fresh=1), renew_every=999), Tick(), DEADLINE, State.PUBLISHING, "1 contrib"),
        (with_rules(replace(FAILED, fresh=1), renew_every=60), Tick(), 560, State.PUBLISHING, "1 contrib"),
        (with_rules(replace(FAILED, fresh=1, admitted=1), renew_every=60), Tick(), 560, State.FAILED, ""),
    ],
)  # fmt: skip
def test_events(before: Round, event: rounds.Trigger, now: float, state: State, reason: str) -> None:
    after = rounds.apply(before, event, now)
    assert after.state is state
    assert reason in after.reason and bool(reason) == bool(after.reason)


def test_versions_count_what_is_published() -> None:
    first = rounds.apply(PUBLISHING, Published(), 10)
    assert (first.version, first.tried_at) == (1, 10)
    again = rounds.apply(rounds.apply(first, PublishByHand(""), 11), PublishingFailed("no"), 12)
    assert (again.version, again.state, again.tried_at) == (1, State.PUBLISHED, 12)


@pytest.mark.parametrize(
    ("round", "now", "takes"),
    [
        (OPEN, 10, True),
        (OPEN, DEADLINE, False),
        (PUBLISHING, 10, True),
        (PUBLISHED, 10, True),
        (PUBLISHED, DEADLINE, False),
        (replace(PUBLISHED, closed_at=9), 10, False),
        (replace(PUBLISHED, closed_at=9), 8, True),
        (replace(OPEN, state=State.EXPIRED), 10, False),
        (replace(OPEN, state=State.CANCELLED), 10, False),
    ],
)
def test_contributions_are_taken_until_the_deadline(round: Round, now: float, takes: bool) -> None:
    assert rounds.takes_contributions(round, now) is takes


def test_closing_by_hand_takes_nothing_more() -> None:
    for round in (PUBLISHED, replace(OPEN, admitted=1), PUBLISHING, FAILED, OPEN):
        assert not rounds.takes_contributions(rounds.apply(round, CloseByHand(), 10), 10)


def test_what_came_in_time_is_looked_at_before_the_round_ends() -> None:
    late = rounds.apply(replace(OPEN, admitted=1, pending=1), Tick(), DEADLINE)
    assert late.state is State.OPEN
    assert rounds.apply(replace(late, admitted=2, pending=0), Tick(), DEADLINE + 1).state is State.PUBLISHING
    closed = rounds.apply(replace(OPEN, pending=1), CloseByHand(), 10)
    assert closed.state is State.OPEN and not rounds.takes_contributions(closed, 11)
    assert rounds.apply(replace(closed, pending=0), Tick(), 12).state is State.EXPIRED
    assert rounds.apply(replace(closed, pending=0, admitted=1), Tick(), 12).state is State.PUBLISHING
