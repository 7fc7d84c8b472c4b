"""Rounds whose length can be worked out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulated import (
    DAY,
    HOUR,
    KINDS,
    TRIPS_TO_JOIN,
    TRIPS_TO_SEND,
    Device,
    Hours,
    Link,
    Plan,
    Profile,
    simulate,
)

INSTANT = Link(up=math.inf, down=math.inf, round_trip=0.0)
OFFICE = Hours(opens=8, closes=16)
AT_NINE = (9.0, 9.0)
PEOPLE = Profile(
    Link(up=20, down=100, round_trip=0.03, shared=1000, breaks_per_hour=10, break_seconds=5),
    Hours(opens=9, closes=18, jitter=1, open_stretch=2, nap=0.5, days_off=0.1),
    spread=0.35,
    stragglers=0.1,
    slowdown=4,
)
PLAN = Plan(rounds=1, steps=100, step_seconds=2.0, up_bytes=0, down_bytes=0, publish_seconds=7.0)


def slownesses(profile: Profile, seed: int, clients: int = 10) -> list[float]:
    """Of the devices that a run with this seed has, the fastest first."""
    return sorted(Device(profile, random.Random(f"{seed}/{number}")).slowness for number in range(clients))


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_equal_devices_that_never_sleep_take_what_one_of_them_takes(rounds: int) -> None:
    link = Link(up=20, down=100, round_trip=0.05)
    plan = replace(PLAN, rounds=rounds, steps=30, up_bytes=5e6, down_bytes=25e6)
    transferring = 5e6 * 8 / 20e6 + 25e6 * 8 / 100e6 + (TRIPS_TO_JOIN + TRIPS_TO_SEND) * 0.05
    found = simulate(Profile(link), plan, seed=0)
    assert found.seconds == pytest.approx(rounds * (transferring + 30 * 2.0 + 7.0))
    assert found.spent["transferring"] == pytest.approx(rounds * transferring)
    assert found.spent["computing"] == pytest.approx(rounds * 60.0)
    assert found.spent["asleep"] == found.spent["waiting"] == 0


def test_ten_clients_share_the_coordinators_link() -> None:
    plan = replace(PLAN, steps=0, up_bytes=1e6, down_bytes=3e6)
    found = simulate(Profile(Link(up=1000, down=1000, round_trip=0, shared=100)), plan, seed=0)
    assert found.seconds == pytest.approx((1e6 + 3e6) * 10 * 8 / 100e6 + 7.0)


def test_the_slowest_device_is_waited_for() -> None:
    profile = Profile(INSTANT, stragglers=0.1, slowdown=4)
    seed = next(seed for seed in range(100) if slownesses(profile, seed) == [1.0] * 9 + [4.0])
    found = simulate(profile, PLAN, seed)
    assert found.seconds == pytest.approx(4 * 200 + 7)
    assert found.spent["computing"] == pytest.approx((9 * 200 + 800) / 10)
    assert found.spent["waiting"] == pytest.approx(9 * 600 / 10)

    left_behind = simulate(profile, replace(PLAN, target=9), seed)
    assert left_behind.seconds == pytest.approx(200 + 7)
    assert left_behind.spent["computing"] == pytest.approx(200)  # the slow one's too, in vain


@pytest.mark.parametrize("target", range(1, 11))
def test_a_round_closes_with_its_target(target: int) -> None:
    profile = Profile(INSTANT, spread=0.5)
    found = simulate(profile, replace(PLAN, target=target, quorum=1), seed=3)
    assert found.seconds == pytest.approx(200 * slownesses(profile, 3)[target - 1] + 7)
    assert found.rounds[0].contributions == target


def test_at_the_deadline_the_quorum_is_enough() -> None:
    profile = Profile(INSTANT, spread=0.5)
    deadline = 200 * slownesses(profile, 3)[5] + 1e-6  # six are in
    found = simulate(profile, replace(PLAN, quorum=6, deadline=deadline), seed=3)
    assert found.has_model and found.rounds[0].contributions == 6
    assert found.seconds == pytest.approx(deadline + 7)

    short_of_one = simulate(profile, replace(PLAN, rounds=3, quorum=7, deadline=deadline), seed=3)
    assert not short_of_one.has_model and len(short_of_one.rounds) == 1
    assert short_of_one.seconds == pytest.approx(deadline)


def test_after_the_quorum_others_have_the_grace() -> None:
    profile = Profile(INSTANT, spread=0.5)
    fourth = 200 * slownesses(profile, 3)[3]
    found = simulate(profile, replace(PLAN, quorum=4, grace=0.5), seed=3)
    assert found.seconds == pytest.approx(fourth + 0.5 + 7)


def test_work_goes_on_the_next_morning() -> None:
    """Ten hours from nine, where machines are open from 8 to 16: seven today, three tomorrow."""
    profile = Profile(INSTANT, OFFICE, starts=AT_NINE)
    plan = replace(PLAN, steps=10, step_seconds=HOUR, publish_seconds=0)
    found = simulate(profile, plan, seed=0)
    assert found.seconds == pytest.approx(26 * HOUR)
    assert found.spent["asleep"] == pytest.approx(16 * HOUR)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_a_round_that_is_published_overnight_costs_the_night(rounds: int) -> None:
    """Each round needs seven hours from eight, and is published at midnight: the next one begins the morning after."""
    profile = Profile(INSTANT, OFFICE, starts=(8.0, 8.0))
    plan = replace(PLAN, rounds=rounds, steps=7, step_seconds=HOUR, publish_seconds=9 * HOUR)
    assert simulate(profile, plan, seed=0).seconds == pytest.approx((rounds - 1) * DAY + 16 * HOUR)


def test_a_day_off_is_slept_through() -> None:
    profile = Profile(INSTANT, replace(OFFICE, days_off=0.5), starts=(0.0, 0.0))
    alone = replace(PLAN, clients=1, target=1, quorum=1, deadline=99 * DAY)
    plan = replace(alone, steps=1, step_seconds=HOUR, publish_seconds=0)
    found = [simulate(profile, plan, seed).seconds for seed in range(400)]
    assert {round((seconds - 9 * HOUR) / DAY, 6) % 1 for seconds in found} == {0.0}  # always at nine, of some day
    off = sum(found) / len(found) / DAY - 9 / 24
    assert off == pytest.approx(1.0, abs=0.25)  # geometric: one day off before the first that is not; 3.5 errors


def test_connections_are_lost_as_often_as_the_link_says() -> None:
    link = Link(up=8, down=math.inf, round_trip=0, breaks_per_hour=60, break_seconds=5)
    plan = replace(PLAN, clients=1, target=1, quorum=1, steps=0, publish_seconds=0, up_bytes=1e6 * HOUR)
    found = [simulate(Profile(link), plan, seed).seconds - HOUR for seed in range(100)]
    assert sum(found) / 100 == pytest.approx(60 * 5, rel=0.05)  # an error of 1.3 %


def test_what_never_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="quorum"):
        replace(PLAN, target=3, quorum=4)
    with pytest.raises(ValueError, match="never open"):
        Hours(opens=18, closes=9)
    with pytest.raises(ValueError, match="never open"):
        Hours(opens=9, closes=18, days_off=1.0)


seeds = st.integers(0, 10_000)


@given(seeds, st.sampled_from([1, 2, 3, 5, 10]), st.integers(1, 10))
def test_all_time_is_spent_on_something(seed: int, rounds: int, target: int) -> None:
    plan = replace(PLAN, rounds=rounds, step_seconds=60, up_bytes=25e6, down_bytes=50e6, target=target, quorum=1)
    found = simulate(PEOPLE, plan, seed)
    assert sum(found.spent.values()) == pytest.approx(found.seconds)
    assert all(found.spent[kind] >= 0 for kind in KINDS)
    assert found == simulate(PEOPLE, plan, seed)


@given(seeds, st.sampled_from([2, 3, 5, 10]))
def test_where_all_are_waited_for_more_rounds_never_are_faster(seed: int, rounds: int) -> None:
    """At equal steps, no connection lost: every device is as far, at best, at the end of each round."""
    people = replace(PEOPLE, link=replace(PEOPLE.link, breaks_per_hour=0))
    plan = replace(PLAN, steps=300, step_seconds=30, deadline=99 * DAY)
    one, many = (simulate(people, replace(plan, rounds=t, steps=300 // t), seed) for t in (1, rounds))
    assert many.seconds >= one.seconds


@given(seeds)
def test_fewer_to_wait_for_is_never_slower(seed: int) -> None:
    plan = replace(PLAN, rounds=1, step_seconds=30, deadline=99 * DAY)
    eight, ten = (simulate(PEOPLE, replace(plan, target=target), seed) for target in (8, 10))
    assert eight.seconds <= ten.seconds
