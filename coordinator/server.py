"""gRPC in, daemon out: translate, delegate, and map errors to statuses in one place."""

from __future__ import annotations

import asyncio
import errno
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog

from converters.errors import OneroundError, UsageError
from coordinator.daemon import Daemon
from coordinator.identity import Identity
from oneround import stream
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]

_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second daemon on the same port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),  # find out that a laptop's lid was closed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def create(daemon: Daemon, identity: Identity, listen: str, *, insecure: bool) -> tuple[grpc.aio.Server, str]:
    """A server that is not yet started, and the address that it is bound to.

    Raises:
        UsageError: the address cannot be bound.
    """
    server = grpc.aio.server(options=_OPTIONS)
    rpc.add_FederationServicer_to_server(Federation(daemon), server)
    rpc.add_AdminServicer_to_server(Admin(daemon, identity.admin_token), server)
    host, _, _ = listen.rpartition(":")
    try:
        if insecure:
            port = server.add_insecure_port(listen)
        else:
            credentials = grpc.ssl_server_credentials([(identity.key, identity.certificate)])
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {listen}: is another daemon there?", hint="--listen HOST:PORT") from error
    return server, f"{host}:{port}"


@asynccontextmanager
async def _answered(context: Context) -> AsyncIterator[None]:
    """Turn our errors into statuses; anything else is our fault, logged, and INTERNAL."""
    try:
        yield
    except OneroundError as error:
        log.info("refused", status=error.status, reason=str(error))
        trailing = (("hint-bin", error.hint.encode()),) if error.hint else ()
        await context.abort(grpc.StatusCode[error.status], str(error), trailing_metadata=trailing)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            log.exception("fault")
            await context.abort(grpc.StatusCode.INTERNAL, "a fault in the coordinator; its log has the details")
        log.error("disk", reason=str(error))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator cannot write: {error.strerror}")
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("fault")
        await context.abort(grpc.StatusCode.INTERNAL, "a fault in the coordinator; its log has the details")


class Federation(rpc.FederationServicer):
    """What clients call."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsReply:
        async with _answered(context):
            return pb.ListJobsReply(jobs=await self._daemon.all())

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        async with _answered(context):
            return await self._daemon.join(request)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        async with _answered(context):
            return await self._daemon.heartbeat(request)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        async with _answered(context):
            file = await self._daemon.file(request.job, request.digest)
            for data in stream.chunks(file, request.offset):
                yield pb.Chunk(data=data)

    async def OpenUpload(self, request: pb.OpenUploadRequest, context: Context) -> pb.OpenUploadReply:
        async with _answered(context):
            return await self._daemon.open_upload(request)

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context) -> pb.Receipt:
        async with _answered(context):
            return await self._daemon.upload(aiter(request_iterator))

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.JobStatus]:
        async with _answered(context):
            async for status in self._daemon.watch(request.job):
                yield status


class Admin(rpc.AdminServicer):
    """What the operator's commands call; each call proves that it may."""

    def __init__(self, daemon: Daemon, token: str) -> None:
        self._daemon = daemon
        self._token = f"Bearer {token}"

    async def _authorise(self, context: Context) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(str(given).encode(), self._token.encode()):
            log.warning("admin_refused", peer=context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this call needs the coordinator's admin token")

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.JobStatus:
        await self._authorise(context)
        async with _answered(context):
            return await self._daemon.submit(request.spec)

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.JobStatus:
        await self._authorise(context)
        async with _answered(context):
            return await self._daemon.status(request.job)

    async def Close(self, request: pb.CloseRequest, context: Context) -> pb.JobStatus:
        await self._authorise(context)
        async with _answered(context):
            return await self._daemon.close(request.job)
