"""The effects: what clients send and the round decides, done to the database, the disk and the publisher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import sqlalchemy
import structlog

from converters import llama
from coordinator import round as rounds
from coordinator.admission.worker import AdmissionWorker
from coordinator.auth import identity
from coordinator.auth.signer import Signer
from coordinator.jobs import evaluations
from coordinator.jobs import open as open_job
from coordinator.jobs import spec as jobs
from coordinator.jobs.leases import Lease, Leases, judgement, public_id
from coordinator.jobs.status import Statuses
from coordinator.publication import request as republishing
from coordinator.publication.scheduler import PublicationScheduler
from coordinator.round import Round, State
from coordinator.storage import gc
from coordinator.storage.blobs import Blobs
from coordinator.storage.people import People
from coordinator.storage.publications import version_folder
from coordinator.storage.schema import Client, Contribution
from coordinator.storage.store import Store
from coordinator.uploads.service import UploadService
from oneround import signing
from oneround.errors import BadModel, Conflict, Denied, NotFound, OneroundError, Refused, UsageError
from oneround.text import label
from oneround.v1 import federation_pb2 as pb

TICK = 0.5  # seconds between looks at the clock
WRITE_DOWN = 5.0  # seconds between two writings of what heartbeats said
THREADS = 3  # that talk to the database; more would only keep each other, and the event loop, waiting

log = structlog.get_logger()
offload = asyncio.to_thread


class Daemon:
    """One coordinator over one state folder. Methods raise OneroundError; the server maps it to a status."""

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
        self._state = state
        self._clock = clock
        self._blobs = Blobs(state, blobs)
        self._store = Store(database or sqlalchemy.URL.create("sqlite", database=str(state / "coordinator.sqlite")))
        self._rounds: dict[str, Round] = {}  # as last seen by the loop or an event
        self.leases = Leases(self._store, clock)
        self._signer = Signer(signing.private(key or identity.load_or_create(state).key), self._store)
        self.uploads = UploadService(self._store, self._blobs, self._signer, clock)
        self._examiner = AdmissionWorker(self._store, self._blobs, clock)
        self.statuses = Statuses(self._store, self.leases, state / "publications", clock)
        self._publishing = PublicationScheduler(state, self._store, self._blobs, self._signer, self.statuses, clock)
        self._submitting = asyncio.Lock()
        self.people = People(self._store.database)
        self._slow = ThreadPoolExecutor(1, "slow")  # reading a large base keeps nobody else waiting
        gc.sweep(state, self._store, self._blobs)

    @property
    def state(self) -> Path:
        """Its folder."""
        return self._state

    async def run(self) -> None:
        """Judge what comes in, close rounds in time and publish what is closed, until cancelled."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "short"))
        background = [asyncio.create_task(self._examiner.run(self._judged)), asyncio.create_task(self._keep_notes())]
        try:
            while not any(task.done() for task in background):
                try:
                    for name, round in (await offload(self._store.rounds)).items():
                        self._rounds[name] = round
                        if round.state is State.PUBLISHING:
                            self._publishing.start(name, self._published, self._failed)
                        elif rounds.apply(round, rounds.Tick(), self._clock()) != round:
                            await self._advance(name, rounds.Tick())
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
            await self._publishing.end()
            with suppress(OneroundError):
                await offload(self.leases.write_down)

    async def _keep_notes(self) -> None:
        while True:
            await asyncio.sleep(WRITE_DOWN)
            try:
                await offload(self.leases.write_down)
            except OneroundError as error:
                log.error("waits", reason=str(error))

    def release(self) -> None:
        """Let go of the database; nothing of the daemon works after it."""
        self._store.close()

    # The operator

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
            known = jobs.filled(self._store.announced(spec.name).job.spec)
            if known.model.base == spec.model.base:
                spec.model.revision = known.model.revision
            if known != spec:
                raise Conflict(f"there is a different job {spec.name!r} here", hint="give this one another name")
            return await self.status(spec.name)
        if spec.name in await offload(self._store.deleted):
            raise Refused(f"the last job {spec.name!r} is still being deleted", hint="try again in a moment")
        opens = partial(open_job.open_round, spec, self._state, self._blobs, self._store, self._clock())
        await asyncio.get_running_loop().run_in_executor(self._slow, opens)
        log.info("job_opened", job=spec.name, base=spec.model.base)
        await self.statuses.changed(spec.name)
        return await self.status(spec.name)

    async def close(self, name: str) -> pb.JobStatus:
        """Take nothing more, and publish what is in."""
        await self._advance(name, rounds.CloseByHand())
        return await self.status(name)

    async def cancel(self, name: str) -> pb.JobStatus:
        """End a round without a publication.

        Raises:
            Refused: something is published already.
        """
        after = await self._advance(name, rounds.CancelByHand())
        if after.state is not State.CANCELLED:
            raise Refused(
                f"job {name!r} is {after.state}, and cannot be cancelled any more",
                hint=f"coordinator close {name}, to take nothing more",
            )
        await self._publishing.stop(name)
        return await self.status(name)

    async def delete(self, name: str) -> None:
        """Forget a job and all of its files.

        Raises:
            Refused: it is at work.
        """
        await offload(self._store.mark_deleted, name)
        self._rounds.pop(name, None)
        self.leases.forget(name)
        self.uploads.forget(name)
        await self.statuses.changed(name)
        await offload(gc.delete, self._state, self._store, self._blobs, name)
        log.info("job_deleted", job=name)

    async def publish(self, request: pb.PublishRequest) -> pb.JobStatus:
        """Make a new version of what is in, by the job's method or another; nobody trains anything.

        Raises:
            UsageError: the method or a parameter is not one, or cannot take what is in.
            Refused: there is nothing to publish, or a version is being made.
        """
        spec = republishing.asked(self._store.announced(request.job).job.spec, request)
        spec = await offload(republishing.check, spec, self._store, self._blobs)
        before = await offload(self._store.round, request.job)
        request.aggregate.CopyFrom(spec.aggregate)
        request.reason = label(request.reason, 500) or "asked for by the operator"
        after = await self._advance(request.job, rounds.PublishByHand(request.reason), request)
        if after.state is not State.PUBLISHING or before.state is State.PUBLISHING:
            why = "has no contribution that takes part" if not before.admitted else f"is {before.state}"
            raise Refused(f"job {request.job!r} {why}", hint=f"coordinator show {request.job}")
        return await self.status(request.job)

    async def judge(self, request: pb.JudgeRequest) -> pb.JobStatus:
        """Admit or exclude a contribution by hand, or let its client send another.

        Raises:
            NotFound: there is no such client, or several.
        """
        decisions = {pb.DECISION_ADMIT: "admit", pb.DECISION_EXCLUDE: "exclude", pb.DECISION_LET_REPLACE: "replace"}
        if request.decision not in decisions:
            raise UsageError("no decision is given")
        client = _named(request.client, await offload(self._store.clients, request.job))
        decision, why = decisions[request.decision], label(request.why, 500)
        kept = await offload(self._store.judge, request.job, client.client_id, decision, why)
        log.info("judged", job=request.job, client=client.name, decision=decision, why=why)
        self.leases.judged(kept)
        if decision != "replace" and kept.considered == 0:
            await self._renew(request.job, kept.reason)
        await self.statuses.changed(request.job)
        return await self.status(request.job)

    async def _renew(self, name: str, reason: str) -> None:
        """A decision by hand shows at once where something is published; else the first version takes it in."""
        round = await offload(self._store.round, name)
        if round.version:
            await self._advance(name, rounds.PublishByHand(reason))

    # Clients

    async def join(self, request: pb.JoinRequest, client_id: str) -> pb.JoinReply:
        """A lease and the job for a client; the receipt too, if its contribution is in."""
        name = request.job
        job = (await offload(self._store.announced, name)).job
        given = await offload(self._store.contribution, name, client_id)
        round = await self._round(name)
        if given is None and not rounds.takes_contributions(round, self._clock()):
            raise Refused(
                f"job {name!r} takes no more contributions: it is {round.state} ({round.reason})",
                hint=f"edge-client pull {name}",
            )
        machine = pb.Machine(
            platform=label(request.machine.platform),
            backend=label(request.machine.backend),
            device=label(request.machine.device),
        )
        known_as = label(request.client_name) or public_id(client_id)
        row = Client.joining(name, client_id, known_as, machine, self._clock())
        client = await offload(self._store.join, row)
        self.leases.heard(self.leases.hold(client, given))
        log.info("joined", job=name, client=client.name, backend=machine.backend)
        await self.statuses.changed(name)
        reply = pb.JoinReply(lease=client.lease, job=job)
        if given is not None:
            reply.receipt.CopyFrom(self._signer.receipt(given))
            reply.judgement.CopyFrom(judgement(given))
            reply.may_replace = given.may_replace
        return reply

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """Note how training goes; say whether to go on."""
        lease = await self._lease(beat.lease)
        self.leases.heard(lease, beat)
        reply = pb.HeartbeatReply(directive=pb.DIRECTIVE_CONTINUE, next_seconds=self.leases.pace)
        client = lease.client
        if lease.contributed:
            if lease.judgement is None:
                given = await offload(self._store.contribution, client.job, client.client_id)
                assert given is not None, "contributions do not go while their job is there"
                lease.judgement = judgement(given)
            reply.judgement.CopyFrom(lease.judgement)
            return reply
        round = await self._round(client.job)
        if client.withdrawn or not rounds.takes_contributions(round, self._clock()):
            why = "this client has withdrawn" if client.withdrawn else f"the round is {round.state}: {round.reason}"
            return pb.HeartbeatReply(directive=pb.DIRECTIVE_STOP, reason=why)
        return reply

    async def withdraw(self, token: str) -> None:
        """A client leaves; its upload is dropped, and its contribution takes no part in the versions to come."""
        lease = await self._lease(token)
        client = lease.client
        if lease.uploading:
            raise Refused("a stream of this client is still open")
        given = await offload(self._store.contribution, client.job, client.client_id)
        await offload(self._store.withdraw, client)
        client.withdrawn = True
        self.uploads.release(client)
        log.info("withdrawn", job=client.job, client=client.name)
        if given is not None:
            await self._renew(client.job, f"{client.name} has withdrawn")
        await self.statuses.changed(client.job)

    async def report(self, request: pb.ReportRequest) -> None:
        """Keep what a client finds of a publication.

        Raises:
            UsageError: a number is missing, or cannot be.
            NotFound: there is no such version.
        """
        lease = await self._lease(request.lease)
        evaluations.check(request.evaluation)
        await offload(self._store.report, lease.client, request.evaluation, self._clock())
        log.info("evaluated", job=lease.client.job, client=lease.client.name, version=request.evaluation.version)

    async def open_upload(self, request: pb.OpenUploadRequest) -> pb.OpenUploadReply:
        """How much of the declared contribution is here; its receipt when all of it is."""
        lease = await self._lease(request.lease)
        self.leases.heard(lease)
        return await self.uploads.open(lease, request.declaration, await self._round(lease.client.job))

    async def upload(
        self, messages: AsyncIterator[pb.UploadRequest], may: Callable[[str], Awaitable[None]]
    ) -> pb.Receipt:
        """Take the bytes of a contribution; the receipt once they are safe. It is judged after that. `may` is called
        with the lease, before anything is taken, and raises what is to be answered to who may not send."""
        rest = self.uploads.stream(messages)
        try:
            first = await rest.next()
            if first is None:
                raise UsageError("an empty upload: the first message names the lease")
            await may(first.lease)
            lease = await self._lease(first.lease)
            self.leases.heard(lease)
            given = await self.uploads.take(lease, first, rest)
        finally:
            rest.close()
        self.leases.judged(given)
        log.info("contribution", job=given.job, client=lease.client.name, digest=given.digest, size=given.size)
        self.leases.heard(lease)
        self._examiner.look()
        await self.statuses.changed(given.job)
        return self._signer.receipt(given)

    async def file(self, name: str, digest: str) -> Path:
        """The file of one of a job's artifacts.

        Raises:
            NotFound: the job has none of this digest.
        """
        known = await offload(self._store.announced, name)
        if digest == known.job.initial.digest:
            return await offload(self._blobs.path, digest)
        for artifact in known.job.base_files:
            if artifact.digest == digest:
                file = Path(known.base_folder) / artifact.name
                if not file.is_file() or file.stat().st_size != artifact.size:
                    raise BadModel(
                        f"the base model of {name!r} has changed on the coordinator since the job was submitted",
                        hint=f"put {artifact.name} back as it was, or submit a new job",
                    )
                return file
        for published in await offload(self._store.publications, name):
            for artifact in published.artifacts:
                if artifact.digest == digest:
                    return version_folder(self._state, name, published.version) / artifact.name
        raise NotFound(f"job {name!r} has no artifact {digest!r}")

    # What anyone may ask

    async def status(self, name: str) -> pb.JobStatus:
        """All that is known of a job; for the operator."""
        return await offload(self.statuses.whole, name)

    async def describe(self, name: str) -> pb.Job:
        """What a client would be told to do."""
        return (await offload(self._store.announced, name)).job

    def now(self) -> float:
        """Seconds since the Unix epoch, by this coordinator's clock."""
        return self._clock()

    async def names(self) -> Sequence[str]:
        """Of all jobs, newest first."""
        return await offload(self._store.names)

    async def outlines(self, names: Iterable[str]) -> list[pb.JobStatus]:
        """Jobs, without their clients."""
        return [await offload(self.statuses.outline, name) for name in names]

    async def belongs(self, token: str, client_id: str) -> str:
        """The job that a lease is for.

        Raises:
            Denied: it is not this client's.
        """
        client = (await self._lease(token)).client
        if client.client_id != client_id:
            raise Denied("this lease is another client's", hint="edge-client join again")
        return client.job

    def every(self) -> list[pb.JobStatus]:
        """Every job with its clients; blocks."""
        return [self.statuses.whole(name) for name in self._store.names()]

    def for_whom(self, name: str) -> str:
        """Who may take part in a job; see auth/policy.py. Raises NotFound when there is no such job."""
        return self._store.announced(name).job.spec.access.who or "open"

    # The round

    async def _round(self, name: str) -> Round:
        """A job's round as the loop or the last event left it, half a second ago at most."""
        if name not in self._rounds:
            self._rounds[name] = await offload(self._store.round, name)
        return self._rounds[name]

    async def _lease(self, token: str) -> Lease:
        lease = self.leases.get(token)
        if lease is None:
            client = await offload(self._store.client, token)
            given = await offload(self._store.contribution, client.job, client.client_id)
            lease = self.leases.hold(client, given)
        return lease

    async def only_open(self, among: Iterable[str]) -> str:
        """The only one of some jobs that takes contributions.

        Raises:
            Refused: there is none, or there are several.
        """
        now, rounds_now = self._clock(), await offload(self._store.rounds)
        taking = [name for name in among if name in rounds_now and rounds.takes_contributions(rounds_now[name], now)]
        if len(taking) == 1:
            return taking[0]
        if not taking:
            raise Refused("no job is open here", hint="coordinator submit JOB.toml, on the coordinator's machine")
        raise Refused(
            f"several jobs are open here: {', '.join(sorted(taking))}", hint=f"edge-client join --job {min(taking)}"
        )

    async def _judged(self, given: Contribution) -> None:
        """The loop advances the round; a thousand that come at once are not worth a thousand looks at it."""
        log.info("judged", job=given.job, client=public_id(given.client_id), verdict=given.verdict, reason=given.reason)
        self.leases.judged(given)
        await self.statuses.changed(given.job)

    async def _advance(self, name: str, event: rounds.Event, request: pb.PublishRequest | None = None) -> Round:
        before, after = await offload(self._store.advance, name, event, self._clock(), request)
        self._rounds[name] = after
        if after.state != before.state:
            log.info("round", job=name, state=after.state.value, reason=after.reason)
        await self.statuses.changed(name)
        if after.state is State.PUBLISHING:
            self._publishing.start(name, self._published, self._failed)
        return after

    async def _published(self, name: str, round: Round) -> None:
        self._rounds[name] = round
        self.leases.judged_anew(name)

    async def _failed(self, name: str, reason: str) -> None:
        await self._advance(name, rounds.PublishingFailed(reason))


def _named(wanted: str, clients: Sequence[Client]) -> Client:
    """A client by its id, or by its name where only one has it. Who takes another's id for a name is found by its own
    id alone."""
    found = [client for client in clients if wanted == public_id(client.client_id)]
    found = found or [client for client in clients if wanted == client.name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"no client {wanted!r} has joined this job", hint="coordinator show JOB lists them")
    ids = ", ".join(public_id(client.client_id) for client in found)
    raise Refused(f"{len(found)} clients are called {wanted!r}", hint=f"name one by its id: {ids}")
