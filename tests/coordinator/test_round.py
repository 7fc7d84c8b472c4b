"""The round, with time as an argument."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.round import Admitted, CloseByHand, Event, Published, PublishingFailed, Round, State, Tick, apply

OPEN = Round(min_clients=2, target_clients=3, deadline=100.0)


def after(round: Round, *events: tuple[Event, float]) -> Round:
    for event, now in events:
        round = apply(round, event, now)
    return round


@pytest.mark.parametrize(
    ("events", "state", "reason"),
    [
        ([], State.OPEN, ""),
        ([(Admitted("a"), 1), (Admitted("b"), 2)], State.OPEN, ""),
        ([(Admitted("a"), 1), (Admitted("b"), 2), (Admitted("c"), 3)], State.PUBLISHING, "all 3 contributions are in"),
        ([(Admitted("a"), 1), (Admitted("a"), 2), (Admitted("a"), 3)], State.OPEN, ""),
        ([(Admitted("a"), 1), (Admitted("b"), 2), (Tick(), 99.9)], State.OPEN, ""),
        ([(Admitted("a"), 1), (Admitted("b"), 2), (Tick(), 100)], State.PUBLISHING, "deadline, with 2 contributions"),
        ([(Admitted("a"), 1), (Tick(), 100)], State.EXPIRED, "deadline, with 1 of at least 2 contributions"),
        ([(Tick(), 100)], State.EXPIRED, "deadline, with 0 of at least 2 contributions"),
        ([(Admitted("a"), 1), (CloseByHand(), 2)], State.PUBLISHING, "closed by the operator"),
        ([(CloseByHand(), 2)], State.EXPIRED, "closed by the operator with no contribution"),
    ],
)
def test_when_a_round_closes(events: list[tuple[Event, float]], state: State, reason: str) -> None:
    found = after(OPEN, *events)
    assert (found.state, found.reason) == (state, reason)


def test_without_a_target_only_the_deadline_closes() -> None:
    patient = replace(OPEN, target_clients=0)
    many = after(patient, *[(Admitted(str(client)), 1.0) for client in range(50)])
    assert many.state is State.OPEN
    assert apply(many, Tick(), 100.0).state is State.PUBLISHING


def test_publishing_ends_one_way_or_the_other() -> None:
    closed = apply(replace(OPEN, admitted=frozenset("ab")), Tick(), 100.0)
    assert apply(closed, Published(), 101.0).state is State.PUBLISHED
    failed = apply(closed, PublishingFailed("the disk is full"), 101.0)
    assert (failed.state, failed.reason) == (State.FAILED, "the disk is full")


def test_the_operator_may_try_a_failed_publication_again() -> None:
    failed = replace(OPEN, state=State.FAILED, admitted=frozenset("a"))
    assert apply(failed, CloseByHand(), 200.0).state is State.PUBLISHING
    assert apply(failed, Tick(), 200.0) == failed
    assert apply(replace(failed, admitted=frozenset()), CloseByHand(), 200.0).state is State.FAILED


EVENTS = st.one_of(
    st.builds(Admitted, st.sampled_from("abcd")),
    st.just(Tick()),
    st.just(CloseByHand()),
    st.just(Published()),
    st.just(PublishingFailed("why")),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 200)), max_size=30))
def test_a_closed_round_never_opens_again_and_never_takes_another(events: list[tuple[Event, float]]) -> None:
    round = OPEN
    for event, now in events:
        before, round = round, apply(round, event, now)
        if before.state is not State.OPEN:
            assert round.state is not State.OPEN
            assert round.admitted == before.admitted
        assert apply(round, event, now) == round, "an event that is replayed changes nothing"
