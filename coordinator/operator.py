"""What the operator does to jobs: submit, close, cancel, delete, publish, and decide about contributions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog

from converters import llama
from coordinator import round as rounds
from coordinator.jobs import open as open_job
from coordinator.jobs import spec as jobs
from coordinator.jobs.leases import Leases
from coordinator.jobs.status import Statuses
from coordinator.publication import request as republishing
from coordinator.publication.scheduler import PublicationScheduler
from coordinator.round import State
from coordinator.round_driver import RoundDriver
from coordinator.storage import gc
from coordinator.storage.blobs import Blobs
from coordinator.storage.schema import Client
from coordinator.storage.store import Store
from coordinator.uploads.service import UploadService
from oneround.errors import Conflict, NotFound, Refused, UsageError
from oneround.signing import public_id
from oneround.text import label
from oneround.v1 import federation_pb2 as pb

log = structlog.get_logger()
offload = asyncio.to_thread

_DECISIONS = {pb.DECISION_ADMIT: "admit", pb.DECISION_EXCLUDE: "exclude", pb.DECISION_LET_REPLACE: "replace"}


class Operator:
    """The operator's calls. Methods raise OneroundError."""

    def __init__(
        self,
        state: Path,
        store: Store,
        blobs: Blobs,
        driver: RoundDriver,
        leases: Leases,
        statuses: Statuses,
        uploads: UploadService,
        scheduler: PublicationScheduler,
        clock: Callable[[], float],
    ) -> None:
        self._state, self._store, self._blobs, self._driver = state, store, blobs, driver
        self._leases, self._statuses, self._uploads, self._scheduler = leases, statuses, uploads, scheduler
        self._clock = clock
        self._submitting = asyncio.Lock()
        self._slow = ThreadPoolExecutor(1, "slow")  # reading a large base keeps nobody else waiting

    async def submit(self, spec: pb.JobSpec) -> pb.JobStatus:
        """Check a job, prepare base and initial adapter, and open its round. Submitting it again changes nothing.

        Raises:
            Conflict: there is another job of this name.
        """
        spec = jobs.check(spec)
        llama.require()
        async with self._submitting:
            return await self._submit(spec)

    async def _submit(self, spec: pb.JobSpec) -> pb.JobStatus:
        if spec.name in await offload(self._store.names):
            submitted = jobs.filled(self._store.announced(spec.name).job.spec)
            if submitted.model.base == spec.model.base:
                spec.model.revision = submitted.model.revision
            if submitted != spec:
                raise Conflict(f"there is a different job {spec.name!r} here", hint="give this one another name")
            return await self.status(spec.name)
        if spec.name in await offload(self._store.deleted):
            raise Refused(f"the last job {spec.name!r} is still being deleted", hint="try again in a moment")
        opens = partial(open_job.open_round, spec, self._state, self._blobs, self._store, self._clock())
        await asyncio.get_running_loop().run_in_executor(self._slow, opens)
        log.info("job_opened", job=spec.name, base=spec.model.base)
        await self._statuses.changed(spec.name)
        return await self.status(spec.name)

    async def status(self, name: str) -> pb.JobStatus:
        """All that is known of a job, with its clients and its newest events."""
        return await offload(self._statuses.whole, name)

    async def close(self, name: str) -> pb.JobStatus:
        """Take nothing more, and publish what is in."""
        await self._driver.advance(name, rounds.CloseByHand())
        return await self.status(name)

    async def cancel(self, name: str) -> pb.JobStatus:
        """End a round without a publication.

        Raises:
            Refused: something is published already.
        """
        after = await self._driver.advance(name, rounds.CancelByHand())
        if after.state is not State.CANCELLED:
            raise Refused(
                f"job {name!r} is {after.state}, and cannot be cancelled any more",
                hint=f"coordinator close {name}, to take nothing more",
            )
        await self._scheduler.stop(name)
        return await self.status(name)

    async def delete(self, name: str) -> None:
        """Forget a job and all of its files.

        Raises:
            Refused: it is at work.
        """
        await offload(self._store.mark_deleted, name)
        self._driver.forget(name)
        self._leases.forget(name)
        self._uploads.forget(name)
        await self._statuses.changed(name)
        await offload(gc.delete, self._state, self._store, self._blobs, name)
        log.info("job_deleted", job=name)

    async def publish(self, request: pb.PublishRequest) -> pb.JobStatus:
        """Make a new version of what is in, by the job's method or another; nobody trains anything.

        Raises:
            UsageError: the method or a parameter is invalid, or does not fit the contributions.
            Refused: there is nothing to publish, or a version is being made.
        """
        spec = republishing.asked(self._store.announced(request.job).job.spec, request)
        spec = await offload(republishing.check, spec, self._store, self._blobs)
        before = await offload(self._store.round, request.job)
        request.aggregate.CopyFrom(spec.aggregate)
        request.reason = label(request.reason, 500) or "asked for by the operator"
        after = await self._driver.advance(request.job, rounds.PublishByHand(request.reason), request)
        if after.state is not State.PUBLISHING or before.state is State.PUBLISHING:
            why = "has no contribution that takes part" if not before.admitted else f"is {before.state}"
            raise Refused(f"job {request.job!r} {why}", hint=f"coordinator show {request.job}")
        return await self.status(request.job)

    async def judge(self, request: pb.JudgeRequest) -> pb.JobStatus:
        """Admit or exclude a contribution by hand, or let its client send another.

        Raises:
            NotFound: there is no such client.
            Refused: several clients have this name, or the contribution cannot take part.
        """
        if request.decision not in _DECISIONS:
            raise UsageError("the request holds no decision")
        client = _named(request.client, await offload(self._store.clients, request.job))
        request.why = label(request.why, 500)
        decided = await offload(self._store.decide, request.job, client.client_id, request, self._clock())
        decision = _DECISIONS[request.decision]
        log.info("judged", job=request.job, client=client.name, decision=decision, why=request.why)
        self._leases.judged(decided)
        if request.decision != pb.DECISION_LET_REPLACE and decided.considered == 0:
            await self._driver.renew(request.job, decided.reason)
        await self._statuses.changed(request.job)
        return await self.status(request.job)


def _named(name_or_id: str, clients: Sequence[Client]) -> Client:
    """A client by its id, or by its name where only one has it. Who takes another's id for a name is found by its own
    id alone."""
    matching = [client for client in clients if name_or_id == public_id(client.client_id)]
    matching = matching or [client for client in clients if name_or_id == client.name]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise NotFound(f"no client {name_or_id!r} has joined this job", hint="coordinator show JOB lists them")
    ids = ", ".join(public_id(client.client_id) for client in matching)
    raise Refused(f"{len(matching)} clients are called {name_or_id!r}", hint=f"name one by its id: {ids}")
