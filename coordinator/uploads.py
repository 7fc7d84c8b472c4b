"""The one upload: declared, taken from the committed offset, synced, checked, judged, committed; then the receipt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

from converters.errors import Refused, Unreachable, UsageError
from coordinator import admission, store
from coordinator.blobs import Blobs
from coordinator.round import State
from coordinator.store import Store
from oneround import stream
from oneround.v1 import federation_pb2 as pb

log = structlog.get_logger()
offload = asyncio.to_thread


class Uploads:
    """Takes contributions into the store and the blobs. Which streams are open is all that it keeps to itself."""

    def __init__(self, known: Store, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._store = known
        self._blobs = blobs
        self._clock = clock
        self._uploading: set[tuple[str, str]] = set()

    async def open(self, request: pb.OpenUploadRequest) -> pb.OpenUploadReply:
        """How much of the declared contribution is here; its receipt when all of it is."""
        client = await offload(self._store.client, request.lease)
        row = await offload(self._store.job, client.job)
        declared = request.declaration
        given = await offload(self._store.contribution, client.job, client.client_id)
        partial = self._blobs.partial(client.job, client.client_id)
        if given is not None:
            self._blobs.discard(partial)  # left over if the daemon died right after the commit
            if given.declaration.digest != declared.digest:
                raise Refused(f"this client's contribution to {row.name!r} is in already, and it is another one")
            return pb.OpenUploadReply(committed_offset=given.declaration.size, receipt=given.receipt)
        if row.state != State.OPEN:
            raise Refused(f"job {row.name!r} takes no more contributions: it is {row.state} ({row.reason})")
        if not stream.is_digest(declared.digest):
            raise UsageError("the declared digest is not a SHA-256 in lower-case hex")
        largest = _largest_upload(row.job)
        if not 0 < declared.size <= largest:
            raise Refused(f"an upload of {declared.size} bytes is declared; this job's adapters have at most {largest}")
        if client.declaration is not None and client.declaration.digest != declared.digest:
            self._only_stream(client)
            self._blobs.discard(partial)  # another training run's: what is here of the last one does not continue it

        def note(status: pb.ClientStatus) -> None:
            status.phase, status.last_seen_unix = pb.PHASE_UPLOADING, self._clock()

        await offload(self._store.update_client, client, note, declared)
        return pb.OpenUploadReply(committed_offset=self._blobs.committed(partial))

    async def take(self, messages: AsyncIterator[pb.UploadRequest]) -> pb.Receipt:
        """Take a contribution's bytes from the committed offset; the receipt once they are safe and judged."""
        first = await anext(messages, None)
        if first is None:
            raise UsageError("an empty upload: the first message names the lease")
        client = await offload(self._store.client, first.lease)
        key = (client.job, client.client_id)
        given = await offload(self._store.contribution, *key)
        if given is not None:
            return given.receipt
        if client.declaration is None:
            raise Refused("nothing is declared; call OpenUpload first")
        self._only_stream(client)
        self._uploading.add(key)
        try:
            await self._receive(client.declaration, self._blobs.partial(*key), first, messages)
            return await self._accept(client)
        finally:
            self._uploading.discard(key)

    def _only_stream(self, client: store.Client) -> None:
        """A stream that broke is noticed within a minute; until then another try has to wait."""
        if (client.job, client.client_id) in self._uploading:
            raise Unreachable("another stream of this client is still open")

    async def _receive(
        self, declared: pb.Declaration, partial: Path, first: pb.UploadRequest, rest: AsyncIterator[pb.UploadRequest]
    ) -> None:
        offset = self._blobs.committed(partial)
        if first.offset != offset:
            raise Unreachable(f"the upload starts at byte {first.offset}; {offset} are here")
        if offset == declared.size:
            return
        with partial.open("ab") as file:
            data = first.data
            while True:
                offset += len(data)
                if len(data) > stream.MAX_CHUNK_BYTES or offset > declared.size:
                    raise Refused(f"more bytes came than the {declared.size} that were declared")
                file.write(data)
                message = await anext(rest, None)
                if message is None:
                    break
                data = message.data
        if offset < declared.size:
            raise Unreachable(f"the upload ended at byte {offset} of {declared.size}")

    async def _accept(self, client: store.Client) -> pb.Receipt:
        declared = client.declaration
        assert declared is not None, "checked by take"
        partial = self._blobs.partial(client.job, client.client_id)
        blob = await offload(self._blobs.commit, partial, declared.digest)
        row = await offload(self._store.job, client.job)
        reason = await offload(admission.verdict, blob, declared, row.job)
        receipt = pb.Receipt(
            job=client.job,
            client_id=client.client_id,
            digest=declared.digest,
            size=declared.size,
            received_unix=self._clock(),
            admitted=not reason,
            reason=reason,
        )

        def note(status: pb.ClientStatus) -> None:
            status.phase, status.last_seen_unix = pb.PHASE_CONTRIBUTED, receipt.received_unix
            status.step = status.total_steps = declared.steps
            status.loss = declared.train_loss

        contribution = store.Contribution(
            job=client.job, client_id=client.client_id, declaration=declared, receipt=receipt
        )
        kept = await offload(self._store.contribute, contribution, note)
        self._blobs.discard(partial)
        log.info("contribution", job=client.job, client=client.status.name, admitted=kept.admitted, reason=kept.reason)
        return kept


def _largest_upload(job: pb.Job) -> int:
    """Bytes of this job's adapter in float32, with room for the header."""
    rank = job.spec.lora.rank
    factors = sum(rank * (module.out_features + module.in_features) for module in job.modules)
    return 4 * factors + 1024 * len(job.modules) + 65536
