"""The calls of clients: the gate says who calls and what they may; the daemon does it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc

from coordinator import metrics
from coordinator.auth.gate import Gate
from coordinator.auth.policy import Caller
from coordinator.daemon import Daemon
from coordinator.rpc.status import Context, answered
from oneround import stream
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

DOWNLOADING_BYTES = 8 * 1024 * 1024  # of all downloads together, read from the disk and not yet sent


class Federation(rpc.FederationServicer):
    """What clients call."""

    def __init__(self, daemon: Daemon, gate: Gate) -> None:
        self._daemon, self._gate, self._participation = daemon, gate, daemon.participation
        self._threads = ThreadPoolExecutor(4, "download")
        self._downloads = 0

    @asynccontextmanager
    async def _authenticated(self, context: Context, method: str, request: object) -> AsyncIterator[Caller]:
        async with answered(context, method, request):
            yield self._gate.authenticate(_metadata(context), context.peer())

    async def Challenge(self, request: pb.ChallengeRequest, context: Context) -> pb.ChallengeReply:
        async with answered(context, "Challenge", request):
            return self._gate.challenge()

    async def SignIn(self, request: pb.SignInRequest, context: Context) -> pb.SignInReply:
        async with answered(context, "SignIn", request):
            return await self._gate.sign_in(request)

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsReply:
        async with self._authenticated(context, "ListJobs", request) as caller:
            names = await self._gate.visible(caller, await self._daemon.names())
            return pb.ListJobsReply(jobs=await self._daemon.outlines(names), now_unix=self._daemon.now())

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.Job:
        async with self._authenticated(context, "Describe", request) as caller:
            name = request.job or await self._only_open(caller)
            await self._gate.require_visible(caller, name)
            return await self._participation.describe(name)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        async with self._authenticated(context, "Join", request) as caller:
            request.job = request.job or await self._only_open(caller)
            if not await self._gate.may_join(caller, request.job, request.client_name):
                job = await self._participation.describe(request.job)
                return pb.JoinReply(awaits_approval=True, job=job)
            reply = await self._participation.join(request, caller.client_id)
            await self._gate.joined(caller, request.job, request.client_name)
            return reply

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        async with self._authenticated(context, "Heartbeat", request) as caller:
            await self._participation.job_of(request.lease, caller.client_id)
            return await self._participation.heartbeat(request)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        async with self._authenticated(context, "Download", request) as caller:
            await self._gate.require_member(caller, request.job)
            file = await self._participation.file(request.job, request.digest)
            if request.offset > file.stat().st_size:
                raise UsageError(f"byte {request.offset} is past the end of this file")
            self._downloads += 1
            try:
                async for data in stream.chunks(file, request.offset, self._threads, self._chunk_bytes):
                    yield pb.Chunk(data=data)
                    metrics.DOWNLOADED.inc(len(data))
            finally:
                self._downloads -= 1

    def _chunk_bytes(self) -> int:
        """The more downloads, the smaller their pieces: what is on its way for all of them together stays the same."""
        return max(16 * 1024, min(stream.MAX_CHUNK_BYTES, DOWNLOADING_BYTES // max(self._downloads, 1)))

    async def OpenUpload(self, request: pb.OpenUploadRequest, context: Context) -> pb.OpenUploadReply:
        async with self._authenticated(context, "OpenUpload", request) as caller:
            await self._require_holder(caller, request.lease)
            return await self._participation.open_upload(request)

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context) -> pb.Receipt:
        """Who may send is known from the call's metadata, before anything is taken. A client from before leases were
        there has its lease in the first message, which is looked at as a stranger's."""
        async with self._authenticated(context, "Upload", request_iterator) as caller:
            lease = str(_metadata(context).get("lease", ""))
            if lease:
                await self._require_holder(caller, lease)
            messages = self._daemon.uploads.stream(_Messages(context), authorised=bool(lease))
            try:
                if not lease:
                    first = await messages.peek()
                    if first is None:
                        raise UsageError("an empty upload: neither metadata nor a first message name the lease")
                    lease = first.lease
                    del first  # it is large, and `messages` has it
                    await self._require_holder(caller, lease)
                return await self._participation.upload(lease, messages)
            finally:
                messages.close()

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawReply:
        async with self._authenticated(context, "Withdraw", request) as caller:
            await self._participation.job_of(request.lease, caller.client_id)
            await self._participation.withdraw(request.lease)
            return pb.WithdrawReply()

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportReply:
        async with self._authenticated(context, "Report", request) as caller:
            await self._require_holder(caller, request.lease)
            await self._participation.report(request)
            return pb.ReportReply()

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.JobStatus]:
        async with self._authenticated(context, "Watch", request) as caller:
            await self._gate.require_visible(caller, request.job)
            async for status in self._daemon.statuses.watch(request.job):
                yield status

    async def _require_holder(self, caller: Caller, lease: str) -> None:
        """Raises Denied for a lease that is another client's, or whose client is not in its job any more."""
        await self._gate.require_member(caller, await self._participation.job_of(lease, caller.client_id))

    async def _only_open(self, caller: Caller) -> str:
        return await self._participation.only_open(await self._gate.visible(caller, await self._daemon.names()))


class _Messages(AsyncIterator[pb.UploadRequest]):
    """A stream's messages. gRPC's own iterator, like any generator, keeps the last one in memory until it is asked for
    the next; with hundreds of streams that wait for their turn, that is all the memory there is."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __anext__(self) -> pb.UploadRequest:
        message: Any = await self._context.read()
        if message is None or message is grpc.aio.EOF:
            raise StopAsyncIteration
        assert isinstance(message, pb.UploadRequest), "what is none was made None"
        return message


def _metadata(context: Context) -> dict[str, str | bytes]:
    """The call's metadata; of a key that is there twice, the last value."""
    return dict(context.invocation_metadata() or ())
