"""gRPC in, daemon out: translate, delegate, and map errors to statuses in one place."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import metrics
from coordinator.auth.gate import Gate
from coordinator.auth.identity import Identity
from coordinator.auth.policy import Caller
from coordinator.auth.sessions import Sessions
from coordinator.daemon import Daemon
from coordinator.rpc import transport
from oneround import stream
from oneround.errors import NotEnough, OneroundError, UsageError
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]

_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 1),
    ("grpc.keepalive_time_ms", 30_000),  # find out that a laptop's lid was closed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", 64),  # of one connection
    ("grpc.max_metadata_size", 16 * 1024),
    # What waits on a stream for its turn is 4 KiB, not a window that grows with the link; see uploads/flow_control.py.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 * 1024),
    # A connection keeps what it last read into for as long as it is open: pieces of 8 KiB, but from 12 KiB on 64 KiB.
    ("grpc.experimental.tcp_max_read_buffer_size", 12 * 1024 - 1),
]
ACCEPTORS = 16
DOWNLOADING_BYTES = 8 * 1024 * 1024  # of all downloads together, read from the disk and not yet sent


def create(
    daemon: Daemon,
    identity: Identity,
    listen: str,
    *,
    insecure: bool,
    healthy: health.aio.HealthServicer | None = None,
    reflect: bool = False,
    certificates: transport.Certificates | None = None,
) -> tuple[Server, str]:
    """A server that is not yet started, and the address that it is bound to.

    `healthy` answers health checks; with `reflect`, tools may ask for the services. `certificates` says what is shown
    to whom, if it is not just the identity's to all. The operator's calls are taken on this machine's own socket alone.

    Raises:
        UsageError: the address cannot be bound.
    """
    _nobody_listens(listen)
    shown = certificates or transport.Certificates(identity)
    sessions = Sessions(identity.session_secret, "" if insecure else shown.fingerprint, daemon.now)
    gate = Gate(daemon.people, daemon.for_whom, sessions, identity.admin_token, daemon.now)
    servicers = Federation(daemon, gate), healthy or health.aio.HealthServicer()
    acceptors: list[grpc.aio.Server] = []
    host, _, port = listen.rpartition(":")
    try:
        for _ in range(ACCEPTORS):
            acceptor = grpc.aio.server(options=_OPTIONS, interceptors=[_Decoding()])
            rpc.add_FederationServicer_to_server(servicers[0], acceptor)
            health_pb2_grpc.add_HealthServicer_to_server(servicers[1], acceptor)
            if reflect:
                names = pb.DESCRIPTOR.services_by_name["Federation"].full_name, health.SERVICE_NAME
                reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], acceptor)
            address = f"{host}:{port}"
            if insecure:
                port = str(acceptor.add_insecure_port(address))
            else:
                port = str(acceptor.add_secure_port(address, shown.credentials()))
            acceptors.append(acceptor)
    except RuntimeError as error:
        raise _taken(listen) from error
    acceptors.append(_local(daemon, gate, servicers))
    return Server(acceptors), f"{host}:{port}"


def _local(daemon: Daemon, gate: Gate, servicers: tuple[Federation, health.aio.HealthServicer]) -> grpc.aio.Server:
    """What the operator's commands talk to: everything, without TLS, on a socket of this machine."""
    where = transport.socket(daemon.state)
    server = grpc.aio.server(options=_OPTIONS, interceptors=[_Decoding()])
    rpc.add_AdminServicer_to_server(Admin(daemon, gate), server)
    rpc.add_FederationServicer_to_server(servicers[0], server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers[1], server)
    try:
        server.add_insecure_port(where)
        Path(where.removeprefix("unix:")).chmod(0o600)  # nobody else's
    except (RuntimeError, OSError) as error:
        raise NotEnough(f"cannot listen on {where}", hint="give --state a folder on a local disk") from error
    return server


class Server:
    """Several gRPC servers on one port, of which the system gives each connection to one.

    One of them takes up one new call with every turn of the event loop. Among hundreds of uploads that is some dozens a
    second, and a thousand clients' heartbeats would wait for many seconds.
    """

    def __init__(self, acceptors: Sequence[grpc.aio.Server]) -> None:
        self._acceptors = acceptors

    async def start(self) -> None:
        await asyncio.gather(*(acceptor.start() for acceptor in self._acceptors))

    async def stop(self, grace: float | None) -> None:
        """Take no new calls; those that are open get so many seconds."""
        await asyncio.gather(*(acceptor.stop(grace) for acceptor in self._acceptors))


def _nobody_listens(address: str) -> None:
    """Our own servers share a port, so the system would let a second daemon share it too.

    Raises:
        UsageError: somebody listens there, or it cannot be bound.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended a moment ago is no matter
            probe.bind(where)
    except OSError as error:
        raise _taken(address) from error


def _taken(address: str) -> UsageError:
    return UsageError(f"cannot listen on {address}: is another daemon there?", hint="--listen HOST:PORT")


class _Decoding(grpc.aio.ServerInterceptor):
    """Bytes that are no message become None, which every call refuses and which ends a stream; gRPC by itself would
    answer UNKNOWN, and log a page for each."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        parse = handler.request_deserializer

        def parsed(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError:
                return None

        return handler._replace(request_deserializer=parsed)


@asynccontextmanager
async def _answered(context: Context, method: str, request: object) -> AsyncIterator[None]:
    """Turn our errors into statuses; anything else is our fault, logged, and INTERNAL."""
    with metrics.timed(method) as call:
        try:
            if request is None:
                raise UsageError("these bytes are no message of this protocol")
            yield
        except OneroundError as error:
            call.status, said = error.status, _short(str(error))
            log.info("refused", method=method, status=error.status, reason=said, peer=context.peer())
            trailing = (("hint-bin", _short(error.hint).encode()),) if error.hint else ()
            await context.abort(grpc.StatusCode[error.status], said, trailing_metadata=trailing)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE):
                call.status = "INTERNAL"
                log.exception("fault", method=method)
                await context.abort(grpc.StatusCode.INTERNAL, "a fault in the coordinator; its log has the details")
            call.status = "RESOURCE_EXHAUSTED"
            log.error("disk", method=method, reason=str(error))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the coordinator cannot write: {error.strerror}")
        except (grpc.aio.AbortError, asyncio.CancelledError):
            call.status = "CANCELLED"
            raise
        except Exception as error:
            if context.cancelled() or isinstance(error, grpc.aio.BaseError | grpc.aio.UsageError):
                call.status = "CANCELLED"  # the client went away
                raise
            call.status = "INTERNAL"
            log.exception("fault", method=method)
            await context.abort(grpc.StatusCode.INTERNAL, "a fault in the coordinator; its log has the details")


def _short(text: str) -> str:
    """What fits into a status: errors quote what a peer said, and gRPC drops trailers over 8 KiB."""
    return text if len(text) <= 500 else f"{text[:500]} …"


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


class Federation(rpc.FederationServicer):
    """What clients call. The doors say who it is and what they may; the daemon does it."""

    def __init__(self, daemon: Daemon, gate: Gate) -> None:
        self._daemon, self._gate = daemon, gate
        self._threads = ThreadPoolExecutor(4, "download")
        self._downloads = 0

    @asynccontextmanager
    async def _known(self, context: Context, method: str, request: object) -> AsyncIterator[Caller]:
        async with _answered(context, method, request):
            yield self._gate.caller(dict(context.invocation_metadata() or ()), context.peer())

    async def Challenge(self, request: pb.ChallengeRequest, context: Context) -> pb.ChallengeReply:
        async with _answered(context, "Challenge", request):
            return self._gate.challenge()

    async def SignIn(self, request: pb.SignInRequest, context: Context) -> pb.SignInReply:
        async with _answered(context, "SignIn", request):
            return await self._gate.sign_in(request)

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsReply:
        async with self._known(context, "ListJobs", request) as caller:
            names = await self._gate.visible(caller, await self._daemon.names())
            return pb.ListJobsReply(jobs=await self._daemon.outlines(names), now_unix=self._daemon.now())

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.Job:
        async with self._known(context, "Describe", request) as caller:
            name = request.job or await self._only(caller)
            await self._gate.see(caller, name)
            return await self._daemon.describe(name)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        async with self._known(context, "Join", request) as caller:
            request.job = request.job or await self._only(caller)
            if not await self._gate.enter(caller, request.job, request.client_name):
                return pb.JoinReply(awaits_approval=True, job=await self._daemon.describe(request.job))
            reply = await self._daemon.join(request, caller.client_id)
            await self._gate.joined(caller, request.job, request.client_name)
            return reply

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        async with self._known(context, "Heartbeat", request) as caller:
            await self._daemon.belongs(request.lease, caller.client_id)
            return await self._daemon.heartbeat(request)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        async with self._known(context, "Download", request) as caller:
            await self._gate.be_in(caller, request.job)
            file = await self._daemon.file(request.job, request.digest)
            if request.offset > file.stat().st_size:
                raise UsageError(f"byte {request.offset} is past the end of this file")
            self._downloads += 1
            try:
                async for data in stream.chunks(file, request.offset, self._threads, self._chunk_bytes):
                    yield pb.Chunk(data=data)
                    metrics.GIVEN.inc(len(data))
            finally:
                self._downloads -= 1

    def _chunk_bytes(self) -> int:
        """The more downloads, the smaller their pieces: what is on its way for all of them together stays the same."""
        return max(16 * 1024, min(stream.MAX_CHUNK_BYTES, DOWNLOADING_BYTES // max(self._downloads, 1)))

    async def OpenUpload(self, request: pb.OpenUploadRequest, context: Context) -> pb.OpenUploadReply:
        async with self._known(context, "OpenUpload", request) as caller:
            await self._may_give(caller, request.lease)
            return await self._daemon.open_upload(request)

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context) -> pb.Receipt:
        async with self._known(context, "Upload", request_iterator) as caller:
            return await self._daemon.upload(_Messages(context), partial(self._may_give, caller))

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawReply:
        async with self._known(context, "Withdraw", request) as caller:
            await self._daemon.belongs(request.lease, caller.client_id)
            await self._daemon.withdraw(request.lease)
            return pb.WithdrawReply()

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportReply:
        async with self._known(context, "Report", request) as caller:
            await self._may_give(caller, request.lease)
            await self._daemon.report(request)
            return pb.ReportReply()

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.JobStatus]:
        async with self._known(context, "Watch", request) as caller:
            await self._gate.see(caller, request.job)
            async for status in self._daemon.statuses.watch(request.job):
                yield status

    async def _may_give(self, caller: Caller, lease: str) -> None:
        """Raises what is to be answered when a lease is another's, or its client was let in and is not any more."""
        await self._gate.be_in(caller, await self._daemon.belongs(lease, caller.client_id))

    async def _only(self, caller: Caller) -> str:
        return await self._daemon.only_open(await self._gate.visible(caller, await self._daemon.names()))


class Admin(rpc.AdminServicer):
    """What the operator's commands call; each call proves that it may."""

    def __init__(self, daemon: Daemon, gate: Gate) -> None:
        self._daemon, self._gate = daemon, gate

    @asynccontextmanager
    async def _authorised(self, context: Context, method: str, request: object) -> AsyncIterator[None]:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not self._gate.is_operator(str(given)):
            log.warning("admin_refused", method=method, peer=context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this call needs the coordinator's admin token")
        async with _answered(context, method, request):
            yield

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Submit", request):
            return await self._daemon.submit(request.spec)

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Show", request):
            return await self._daemon.status(request.job)

    async def Close(self, request: pb.CloseRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Close", request):
            return await self._daemon.close(request.job)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Cancel", request):
            return await self._daemon.cancel(request.job)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteReply:
        async with self._authorised(context, "Delete", request):
            await self._daemon.delete(request.job)
            return pb.DeleteReply()

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Publish", request):
            return await self._daemon.publish(request)

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JobStatus:
        async with self._authorised(context, "Judge", request):
            return await self._daemon.judge(request)

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenReply:
        async with self._authorised(context, "CreateToken", request):
            return await self._gate.create_token(request)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensReply:
        async with self._authorised(context, "ListTokens", request):
            return await self._gate.tokens()

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.Token:
        async with self._authorised(context, "RevokeToken", request):
            return await self._gate.revoke_token(request.id)

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsReply:
        async with self._authorised(context, "ListClients", request):
            return await self._gate.clients(request.job)

    async def Settle(self, request: pb.SettleRequest, context: Context) -> pb.KnownClient:
        async with self._authorised(context, "Settle", request):
            return await self._gate.settle(request)
