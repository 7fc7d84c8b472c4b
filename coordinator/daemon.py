"""The daemon: its parts put together over one state folder, and the loop that time drives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import sqlalchemy
import structlog

from coordinator.admission.worker import AdmissionWorker
from coordinator.auth import identity
from coordinator.auth.signer import Signer
from coordinator.jobs.leases import Leases
from coordinator.jobs.status import Statuses
from coordinator.operator import Operator
from coordinator.participation import Participation
from coordinator.publication.scheduler import PublicationScheduler
from coordinator.round_driver import RoundDriver
from coordinator.storage import gc
from coordinator.storage.blobs import Blobs
from coordinator.storage.people import People
from coordinator.storage.store import Store
from coordinator.uploads.service import UploadService
from oneround import signing
from oneround.errors import OneroundError
from oneround.v1 import federation_pb2 as pb

TICK = 0.5  # seconds between looks at the clock
WRITE_DOWN = 5.0  # seconds between two writings of what heartbeats said
THREADS = 3  # that talk to the database; more would only keep each other, and the event loop, waiting

log = structlog.get_logger()
offload = asyncio.to_thread


class Daemon:
    """One coordinator. `operator` and `participation` hold its calls, which raise OneroundError; rpc/ brings them to
    the wire."""

    def __init__(
        self,
        state: Path,
        database: str = "",
        *,
        blobs: str = "",
        key: bytes = b"",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`key` (PEM), which the server shows, signs; left out, that of the identity in the state folder."""
        self.state = state
        self.now = clock
        stored = Blobs(state, blobs)  # makes the folder
        self._store = Store(database or sqlalchemy.URL.create("sqlite", database=str(state / "coordinator.sqlite")))
        signer = Signer(signing.private(key or identity.load_or_create(state).key), self._store)
        self.people = People(self._store.database)
        self._leases = Leases(self._store, clock)
        self.uploads = UploadService(self._store, stored, signer, clock)
        self.statuses = Statuses(self._store, self._leases, state / "publications", clock)
        self._admission = AdmissionWorker(self._store, stored, clock)
        self._scheduler = PublicationScheduler(state, self._store, stored, signer, self.statuses, clock)
        self._driver = RoundDriver(self._store, self._leases, self.statuses, self._scheduler, clock)
        shared = (self._driver, self._leases, self.statuses, self.uploads)
        self.operator = Operator(state, self._store, stored, *shared, self._scheduler, clock)
        self.participation = Participation(state, self._store, stored, signer, *shared, self._admission, clock)
        gc.sweep(state, self._store, stored)

    async def run(self) -> None:
        """Judge what comes in, close rounds in time and publish what is closed, until cancelled."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "short"))
        judging = asyncio.create_task(self._admission.run(self.participation.judged))
        background = [judging, asyncio.create_task(self._write_down())]
        try:
            while not any(task.done() for task in background):
                try:
                    await self._driver.tick()
                except OneroundError as error:  # a full disk, a database that is away: it passes
                    log.error("waits", reason=str(error))
                await asyncio.sleep(TICK)
            for task in background:
                if task.done():
                    task.result()  # a fault of ours; let it be seen
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._scheduler.end()
            with suppress(OneroundError):
                await offload(self._leases.write_down)

    async def _write_down(self) -> None:
        while True:
            await asyncio.sleep(WRITE_DOWN)
            try:
                await offload(self._leases.write_down)
            except OneroundError as error:
                log.error("waits", reason=str(error))

    def release(self) -> None:
        """Let go of the database; nothing of the daemon works after it."""
        self._store.close()

    async def names(self) -> Sequence[str]:
        """Of all jobs, newest first."""
        return await offload(self._store.names)

    async def outlines(self, names: Iterable[str]) -> list[pb.JobStatus]:
        """Jobs, without their clients and events."""
        return [await offload(self.statuses.outline, name) for name in names]

    def all_statuses(self) -> list[pb.JobStatus]:
        """Every job with its clients, without its events; blocks."""
        return [self.statuses.whole(name, events=0) for name in self._store.names()]

    def event_counts(self) -> Mapping[tuple[str, str], int]:
        """How many events of each kind each job has had, by job and kind; blocks."""
        return self._store.event_counts()

    def access(self, name: str) -> str:
        """Who may take part in a job; see auth/policy.py. Raises NotFound when there is no such job."""
        return self._store.announced(name).job.spec.access.who or "open"
