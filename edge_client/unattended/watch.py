"""Watching a coordinator, and taking part in every accepted job as it appears."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

from edge_client import outbox, session
from edge_client.connection.remote import Remote
from edge_client.session import Participant
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import command
from oneround.errors import BadData, OneroundError, Refused, Unreachable, UsageError
from oneround.v1 import federation_pb2 as pb

LOOK_SECONDS = 30.0  # between two looks for new jobs
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds, while the coordinator does not answer
_FIRST_TRY_AGAIN, _LAST_TRY_AGAIN = 60.0, 3600.0  # seconds, after taking part in a job has failed

Connect = Callable[[], AbstractAsyncContextManager[Remote]]
JobKey = tuple[str, float]  # a job's name and deadline: the next of the same name is another one


def accepts(patterns: Sequence[str], name: str) -> bool:
    """Whether a job's name is one of those accepted; `*` stands for anything, as in a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class RetryLater:
    """A job in which taking part has failed: how often, and when (monotonic seconds) to try again."""

    times: int
    again: float  # infinite: never

    @staticmethod
    def once_more(before: RetryLater | None, error: OneroundError, now: float) -> RetryLater:
        """One more failure. A refusal is final; for invalid data, a full disk and an operator who has to approve this
        machine the wait doubles each time, up to an hour."""
        times = (before.times if before else 0) + 1
        pause = min(_FIRST_TRY_AGAIN * 2 ** (times - 1), _LAST_TRY_AGAIN)
        is_final = isinstance(error, Refused) and not isinstance(error, session.AwaitsApproval)
        return RetryLater(times, math.inf if is_final else now + pause)

    def sentence(self, now: float) -> str:
        """When it is tried again, to follow another sentence; empty if never."""
        return "" if math.isinf(self.again) else f" It is tried again in {self.again - now:.0f} s."


class JobWatcher:
    """Takes part in the accepted jobs of a coordinator, one after the other."""

    def __init__(
        self,
        connect: Connect,
        patterns: Sequence[str],
        participant: Participant,
        screen: Screen,
        *,
        look_seconds: float = LOOK_SECONDS,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self._connect, self._patterns, self._participant, self._screen = connect, patterns, participant, screen
        self._look_seconds, self._first_pause = look_seconds, first_pause
        self._pause = first_pause  # seconds, before the next try to reach the coordinator
        self._failed: dict[JobKey, RetryLater] = {}
        self._not_accepted: set[JobKey] = set()  # and reported as such

    async def stay(self) -> NoReturn:
        """Watch until cancelled. A coordinator that does not answer, or is at fault, is tried again, ever more rarely.

        Raises:
            Refused: the coordinator's key has changed.
            BadData: what is pinned of it cannot be read, or it sends what makes no sense.
        """
        while True:
            try:
                async with self._connect() as remote:
                    self._screen.say(events.WaitingForJobs(remote.server, " or ".join(self._patterns)))
                    await self._watch(remote)
            except OneroundError as error:
                if isinstance(error, Refused | UsageError | BadData):
                    raise
                wait = self._pause * random.uniform(0.5, 1.5)  # so that a cohort does not come back at once
                self._screen.say(events.Retry(str(error), wait))
                await asyncio.sleep(wait)
                self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _watch(self, remote: Remote) -> NoReturn:
        """Look for jobs every so many seconds.

        Raises:
            Unreachable: the coordinator does not answer.
        """
        while True:
            for job in (await remote.jobs()).jobs:
                if self._is_due(job):
                    await self._take_part(remote, job)
            self._pause = self._first_pause
            await asyncio.sleep(self._look_seconds * random.uniform(0.8, 1.2))

    def _is_due(self, job: pb.JobStatus) -> bool:
        """Whether to take part in a job now."""
        if not job.takes_contributions:
            return False
        if not accepts(self._patterns, job.spec.name):
            self._report_not_accepted(job)
            return False
        failed = self._failed.get(_key(job))
        if failed is not None and time.monotonic() < failed.again:
            return False
        boxes = outbox.of_job(self._participant.state, job.spec.name, job.deadline_unix)
        return not any(box.is_over() for box in boxes)

    def _report_not_accepted(self, job: pb.JobStatus) -> None:
        """Once a job."""
        if _key(job) not in self._not_accepted:
            self._not_accepted.add(_key(job))
            self._screen.say(events.JobNotAccepted(job.spec.name))

    async def _take_part(self, remote: Remote, job: pb.JobStatus) -> None:
        """Take part in a job; a failure is reported, and kept for when to try again.

        Raises:
            Unreachable: the coordinator does not answer.
        """
        try:
            with command.only_one(self._participant.state, "edge-client join"):
                await session.take_part(remote, job.spec.name, self._participant, self._screen, waits=False)
        except Unreachable:
            raise
        except OneroundError as error:
            now = time.monotonic()
            failed = RetryLater.once_more(self._failed.get(_key(job)), error, now)
            self._failed[_key(job)] = failed
            self._screen.say(events.NotTakingPart(job.spec.name, str(error), failed.sentence(now)))


def _key(job: pb.JobStatus) -> JobKey:
    return job.spec.name, job.deadline_unix
