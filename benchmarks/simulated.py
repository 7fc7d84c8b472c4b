"""Rounds of federated training as events in time: who trains when, who sleeps, and when a round closes.

Everything follows from the arguments: the same seed gives the same devices and the same nights, whatever the number of
rounds, so that plans are compared on one cohort. Times are in seconds, from midnight of the first day.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

HOUR = 3600.0
DAY = 24 * HOUR
TRIPS_TO_JOIN = 10  # round trips: two TLS connections 4, signing in 2, the jobs, this job, joining, the download
TRIPS_TO_SEND = 3  # declaring, sending, what was made of it
KINDS = ("computing", "transferring", "asleep", "waiting", "publishing")


@dataclass(frozen=True)
class Link:
    """Between a client and the coordinator. `up` and `down` in Mbit/s, as is `shared`: what the coordinator has for
    all together. Connections are lost at random, so often an hour of transferring, and are back after a while."""

    up: float
    down: float
    round_trip: float  # seconds
    shared: float = math.inf
    breaks_per_hour: float = 0.0
    break_seconds: float = 0.0


@dataclass(frozen=True)
class Hours:
    """When a laptop is open. Hours of the day, each moved by a normal deviate of `jitter` hours; in between it is shut
    every so often; on some days it stays shut. Lengths in hours are means of exponential distributions."""

    opens: float
    closes: float
    jitter: float = 0.0
    open_stretch: float = math.inf
    nap: float = 0.0
    days_off: float = 0.0  # share of all days

    def __post_init__(self) -> None:
        if not (0 <= self.opens < self.closes <= 24 and self.days_off < 1):
            raise ValueError("a laptop that is never open, or at hours that no day has, never trains")


@dataclass(frozen=True)
class Profile:
    """Devices and their link. `hours` is None where machines never sleep."""

    link: Link
    hours: Hours | None = None
    spread: float = 0.0  # standard deviation of the logarithm of a device's seconds per step
    stragglers: float = 0.0  # share of the devices
    slowdown: float = 1.0  # of a straggler
    starts: tuple[float, float] = (9.0, 17.0)  # hours of the first day between which the job is submitted


@dataclass(frozen=True)
class Plan:
    """A chain of equal rounds. A round closes at `target` contributions, at the deadline, or `grace` after the quorum;
    with fewer than the quorum at the deadline there is no model."""

    rounds: int
    steps: int  # optimizer steps of each client in a round
    step_seconds: float  # of the median device
    up_bytes: float  # of one client in a round, everything on the wire
    down_bytes: float
    publish_seconds: float  # of the coordinator, in a round
    clients: int = 10
    target: int = 10
    quorum: int = 2
    deadline: float = 7 * DAY
    grace: float = math.inf

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= self.target:
            raise ValueError("a round closes with no fewer than the quorum, which is one at least")


@dataclass(frozen=True)
class Round:
    """When a round opened and closed, and with how many contributions."""

    opened: float
    closed: float
    contributions: int


@dataclass(frozen=True)
class Timeline:
    """One run of a plan. `spent` has seconds by KINDS, as a mean over clients; together they are all of `seconds`.

    Whoever has sent its adapter waits for the others, asleep or not; `asleep` is with work to do."""

    seconds: float  # from submitting to the last publication, or to where it failed
    rounds: tuple[Round, ...]
    spent: dict[str, float]
    has_model: bool


def simulate(profile: Profile, plan: Plan, seed: int) -> Timeline:
    """One run of a plan. Late clients leave a round as it closes, and are in the next one from its start."""
    devices = [Device(profile, random.Random(f"{seed}/{number}")) for number in range(plan.clients)]
    now = began = HOUR * random.Random(f"{seed}").uniform(*profile.starts)
    rounds: list[Round] = []
    spent = dict.fromkeys(KINDS, 0.0)
    for _ in range(plan.rounds):
        rounds.append(one_round(profile.link, plan, devices, now, spent))
        now = rounds[-1].closed
        if rounds[-1].contributions < plan.quorum:
            return Timeline(now - began, tuple(rounds), spent, has_model=False)
        now += plan.publish_seconds
        spent["publishing"] += plan.publish_seconds
    return Timeline(now - began, tuple(rounds), spent, has_model=True)


def one_round(link: Link, plan: Plan, devices: list[Device], opened: float, spent: dict[str, float]) -> Round:
    """From opening to closing; what its clients do meanwhile is added to `spent`."""
    share = 1 / len(devices)  # all of them at once, at worst
    stages = (
        lambda device: ("transferring", device.transfer(plan.down_bytes, link, link.down, share, TRIPS_TO_JOIN)),
        lambda device: ("computing", plan.steps * plan.step_seconds * device.slowness),
        lambda device: ("transferring", device.transfer(plan.up_bytes, link, link.up, share, TRIPS_TO_SEND)),
    )
    events = [(opened, number, 0) for number in range(len(devices))]  # when, which client, and the stage it begins
    begun: list[tuple[Device, str, float, float]] = []  # who does what, from when, until when
    arrived: list[float] = []
    closes = opened + plan.deadline
    while events and events[0][0] <= closes and len(arrived) < plan.target:
        now, number, stage = heapq.heappop(events)
        if stage == len(stages):
            arrived.append(now)
            if len(arrived) == plan.quorum:
                closes = min(closes, now + plan.grace)
            continue
        kind, work = stages[stage](devices[number])
        ends = devices[number].ends(now, work)
        begun.append((devices[number], kind, now, ends))
        heapq.heappush(events, (ends, number, stage + 1))
    if len(arrived) >= plan.target:
        closes = arrived[-1]

    for device, kind, begins, ends in begun:
        until = min(ends, closes)
        awake = device.awake_between(begins, until)
        spent[kind] += share * awake
        spent["asleep"] += share * (until - begins - awake)
    spent["waiting"] += share * sum(closes - time for time in arrived)
    return Round(opened, closes, len(arrived))


class Device:
    """One machine of a profile. It works while it is awake, and goes on where it was."""

    def __init__(self, profile: Profile, rng: random.Random) -> None:
        straggles = rng.random() < profile.stragglers
        self.slowness = rng.lognormvariate(0, profile.spread) * (profile.slowdown if straggles else 1)
        self._awake = Awake(profile.hours, random.Random(rng.random()))
        self._breaks = random.Random(rng.random())

    def transfer(self, size: float, link: Link, rate: float, share: float, trips: int) -> float:
        """Seconds for so many bytes at a rate in Mbit/s, lost connections included; they cost no byte twice."""
        seconds = 8 * size / (1e6 * min(rate, share * link.shared)) + trips * link.round_trip
        lost, hourly = 0, link.breaks_per_hour / HOUR
        left = seconds - (self._breaks.expovariate(hourly) if hourly else math.inf)
        while left > 0:
            lost += 1
            left -= self._breaks.expovariate(hourly)
        return seconds + lost * link.break_seconds

    def ends(self, begins: float, work: float) -> float:
        """When work that takes so many seconds awake is done."""
        for opens, closes in self._awake.since(begins):
            opens = max(opens, begins)
            if work <= closes - opens:
                return opens + work
            work -= closes - opens
        raise AssertionError("days do not end")

    def awake_between(self, begins: float, ends: float) -> float:
        """Seconds of being awake."""
        total = 0.0
        for opens, closes in self._awake.since(begins):
            if opens >= ends:
                break
            total += min(closes, ends) - max(opens, begins)
        return total


@dataclass
class Awake:
    """The stretches of time in which a machine is open, drawn as far as they are asked for."""

    hours: Hours | None
    rng: random.Random
    _days: list[list[tuple[float, float]]] = field(default_factory=list)

    def since(self, time: float) -> Iterator[tuple[float, float]]:
        """From the first one that is not over by then, without end."""
        if self.hours is None:
            yield (-math.inf, math.inf)
            return
        day = int(time // DAY)
        while True:
            while len(self._days) <= day:
                self._days.append(list(_day(self.hours, DAY * len(self._days), self.rng)))
            yield from (stretch for stretch in self._days[day] if stretch[1] > time)
            day += 1


def _day(hours: Hours, midnight: float, rng: random.Random) -> Iterator[tuple[float, float]]:
    """The stretches in which a laptop is open on one day."""
    opens = midnight + HOUR * max(rng.gauss(hours.opens, hours.jitter), 0)
    closes = midnight + HOUR * min(rng.gauss(hours.closes, hours.jitter), 24)
    if rng.random() < hours.days_off:
        return
    while opens < closes:
        shuts = closes
        if hours.open_stretch < math.inf:
            shuts = min(closes, opens + HOUR * rng.expovariate(1 / hours.open_stretch))
        yield (opens, shuts)
        opens = shuts + (HOUR * rng.expovariate(1 / hours.nap) if hours.nap else 0)
