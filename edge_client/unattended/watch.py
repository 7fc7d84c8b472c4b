"""Staying on this machine and taking part in every job that was accepted beforehand, as it appears."""

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
from edge_client.ui.screen import Screen
from oneround import command
from oneround.errors import BadData, OneroundError, Refused, Unreachable, UsageError
from oneround.v1 import federation_pb2 as pb

LOOK_SECONDS = 30.0  # between two looks for new jobs
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds, while the coordinator is away
_FIRST_TRY_AGAIN, _LAST_TRY_AGAIN = 60.0, 3600.0  # seconds, after this machine could not do its part in a job

Connect = Callable[[], AbstractAsyncContextManager[Remote]]
JobKey = tuple[str, float]  # a job's name and deadline: one made anew under the same name is another


def accepts(patterns: Sequence[str], name: str) -> bool:
    """Whether a job's name is one of those accepted; `*` stands for anything, as in a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class RetryLater:
    """A job in which no part could be taken: how often, and when (monotonic seconds) to try again."""

    times: int
    again: float

    @staticmethod
    def once_more(before: RetryLater | None, error: OneroundError, now: float) -> RetryLater:
        """A refusal stands; data that is not sound, a full disk and an operator who has to approve are looked at again,
        ever more rarely."""
        times = (before.times if before else 0) + 1
        pause = min(_FIRST_TRY_AGAIN * 2 ** (times - 1), _LAST_TRY_AGAIN)
        stands = isinstance(error, Refused) and not isinstance(error, session.AwaitsApproval)
        return RetryLater(times, math.inf if stands else now + pause)


class JobWatcher:
    """Looks for jobs, one after another. Ends only by an error that waiting does not mend, or when it is cancelled."""

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
        self._failed: dict[JobKey, RetryLater] = {}
        self._left_alone: set[JobKey] = set()

    async def stay(self) -> NoReturn:
        """Look for jobs until cancelled; a coordinator that is away or at fault is waited for.

        Raises:
            Refused: the coordinator's key is not the one that it was.
            BadData: what is pinned of it cannot be read, or it sends what makes no sense.
        """
        pause = self._first_pause
        while True:
            try:
                async with self._connect() as remote:
                    self._screen.say("staying", server=remote.server, accept=" or ".join(self._patterns))
                    while True:
                        for job in (await remote.jobs()).jobs:
                            if self._is_due(job):
                                await self._take_part(remote, job)
                        pause = self._first_pause
                        await asyncio.sleep(self._look_seconds * random.uniform(0.8, 1.2))
            except OneroundError as error:
                if isinstance(error, Refused | UsageError | BadData):
                    raise
                wait = pause * random.uniform(0.5, 1.5)  # so that a cohort does not come back at once
                self._screen.say("retry", why=str(error), seconds=wait)
                await asyncio.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _is_due(self, job: pb.JobStatus) -> bool:
        if not job.takes_contributions:
            return False
        if not accepts(self._patterns, job.spec.name):
            if _key(job) not in self._left_alone:
                self._left_alone.add(_key(job))
                self._screen.say("left_alone", job=job.spec.name)
            return False
        failed = self._failed.get(_key(job))
        if failed is not None and time.monotonic() < failed.again:
            return False
        return not any(
            box.is_over() for box in outbox.of_job(self._participant.state, job.spec.name, job.deadline_unix)
        )

    async def _take_part(self, remote: Remote, job: pb.JobStatus) -> None:
        try:
            with command.only_one(self._participant.state, "edge-client join"):
                await session.take_part(remote, job.spec.name, self._participant, self._screen, waits=False)
        except Unreachable:
            raise
        except OneroundError as error:
            failed = RetryLater.once_more(self._failed.get(_key(job)), error, time.monotonic())
            self._failed[_key(job)] = failed
            again = (
                "" if math.isinf(failed.again) else f" It is tried again in {failed.again - time.monotonic():.0f} s."
            )
            self._screen.say("no_part", job=job.spec.name, why=str(error), again=again)


def _key(job: pb.JobStatus) -> JobKey:
    return job.spec.name, job.deadline_unix
