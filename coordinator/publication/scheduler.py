"""Runs publications in the background: one task for each job that publishes. After a crash the task starts again, and
where there is no room on the disk it retries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog

from coordinator.auth.signer import Signer
from coordinator.jobs.status import Statuses
from coordinator.publication import runner
from coordinator.publication.runner import BuiltVersion
from coordinator.round import Round
from coordinator.storage.blobs import Blobs
from coordinator.storage.publications import clear_unfinished
from coordinator.storage.store import Store
from oneround.errors import FULL, NotEnough, OneroundError

RETRY = 30.0  # seconds until a version is tried again for which there was no room

log = structlog.get_logger()
offload = asyncio.to_thread
OnFailed = Callable[[str, str], Awaitable[None]]  # told of a job and why its version cannot be made
OnPublished = Callable[[str, Round], Awaitable[None]]  # told of a job whose version is there


class PublicationScheduler:
    """Starts and stops the making of versions; its callers decide what becomes of the round."""

    def __init__(
        self,
        state: Path,
        store: Store,
        blobs: Blobs,
        signer: Signer,
        statuses: Statuses,
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._statuses = statuses
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, published: OnPublished, failed: OnFailed) -> None:
        """Start a task that makes a job's version, unless one is at work."""
        if name not in self._tasks:
            task = asyncio.create_task(self._publish(name, published, failed))
            self._tasks[name] = task
            task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def stop(self, name: str) -> None:
        """Cancel a job's task, if there is one, and drop what it has not finished."""
        if task := self._tasks.get(name):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await offload(clear_unfinished, self._state, name, await offload(self._store.versions, name))

    async def end(self) -> None:
        """Cancel all tasks; the next daemon starts them again."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self, name: str, published: OnPublished, failed: OnFailed) -> None:
        """Make one version and record it; tell the callers how it ended."""
        try:
            if await offload(self._store.in_making, name) is None:
                return  # asked for by somebody whose look at the round was from before the version was recorded
            built, after = await self._built(name)
        except Exception as error:
            if _is_full(error):
                await self._wait_for_room(name, error)  # then the daemon's loop starts it again
            else:
                await self._give_up(name, error, failed)
            return
        log.info("published", job=name, version=built.publication.version)
        await published(name, after)
        await self._statuses.stage(name, "")

    async def _built(self, name: str) -> tuple[BuiltVersion, Round]:
        """The version, recorded in the store, and the round after it."""

        async def on_stage(stage: str) -> None:
            log.info("publishing", job=name, stage=stage)
            await self._statuses.stage(name, stage)

        built = await runner.run(self._state, self._store, self._blobs, self._signer, name, on_stage)
        built.publication.published_unix = self._clock()
        _, after = await offload(self._store.publish, name, built.publication, built.findings, self._clock())
        return built, after

    async def _wait_for_room(self, name: str, error: Exception) -> None:
        log.error("publishing_waits", job=name, reason=str(error))
        await self._statuses.stage(name, f"waiting for room: {error}")
        with suppress(OneroundError):  # the same disk may have no room for this
            await offload(self._store.record_delay, name, str(error), self._clock())
        await asyncio.sleep(RETRY)

    async def _give_up(self, name: str, error: Exception, failed: OnFailed) -> None:
        """Whatever the error is, tell the operator and stop, since a retry would meet it again."""
        expected = isinstance(error, OneroundError)
        log.error("publishing_failed", job=name, reason=str(error), exc_info=None if expected else error)
        await self._statuses.stage(name, "")
        hint = error.hint if isinstance(error, OneroundError) else ""
        await failed(name, f"{error}; {hint or f'`coordinator publish {name}` tries again'}")


def _is_full(error: Exception) -> bool:
    return isinstance(error, NotEnough) or (isinstance(error, OSError) and error.errno in FULL)
