"""Versions in the making: one task for each job that publishes, begun again after a crash, and waiting for room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog

from coordinator.auth.signer import Signer
from coordinator.jobs.status import Statuses
from coordinator.publication import runner
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
    """Starts and stops publishers; what becomes of a round is for others to decide."""

    def __init__(
        self,
        state: Path,
        known: Store,
        blobs: Blobs,
        signer: Signer,
        statuses: Statuses,
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._store = known
        self._blobs = blobs
        self._signer = signer
        self._statuses = statuses
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, published: OnPublished, failed: OnFailed) -> None:
        """See to it that a job's version is being made."""
        if name not in self._tasks:
            task = asyncio.create_task(self._publish(name, published, failed))
            self._tasks[name] = task
            task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def stop(self, name: str) -> None:
        """End a job's publisher, if there is one, and drop what it has half made."""
        if task := self._tasks.get(name):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await offload(clear_unfinished, self._state, name, await offload(self._store.versions, name))

    async def end(self) -> None:
        """End all publishers; they begin again when the daemon does."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self, name: str, published: OnPublished, failed: OnFailed) -> None:
        async def on_stage(stage: str) -> None:
            log.info("publishing", job=name, stage=stage)
            await self._statuses.stage(name, stage)

        try:
            made = await runner.run(self._state, self._store, self._blobs, self._signer, name, on_stage)
            made.publication.published_unix = self._clock()
            _, after = await offload(self._store.publish, name, made.publication, made.findings, self._clock())
        except Exception as error:
            if isinstance(error, NotEnough) or (isinstance(error, OSError) and error.errno in FULL):
                log.error("publishing_waits", job=name, reason=str(error))
                await self._statuses.stage(name, f"waiting for room: {error}")
                with suppress(OneroundError):  # the same disk may have no room for this
                    await offload(self._store.record_delay, name, str(error), self._clock())
                await asyncio.sleep(RETRY)
                return  # the daemon's loop starts it again
            # Whatever it is, the operator is told and the round stops trying, or it would try for ever.
            log.error("publishing_failed", job=name, reason=str(error), exc_info=not isinstance(error, OneroundError))
            await self._statuses.stage(name, "")
            hint = error.hint if isinstance(error, OneroundError) else ""
            await failed(name, f"{error}; {hint or f'`coordinator publish {name}` tries again'}")
            return
        log.info("published", job=name, version=made.publication.version)
        await published(name, after)
        await self._statuses.stage(name, "")
