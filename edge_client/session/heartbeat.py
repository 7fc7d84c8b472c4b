"""Heartbeats: the coordinator hears how training goes, and answers whether to stop and what became of the contribution.

One loop sends all of them, so all keep to one pacing: `pause_after`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

from edge_client.connection import retry
from edge_client.connection.remote import Remote
from oneround.errors import OneroundError, Refused, Unreachable
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

HEARTBEAT_SECONDS = 2.0  # between two of them, at least
VERDICT_SECONDS = 30.0  # how long to wait for what the coordinator makes of a contribution
_JITTER = 0.25  # at most so much later than asked for, so that a cohort that began together does not stay in step
_UNDECIDED = (pb.VERDICT_UNSPECIFIED, pb.VERDICT_PENDING)


def pause_after(reply: pb.HeartbeatReply, chance: Callable[[], float] = random.random) -> float:
    """Seconds until the next heartbeat: what the coordinator asks for or a little more, within bounds. `chance` gives
    numbers in [0, 1)."""
    pause = min(max(HEARTBEAT_SECONDS, reply.next_seconds), retry.LONGEST_PAUSE)
    return pause * (1 + _JITTER * chance())


class Heartbeat:
    """What the coordinator is told every few seconds (`now`), and why it wants this client to stop, once it does.
    `sleep` is asyncio's, or a test's."""

    def __init__(self, lease: str, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self.now = pb.HeartbeatRequest(lease=lease)
        self.stop = ""
        self._judgement = pb.Judgement(verdict=pb.VERDICT_PENDING)
        self._settled = asyncio.Event()  # nothing more is to be waited for
        self._awaited = False

    async def beat(self, remote: Remote) -> None:
        """Tell until cancelled. A coordinator that does not answer, or has troubles, is no reason to stop training."""
        pause, waits, misses = HEARTBEAT_SECONDS, retry.pauses(), 0
        while True:
            place = remote.server
            try:
                reply = await remote.heartbeat(self.now)
                pause = pause_after(reply)
                waits, misses = retry.pauses(), 0
                self._hear(reply)
            except Unreachable:
                pause, misses = max(HEARTBEAT_SECONDS, next(waits)), misses + 1
                if misses >= retry.LOST_AFTER and await remote.find_again(place):
                    continue
                self._miss()
            except OneroundError:
                self._miss()
            await self._sleep(pause)

    def _hear(self, reply: pb.HeartbeatReply) -> None:
        if reply.directive == pb.DIRECTIVE_STOP:
            self.stop = one_line(reply.reason) or "it gives no reason"
        if reply.judgement.verdict not in _UNDECIDED:
            self._judgement = reply.judgement
            self._settled.set()

    def _miss(self) -> None:
        if self._awaited:
            self._settled.set()

    def check(self) -> None:
        """Raises Refused when this client is to stop."""
        if self.stop:
            raise Refused(f"the coordinator stopped this job: {self.stop}")

    async def verdict(self, seconds: float = VERDICT_SECONDS) -> pb.Judgement:
        """What the coordinator makes of the contribution, if a heartbeat hears it within so many seconds; pending if
        not, or if the coordinator does not answer any more. The receipt holds either way."""
        self._awaited = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        return self._judgement
