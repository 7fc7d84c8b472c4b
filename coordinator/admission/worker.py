"""Has every new contribution looked at, one after another, in a process of its own.

A file from a stranger is read where it can do no harm: a reader that dies takes nothing with it. The process goes when
there has been nothing to do for a while, and whenever the daemon does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import structlog

from coordinator.admission import soundness, unreadable
from coordinator.storage.blobs import Blobs
from coordinator.storage.schema import Contribution
from coordinator.storage.store import Store
from oneround.errors import OneroundError
from oneround.v1 import federation_pb2 as pb

IDLE_SECONDS = 60.0
RETRY_SECONDS = 5.0

log = structlog.get_logger()
offload = asyncio.to_thread


class AdmissionWorker:
    """Takes pending contributions from the store, and notes there how each stands."""

    def __init__(self, store: Store, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._pool: ProcessPoolExecutor | None = None
        self._something = asyncio.Event()

    def look(self) -> None:
        """There is something to look at."""
        self._something.set()

    async def run(self, judged: Callable[[Contribution], Awaitable[None]]) -> None:
        """Until cancelled. `judged` is told of every contribution that was looked at."""
        self._something.set()  # what a crash left
        try:
            while True:
                try:
                    await asyncio.wait_for(self._something.wait(), IDLE_SECONDS)
                except TimeoutError:
                    self._release()
                    continue
                self._something.clear()
                try:
                    for contribution in await offload(self._store.pending):
                        reason = await self._examine(contribution)
                        await judged(await offload(self._store.record_soundness, contribution, reason, self._clock()))
                except OneroundError as error:  # a full disk, a database that is away: it passes
                    log.error("examining_waits", reason=str(error))
                    await asyncio.sleep(RETRY_SECONDS)
                    self._something.set()
        finally:
            self._release()

    async def _examine(self, contribution: Contribution) -> str:
        """Why it is unsound; empty if it is not."""
        job = self._store.announced(contribution.job).job
        file = await offload(self._blobs.path, contribution.digest)
        initial = await offload(self._blobs.path, job.initial.digest)
        declaration = contribution.declaration.SerializeToString()
        question = (str(file), declaration, job.SerializeToString(), str(initial))
        died: BrokenProcessPool
        for _ in range(2):  # a reader may die of something else than the file; twice is enough
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, _end_with_the_daemon)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, _unsound, *question)
            except BrokenProcessPool as error:
                self._release()
                died = error
        return unreadable.reason(died)

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _unsound(file: str, declaration: bytes, job: bytes, initial: str) -> str:
    """In the process. Nothing that goes wrong there ends the daemon's."""
    try:
        declared, announced = pb.Declaration.FromString(declaration), pb.Job.FromString(job)
        return soundness.unsound(Path(file), declared, announced, Path(initial))
    except Exception as error:
        return unreadable.reason(error)


def _end_with_the_daemon() -> None:
    os.nice(5)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is the child"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
