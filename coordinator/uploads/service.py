"""The one upload: declared, taken from the committed offset, synced, checked, committed; then the receipt."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from converters.updates import sizes
from coordinator import metrics
from coordinator import round as rounds
from coordinator.auth.signer import Signer
from coordinator.jobs import spec as jobs
from coordinator.jobs.leases import Lease
from coordinator.round import Round
from coordinator.storage.blobs import Blobs
from coordinator.storage.events import NewEvent
from coordinator.storage.schema import Client, Contribution
from coordinator.storage.store import Store
from coordinator.uploads.flow_control import FlowControl, PacedStream
from oneround import files, stream
from oneround.errors import BadData, Conflict, Interrupted, NotEnough, NotFound, Refused, UsageError
from oneround.v1 import federation_pb2 as pb

MAX_STREAMS = 1024  # open at a time; each has a file
SMALL_MESSAGES = 1024  # an upload's messages are 1 KiB and more on average, but for so many

log = structlog.get_logger()
offload = asyncio.to_thread


class UploadService:
    """Takes contributions into the store and the blobs. Which streams are open is all that it keeps to itself."""

    def __init__(self, store: Store, blobs: Blobs, signer: Signer, clock: Callable[[], float]) -> None:
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._clock = clock
        self._streams = 0
        self._claims: dict[str, dict[str, int]] = {}  # bytes by job and client
        self._turns = FlowControl()
        self._strangers = FlowControl(32, patience=5.0, idle=10.0)
        self._threads = ThreadPoolExecutor(4, "upload")

    async def open(self, lease: Lease, declared: pb.Declaration, round: Round) -> pb.OpenUploadReply:
        """How much of the declared contribution is here; its receipt when all of it is.

        Raises:
            Refused: another contribution of this client is in, or the job takes no more.
            NotEnough: there is no room for it on the disk, or within the job's quota.
        """
        client = lease.client
        job = self._store.announced(client.job).job
        stored = await self._stored(lease)
        if stored is not None and stored.digest == declared.digest:
            return pb.OpenUploadReply(committed_offset=stored.size, receipt=self._signer.receipt(stored))
        if stored is not None and not stored.may_replace:
            raise _conflict(stored)
        if not rounds.takes_contributions(round, self._clock()):
            raise Refused(f"job {client.job!r} takes no more contributions: it is {round.state} ({round.reason})")
        _check(declared, job)
        if lease.declaration is None or lease.declaration.digest != declared.digest:
            self._only_stream(lease)
            self._blobs.discard(client.job, client.client_id, but=declared.digest)
        committed = self._blobs.committed(self._blobs.partial(client.job, client.client_id, declared.digest))
        disk = shutil.disk_usage(self._blobs.uploads)
        if disk.free - disk.total // 100 < declared.size - committed:
            raise NotEnough("the coordinator's disk has no room for this upload")
        await self._claim(client, declared.size, jobs.size(job.spec.upload.quota))
        lease.declaration = declared
        revision = stored.revision + 1 if stored is not None else 1
        lease.notice(pb.Event(upload_opened=pb.UploadOpened(revision=revision, size=declared.size)), self._clock())
        return pb.OpenUploadReply(committed_offset=committed)

    async def take(self, lease: Lease, messages: PacedStream[pb.UploadRequest]) -> Contribution:
        """Take a contribution's bytes from the committed offset, and commit it once they are safe.

        Raises:
            UsageError: nothing comes, or the first message names another lease.
            Interrupted: the stream broke off, is too slow, or does not begin where it should; it may be taken up again.
            BadData: the bytes are not those that were declared; they are dropped.
        """
        first = await messages.next()
        if first is None:
            raise UsageError("an empty upload: the first message has the offset")
        if first.lease not in ("", lease.client.lease):
            raise UsageError("the first message names another lease than the call's metadata")
        client, declared = lease.client, lease.declaration
        stored = await self._stored(lease)
        if stored is not None and not stored.may_replace:
            return stored
        if declared is None:
            raise Refused("no upload was declared; call OpenUpload first")
        self._only_stream(lease)
        if self._streams >= MAX_STREAMS:
            raise NotEnough(f"{MAX_STREAMS} uploads are open already; try again")
        self._streams += 1
        lease.uploading = True
        try:
            partial = self._blobs.partial(client.job, client.client_id, declared.digest)
            await self._receive(declared, partial, first, messages)
            before = lease.unrecorded
            stored = await offload(self._commit, partial, Contribution.sent(client, declared, self._clock()), before)
            lease.recorded(before)
            lease.contributed = True
            return stored
        finally:
            lease.uploading = False
            self._streams -= 1

    def release(self, client: Client) -> None:
        """A client will send nothing, or nothing more: its claim and what is here of its upload go."""
        self._claims.get(client.job, {}).pop(client.client_id, None)
        self._blobs.discard(client.job, client.client_id)

    def forget(self, job: str) -> None:
        """A job is gone."""
        self._claims.pop(job, None)

    async def _stored(self, lease: Lease) -> Contribution | None:
        """A client's contribution, if there is one. The daemon alone writes, so there is none that its lease does not
        know of."""
        if not lease.contributed:
            return None
        return await offload(self._store.contribution, lease.client.job, lease.client.client_id)

    async def _claim(self, client: Client, size: int, quota: int) -> None:
        """Keep so many bytes of the job's quota for a client.

        Raises:
            NotEnough: with them, all that is in or declared is over it.
        """
        if client.job not in self._claims:
            stored = await offload(self._store.bytes_of, client.job)
            before = {
                client_id: self._blobs.committed(file)
                for file, job, client_id in self._blobs.partials()
                if job == client.job
            }
            self._claims.setdefault(client.job, before | {"": stored})  # unless another one has asked meanwhile
        claims = self._claims[client.job]
        if sum(claims.values()) - claims.get(client.client_id, 0) + size > quota:
            raise NotEnough(f"the uploads of job {client.job!r} have reached its quota; see upload.quota")
        claims[client.client_id] = size

    def stream(self, messages: AsyncIterator[pb.UploadRequest], *, authorised: bool) -> PacedStream[pb.UploadRequest]:
        """A stream of chunks, which waits for its turns; the caller closes it."""
        return PacedStream(messages, self._turns if authorised else self._strangers, self._turns)

    def _commit(self, partial: Path, contribution: Contribution, before: Sequence[NewEvent]) -> Contribution:
        """The bytes get their place before the row that stands for them; a crash between leaves the upload whole."""
        with self._blobs.changing:
            if not partial.exists():
                raise NotFound(f"job {contribution.job!r} was deleted, or this client has withdrawn")
            self._blobs.put(partial, contribution.digest)
            try:
                stored = self._store.contribute(contribution, before)
            except NotFound:
                self._blobs.drop({contribution.digest} - self._store.digests())
                raise
            self._blobs.discard(contribution.job, contribution.client_id)
            return stored

    def _only_stream(self, lease: Lease) -> None:
        """A stream that broke is noticed within a minute; until then another try has to wait."""
        if lease.uploading:
            raise Interrupted("another stream of this client is still open")

    async def _receive(
        self, declared: pb.Declaration, partial: Path, first: pb.UploadRequest, rest: PacedStream[pb.UploadRequest]
    ) -> None:
        offset = self._blobs.committed(partial)
        if first.offset != offset:
            raise Interrupted(f"the upload starts at byte {first.offset}; {offset} are here")
        loop = asyncio.get_running_loop()
        sink = await loop.run_in_executor(self._threads, stream.Sink, partial, files.sync)
        try:
            data = self._data(first, rest, offset, declared.size)
            await stream.pour(data, sink, self._threads, rest.written)
            digest = await loop.run_in_executor(self._threads, sink.digest)
        finally:
            await loop.run_in_executor(self._threads, sink.close)
        if digest != declared.digest:
            self._blobs.discard(*partial.name.rsplit(".", 2)[:2])
            raise BadData(
                f"the upload's SHA-256 is {digest}, but {declared.digest} was declared; what came was discarded",
                hint="edge-client join again, which sends it from the start",
            )

    async def _data(
        self, first: pb.UploadRequest, rest: PacedStream[pb.UploadRequest], offset: int, size: int
    ) -> AsyncIterator[bytes]:
        """The stream's bytes, held against what was declared."""
        message: pb.UploadRequest | None = first
        start, count = offset, 0
        while message is not None:
            count += 1
            if message.HasField("offset") and message.offset != offset:
                raise Interrupted(f"a chunk for byte {message.offset} came where byte {offset} is due")
            if len(message.data) > stream.MAX_CHUNK_BYTES or offset + len(message.data) > size:
                raise UsageError(f"more bytes came than the {size} that were declared")
            offset += len(message.data)
            if count > SMALL_MESSAGES + (offset - start) // 1024:
                raise UsageError("the upload comes in too many small pieces")
            metrics.UPLOADED.inc(len(message.data))
            data, message = message.data, None
            yield data
            del data  # what waits for its turn holds nothing
            if offset == size:
                if not await rest.ends():
                    raise UsageError(f"more bytes came than the {size} that were declared")
                return
            message = await rest.next()
        raise Interrupted(f"the upload ended at byte {offset} of {size}")


def _conflict(stored: Contribution) -> Conflict:
    """What a client hears that sends another contribution than the one that is in."""
    return Conflict(
        f"this client's contribution to {stored.job!r} is in already, and it is another one",
        hint=f"ask the operator for `coordinator replace {stored.job} CLIENT`",
    )


def _check(declared: pb.Declaration, job: pb.Job) -> None:
    if not stream.is_digest(declared.digest):
        raise UsageError("the declared digest is not a SHA-256 in lower-case hex")
    if declared.steps >= 1 << 32 or not math.isfinite(declared.train_loss):
        raise UsageError("the declared steps or loss cannot be")
    largest = sizes.most_upload_bytes(job)
    if not 0 < declared.size <= largest:
        raise UsageError(f"an upload of {declared.size} bytes is declared; this job's adapters have at most {largest}")
