"""How often the coordinator is told, and how its verdict is heard: one loop, one pacing, in a time that is bounded."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from coordinator.jobs import spec
from edge_client import session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.session.heartbeat import HEARTBEAT_SECONDS, VERDICT_SECONDS, Heartbeat, pause_after
from edge_client.ui.screen import Screen
from oneround.errors import BadData, OneroundError, Refused, Unreachable
from oneround.v1 import federation_pb2 as pb
from tests.daemons import SPEC, running
from tests.fakes import FakeBackend
from tests.participants import participant

ADMITTED = pb.Judgement(verdict=pb.VERDICT_ADMITTED)
PENDING = pb.Judgement(verdict=pb.VERDICT_PENDING)


class Counting:
    """A remote that counts heartbeats, and tells at what time of a made-up clock each of them came."""

    server = "somewhere"

    def __init__(self, reply: Callable[[int], pb.HeartbeatReply | OneroundError]) -> None:
        """`reply` to the heartbeat of a number, from 1."""
        self.now, self.times = 0.0, list[float]()
        self.beats = asyncio.Condition()
        self._reply = reply

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        self.times.append(self.now)
        async with self.beats:
            self.beats.notify_all()
        reply = self._reply(len(self.times))
        if isinstance(reply, OneroundError):
            raise reply
        return reply

    async def find_again(self, lost: str) -> bool:
        return False

    async def heard(self, count: int) -> None:
        async with self.beats:
            await asyncio.wait_for(self.beats.wait_for(lambda: len(self.times) >= count), 30)


async def judged(remote: Counting, *, after: int = 0, seconds: float = 30.0) -> pb.Judgement:
    """What a client hears that asks for the verdict after so many heartbeats."""
    heartbeat = Heartbeat("lease", sleep=remote.sleep)
    beating = asyncio.create_task(heartbeat.beat(remote))  # type: ignore[arg-type]
    try:
        await remote.heard(after)
        return await heartbeat.verdict(seconds)
    finally:
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


def test_the_pause_is_what_is_asked_for_or_a_little_more_within_bounds() -> None:
    for asked, expected in ((0.0, HEARTBEAT_SECONDS), (-3.0, 2.0), (7.5, 7.5), (1e9, 60.0), (float("nan"), 2.0)):
        reply = pb.HeartbeatReply(next_seconds=asked)
        assert pause_after(reply, lambda: 0.0) == expected
        assert expected < pause_after(reply, lambda: 0.999) <= 1.25 * expected
    pauses = {pause_after(pb.HeartbeatReply(next_seconds=20.0)) for _ in range(20)}
    assert len(pauses) > 10, "a crowd that ends together does not come back in step"
    assert max(pauses) < VERDICT_SECONDS, "the most that a coordinator asks for leaves time to hear a verdict"


async def test_waiting_for_the_verdict_sends_no_heartbeat_of_its_own() -> None:
    remote = Counting(
        lambda number: pb.HeartbeatReply(next_seconds=20.0, judgement=ADMITTED if number > 5 else PENDING)
    )
    assert (await judged(remote, after=3)).verdict == pb.VERDICT_ADMITTED
    gaps = [later - earlier for earlier, later in pairwise(remote.times)]
    assert len(remote.times) == 6, "as many as it took to hear it"
    assert all(20.0 <= gap <= 25.0 for gap in gaps), "before and after the receipt"


async def test_a_verdict_that_was_heard_before_it_was_asked_for(tmp_path: Path) -> None:
    remote = Counting(lambda number: pb.HeartbeatReply(judgement=ADMITTED if number == 1 else pb.Judgement()))
    assert (await judged(remote, after=3)).verdict == pb.VERDICT_ADMITTED


async def test_nobody_waits_for_ever_for_a_verdict() -> None:
    remote = Counting(lambda _: pb.HeartbeatReply(judgement=PENDING))
    assert (await judged(remote, seconds=0.05)).verdict == pb.VERDICT_PENDING


@pytest.mark.parametrize("error", [Unreachable("nobody answers"), BadData("what is this"), Refused("no such lease")])
async def test_a_coordinator_that_fails_after_the_receipt_ends_the_wait(error: OneroundError) -> None:
    """And none that fails before it: training goes on."""

    remote = Counting(lambda number: error if number != 2 else pb.HeartbeatReply(judgement=PENDING))
    began = time.monotonic()
    assert (await judged(remote, after=2, seconds=60)).verdict == pb.VERDICT_PENDING
    assert time.monotonic() - began < 30


async def test_a_stop_is_heard_and_raised() -> None:
    remote = Counting(lambda _: pb.HeartbeatReply(directive=pb.DIRECTIVE_STOP, reason="the round\nis over"))
    heartbeat = Heartbeat("lease", sleep=remote.sleep)
    heartbeat.check()
    beating = asyncio.create_task(heartbeat.beat(remote))  # type: ignore[arg-type]
    await remote.heard(2)
    beating.cancel()
    with pytest.raises(Refused, match="stopped this job: the round is over"):
        heartbeat.check()


async def test_a_whole_part_keeps_to_the_pacing(tmp_path: Path) -> None:
    who = participant(tmp_path, FakeBackend())
    times: list[float] = []
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))
        async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
            send = remote.heartbeat

            async def counted(beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
                times.append(time.monotonic())
                return await send(beat)

            remote.heartbeat = counted  # type: ignore[method-assign]
            assert (await session.take_part(remote, "notes", who, Screen())).digest
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times and all(gap >= 0.99 * HEARTBEAT_SECONDS for gap in gaps), gaps
