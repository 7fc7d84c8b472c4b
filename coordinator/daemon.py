"""The effects: what clients send and the round decides, done to the database, the disk and the publisher."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import sqlalchemy
import structlog

from converters import adapter, architectures, llama
from converters.errors import BadModel, OneroundError, Refused, UsageError
from coordinator import base, publisher, store
from coordinator import job as jobs
from coordinator import round as rounds
from coordinator.blobs import Blobs
from coordinator.round import State
from coordinator.store import Store
from coordinator.uploads import Uploads
from oneround.v1 import federation_pb2 as pb

ASLEEP_AFTER = 60.0  # seconds without a word from a client that is training
TICK = 0.5  # seconds between looks at the clock
CHECKED_NAME = 64  # longest name of a client that is shown

log = structlog.get_logger()
offload = asyncio.to_thread


class Daemon:
    """One coordinator over one state folder. Methods raise OneroundError; the server maps it to a status."""

    def __init__(self, state: Path, database: str = "", clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._clock = clock
        self._blobs = Blobs(state)
        self._store = Store(database or sqlalchemy.URL.create("sqlite", database=str(state / "coordinator.sqlite")))
        self._publishers: dict[str, asyncio.Task[None]] = {}
        self._stages: dict[str, str] = {}
        self._uploads = Uploads(self._store, self._blobs, clock)
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Close rounds in time and publish what is closed, until cancelled. Restarts what a crash interrupted."""
        try:
            while True:
                for row in await offload(self._store.jobs):
                    if row.state == State.OPEN:
                        await self._advance(row.name, rounds.Tick())
                    elif row.state == State.PUBLISHING:
                        self._start_publisher(row.name)
                await asyncio.sleep(TICK)
        finally:
            for task in self._publishers.values():
                task.cancel()
            await asyncio.gather(*self._publishers.values(), return_exceptions=True)

    def release(self) -> None:
        """Let go of the database; nothing of the daemon works after it."""
        self._store.close()

    # The operator

    async def submit(self, spec: pb.JobSpec) -> pb.JobStatus:
        """Check a job, prepare base and initial adapter, and open its round. Submitting it again changes nothing."""
        spec = jobs.check(spec)
        llama.require()
        there = {row.name: row for row in await offload(self._store.jobs)}.get(spec.name)
        if there is not None:
            known = there.job.spec
            if known.model.base == spec.model.base:
                spec.model.revision = known.model.revision
            if known != spec:
                raise Refused(f"there is a different job {spec.name!r} here", hint="give this one another name")
            return await self.status(spec.name)
        row = await offload(self._prepare, spec)
        await offload(self._store.add_job, row)
        log.info("job_opened", job=spec.name, base=spec.model.base, modules=len(row.job.modules))
        await self._tell()
        return await self.status(spec.name)

    def _prepare(self, spec: pb.JobSpec) -> store.Job:
        prepared = base.prepare(spec.model, self._state / "bases")
        if prepared.revision:
            spec.model.revision = prepared.revision
        shapes = architectures.adapted(prepared.base, spec.lora.target_modules)
        base.gguf(spec.model, prepared, self._state / "bases")

        initial = self._state / "uploads" / f"{spec.name}.initial"
        adapter.write(adapter.initial(shapes, spec.lora.rank, spec.train.seed), initial)
        size = initial.stat().st_size
        now = self._clock()
        announced = pb.Job(
            spec=spec,
            modules=[
                pb.Module(name=name, out_features=s.out, in_features=s.into) for name, s in sorted(shapes.items())
            ],
            initial=pb.Artifact(name="initial.safetensors", digest=self._blobs.adopt(initial), size=size),
            base_files=prepared.files,
            base_fingerprint=prepared.fingerprint,
            deadline_unix=now + jobs.seconds(spec.round.deadline),
            id=secrets.token_hex(16),
        )
        return store.Job(
            name=spec.name,
            job=announced,
            base_folder=str(prepared.folder),
            state=State.OPEN.value,
            reason="",
            opened=now,
            deadline=announced.deadline_unix,
        )

    async def close(self, name: str) -> pb.JobStatus:
        """Close a round by hand."""
        await self._advance(name, rounds.CloseByHand())
        return await self.status(name)

    # Clients

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        """A lease and the job; the receipt too, for a client whose contribution is in."""
        if len(request.client_id) != 32 or not all(letter in "0123456789abcdef" for letter in request.client_id):
            raise UsageError("client_id must be 32 lower-case hex digits")
        row = await offload(self._store.job, request.job) if request.job else await self._only_open()
        given = await offload(self._store.contribution, row.name, request.client_id)
        if given is None and row.state != State.OPEN:
            raise Refused(
                f"job {row.name!r} takes no more contributions: it is {row.state} ({row.reason})",
                hint=f"edge-client pull {row.name}",
            )
        status = pb.ClientStatus(
            name=_printable(request.client_name) or request.client_id[:8],
            machine=pb.Machine(
                platform=_printable(request.machine.platform),
                backend=_printable(request.machine.backend),
                device=_printable(request.machine.device),
            ),
            phase=pb.PHASE_TRAINING,
            last_seen_unix=self._clock(),
        )
        client = await offload(self._store.join, row.name, request.client_id, status)
        log.info("joined", job=row.name, client=status.name, backend=status.machine.backend)
        await self._tell()
        return pb.JoinReply(lease=client.lease, job=row.job, receipt=given.receipt if given else None)

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """Note how training goes; say whether to go on."""
        client = await offload(self._store.client, beat.lease)
        now = self._clock()

        def note(status: pb.ClientStatus) -> None:
            status.step, status.total_steps = beat.step, beat.total_steps
            status.loss, status.tokens_per_second = beat.loss, beat.tokens_per_second
            status.last_seen_unix = now

        await offload(self._store.update_client, client, note)
        await self._tell()
        row = await offload(self._store.job, client.job)
        given = await offload(self._store.contribution, client.job, client.client_id)
        if given is not None or row.state == State.OPEN:
            return pb.HeartbeatReply(directive=pb.DIRECTIVE_CONTINUE)
        return pb.HeartbeatReply(directive=pb.DIRECTIVE_STOP, reason=f"the round is {row.state}: {row.reason}")

    async def open_upload(self, request: pb.OpenUploadRequest) -> pb.OpenUploadReply:
        """How much of the declared contribution is here; its receipt when all of it is."""
        reply = await self._uploads.open(request)
        await self._tell()
        return reply

    async def upload(self, messages: AsyncIterator[pb.UploadRequest]) -> pb.Receipt:
        """Take a contribution's bytes; the receipt once they are safe and judged."""
        receipt = await self._uploads.take(messages)
        await self._advance(receipt.job, rounds.Admitted(receipt.client_id) if receipt.admitted else rounds.Tick())
        return receipt

    async def file(self, name: str, digest: str) -> Path:
        """The file of one of a job's artifacts."""
        row = await offload(self._store.job, name)
        if digest == row.job.initial.digest:
            return self._blobs.path(digest)
        for artifact in row.job.base_files:
            if artifact.digest == digest:
                file = Path(row.base_folder) / artifact.name
                if not file.is_file() or file.stat().st_size != artifact.size:
                    raise BadModel(
                        f"the base model of {name!r} has changed on the coordinator since the job was submitted",
                        hint=f"put {artifact.name} back as it was, or submit a new job",
                    )
                return file
        for published in await offload(self._store.publications, name):
            for artifact in published.publication.artifacts:
                if artifact.digest == digest:
                    return Path(published.publication.folder) / artifact.name
        raise Refused(f"job {name!r} has no artifact {digest}")

    # What anyone may ask

    async def all(self) -> list[pb.JobStatus]:
        return [await self.status(row.name) for row in await offload(self._store.jobs)]

    async def status(self, name: str) -> pb.JobStatus:
        """All that is known of one job."""
        return await offload(self._status, name)

    def _status(self, name: str) -> pb.JobStatus:
        row = self._store.job(name)
        given = {contribution.client_id: contribution for contribution in self._store.contributions(name)}
        status = pb.JobStatus(
            spec=row.job.spec,
            state=pb.State.Value(f"STATE_{row.state.upper()}"),
            reason=row.reason,
            opened_unix=row.opened,
            deadline_unix=row.deadline,
            publications=[published.publication for published in self._store.publications(name)],
            stage=self._stages.get(name, ""),
        )
        for client in self._store.clients(name):
            shown = status.clients.add()
            shown.CopyFrom(client.status)
            if client.client_id in given:
                contribution = given[client.client_id]
                shown.contribution.declaration.CopyFrom(contribution.declaration)
                shown.contribution.admitted = contribution.receipt.admitted
                shown.contribution.reason = contribution.receipt.reason
            elif self._clock() - shown.last_seen_unix > ASLEEP_AFTER:
                shown.phase = pb.PHASE_ASLEEP
        return status

    async def watch(self, name: str) -> AsyncIterator[pb.JobStatus]:
        """The job's status, now and whenever it changes."""
        last = None
        while True:
            async with self._changed:
                status = await self.status(name)
                if status == last:
                    with suppress(TimeoutError):  # leases fall asleep without an event
                        await asyncio.wait_for(self._changed.wait(), timeout=5.0)
                    continue
            yield status
            last = status

    # The round

    async def _only_open(self) -> store.Job:
        rows = [row for row in await offload(self._store.jobs) if row.state == State.OPEN]
        if len(rows) == 1:
            return rows[0]
        if not rows:
            raise Refused("no job is open here", hint="coordinator submit JOB.toml, on the coordinator's machine")
        names = ", ".join(row.name for row in rows)
        raise Refused(f"several jobs are open here: {names}", hint=f"edge-client join --job {rows[0].name}")

    async def _advance(self, name: str, event: rounds.Event) -> None:
        before, after = await offload(self._store.advance, name, event, self._clock())
        if after != before:
            log.info("round", job=name, state=after.state.value, reason=after.reason)
        await self._tell()
        if after.state == State.PUBLISHING:
            self._start_publisher(name)

    def _start_publisher(self, name: str) -> None:
        if name not in self._publishers:
            task = asyncio.create_task(self._publish(name))
            self._publishers[name] = task
            task.add_done_callback(lambda _: self._publishers.pop(name, None))

    async def _publish(self, name: str) -> None:
        async def on_stage(stage: str) -> None:
            self._stages[name] = stage
            log.info("publishing", job=name, stage=stage)
            await self._tell()

        try:
            published = await publisher.run(self._state, self._store, self._blobs, name, on_stage)
        except Exception as error:
            # Whatever it is, the operator is told and the round stops trying, or it would try for ever.
            log.error("publishing_failed", job=name, reason=str(error), exc_info=not isinstance(error, OneroundError))
            await self._advance(name, rounds.PublishingFailed(f"{error}; `coordinator close {name}` tries again"))
            return
        finally:
            self._stages.pop(name, None)
        await offload(self._store.publish, published, self._clock())
        log.info("published", job=name, version=published.version, folder=published.publication.folder)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _printable(text: str) -> str:
    """A name from the wire, fit to be shown in a terminal."""
    return "".join(letter for letter in text if letter.isprintable())[:CHECKED_NAME].strip()
