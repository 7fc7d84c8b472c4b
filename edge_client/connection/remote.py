"""The coordinator as the client sees it. The only file that knows the stub and gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc
from google.protobuf.message import Message

from edge_client.connection import channel, identity, tls_probe
from edge_client.connection.channel import CALL_SECONDS, Connection, OnFirstUse
from edge_client.connection.identity import ClientKey, Pins
from oneround import files, rules, stream
from oneround.errors import BadData, Refused, Unreachable, from_status
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb

# What is fetched, by the ends of names: models, adapters, settings, signatures and texts. No program, and no pickle,
# which can be one.
_KINDS = frozenset({".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".signature"})

_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
_PASSING = _GONE | {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_files = ThreadPoolExecutor(2, "files")  # read, hash and write what travels

OnBytes = Callable[[int], None]  # called with how many bytes of the file are across so far
# Looks for the coordinator of a connection that is lost; gives another connection to it, or None to stay on this one.
FindAgain = Callable[[Connection], Awaitable[Connection | None]]


async def stay(lost: Connection) -> Connection | None:
    """For one who does not look: gRPC connects to the same place again by itself."""
    return None


class Remote:
    """The coordinator, over one connection at a time. Methods raise OneroundError: Refused for a no, Unreachable when
    nobody answers."""

    def __init__(
        self,
        connection: Connection,
        me: ClientKey | None = None,
        *,
        token: str = "",
        find_again: FindAgain = stay,
    ) -> None:
        """Calls are made as `me`; `token` is the secret of one, to come in by. `find_again` says where to resume when
        the coordinator does not answer any more."""
        self.connection = connection
        self.me = me or identity.passing()
        self._token = token
        self.token_job = ""  # the job that the token is for, once signed in
        self._find_again = find_again
        self._looking = asyncio.Lock()

    @property
    def server(self) -> str:
        """HOST:PORT."""
        return self.connection.server

    @property
    def certificate(self) -> bytes:
        """PEM; empty without TLS."""
        return self.connection.certificate

    @property
    def fingerprint(self) -> str:
        """The key's, in hex; empty without TLS."""
        return self.connection.fingerprint

    async def find_again(self, lost: str) -> bool:
        """Resume over another connection when nobody answers at `lost` any more; whether there is another one. Calls
        that are under way stay on the old one."""
        async with self._looking:
            if self.server != lost:
                return True
            connection = await self._find_again(self.connection)
            if connection is None:
                return False
            self.connection = connection
            return True

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        reply: pb.JoinReply = await self._call("Join", request)
        return reply

    async def jobs(self) -> pb.ListJobsReply:
        """The jobs that this client may know of, newest first, and the coordinator's clock. Tells its key, no more."""
        reply: pb.ListJobsReply = await self._call("ListJobs", pb.ListJobsRequest())
        times = [reply.now_unix, *(time for job in reply.jobs for time in (job.opened_unix, job.deadline_unix))]
        if not all(map(rules.is_time, times)):
            raise BadData(f"the coordinator at {self.server} names times that are none", hint="tell who runs it")
        return reply

    async def describe(self, name: str) -> pb.Job:
        """What joining a job (the only open one, if empty) would announce."""
        job: pb.Job = await self._call("Describe", pb.DescribeRequest(job=name))
        return job

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        reply: pb.HeartbeatReply = await self._call("Heartbeat", beat)
        return reply

    async def job(self, name: str) -> pb.JobStatus:
        """The job's status now."""
        async with self._readable():
            connection, request = await self._signed_in(), pb.WatchRequest(job=name)
            async for status in connection.stub.Watch(request, timeout=CALL_SECONDS, metadata=connection.metadata):
                return status
        raise Refused(f"the coordinator says nothing of {name!r}")

    async def watch(self, name: str) -> AsyncIterator[pb.JobStatus]:
        """The job's status, now and whenever it changes."""
        async with self._readable():
            connection = await self._signed_in()
            async for status in connection.stub.Watch(pb.WatchRequest(job=name), metadata=connection.metadata):
                yield status

    async def download(self, job: str, artifact: pb.Artifact, to: Path, on_bytes: OnBytes) -> None:
        """Fetch an artifact to a file, from where an earlier try broke off; check its digest and put it in place.

        Raises:
            BadData: what came is not what was announced.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(to, artifact)
        sink = await asyncio.to_thread(stream.Sink, partial, files.sync)
        try:
            offset = partial.stat().st_size
            if offset < artifact.size:
                async with self._readable():
                    await stream.pour(self._pieces(job, artifact, offset, on_bytes), sink, _files)
            digest = await asyncio.to_thread(sink.digest)
        finally:
            await asyncio.to_thread(sink.close)
        if (size := partial.stat().st_size) < artifact.size:
            raise Unreachable(
                f"{artifact.name} broke off at byte {size} of {artifact.size}", hint="run it again, to go on"
            )
        if digest != artifact.digest:
            partial.unlink()
            raise _damaged(artifact)
        partial.replace(to)
        files.sync_folder(to.parent)

    async def read(self, job: str, artifact: pb.Artifact, at_most: int) -> bytes:
        """A small artifact's bytes.

        Raises:
            BadData: it has more than so many, or what came is not what was announced.
        """
        if artifact.size > at_most:
            raise BadData(f"{artifact.name} is announced with {artifact.size:,} bytes, which it never has")
        data = bytearray()
        async with self._readable():
            async for piece in self._pieces(job, artifact, 0, lambda _: None):
                data += piece
        if hashlib.sha256(data).hexdigest() != artifact.digest:
            raise _damaged(artifact)
        return bytes(data)

    async def _pieces(self, job: str, artifact: pb.Artifact, offset: int, on_bytes: OnBytes) -> AsyncIterator[bytes]:
        """An artifact's bytes as they come, and not one more than were announced."""
        request = pb.DownloadRequest(job=job, digest=artifact.digest, offset=offset)
        connection = await self._signed_in()
        async for chunk in connection.stub.Download(request, metadata=connection.metadata):
            offset += len(chunk.data)
            if offset > artifact.size:
                return
            yield chunk.data
            on_bytes(offset)

    async def withdraw(self, lease: str) -> None:
        await self._call("Withdraw", pb.WithdrawRequest(lease=lease))

    async def report(self, lease: str, evaluation: pb.Evaluation) -> None:
        """Tell how well a publication does on this client's data, in these numbers and nothing else."""
        await self._call("Report", pb.ReportRequest(lease=lease, evaluation=evaluation))

    async def upload(self, lease: str, declaration: pb.Declaration, file: Path, on_bytes: OnBytes) -> pb.Receipt:
        """Send the contribution from the offset that the coordinator has; returns the receipt.

        Raises:
            Unreachable: also for troubles of the coordinator that may pass, such as a full disk.
        """
        opened: pb.OpenUploadReply = await self._call(
            "OpenUpload", pb.OpenUploadRequest(lease=lease, declaration=declaration), passing=_PASSING
        )
        if opened.HasField("receipt"):
            return opened.receipt

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            sent = opened.committed_offset
            yield pb.UploadRequest(lease=lease, offset=sent)  # where earlier coordinators look for the lease
            for data in stream.pieces(file, sent):
                sent += len(data)
                yield pb.UploadRequest(data=data)
                on_bytes(sent)

        async with self._readable(passing=_PASSING):
            connection = await self._signed_in()
            return await connection.stub.Upload(messages(), metadata=[*connection.metadata, ("lease", lease)])

    async def _call(self, method: str, request: Message, passing: frozenset[grpc.StatusCode] = _GONE) -> Any:
        """A call with one answer. A session that is over meanwhile, as after a day asleep, is begun anew, once."""
        async with self._readable(passing):
            had_session = bool(self.connection.session)
            try:
                return await self._once(method, request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED or not had_session:
                    raise
                self.connection.session = ""
            return await self._once(method, request)

    async def _once(self, method: str, request: Message) -> Any:
        connection = await self._signed_in()
        return await getattr(connection.stub, method)(request, timeout=CALL_SECONDS, metadata=connection.metadata)

    async def _signed_in(self) -> Connection:
        """The connection for a call, with a session on it."""
        connection = self.connection
        async with connection.signing_in:
            if connection.has_to_sign_in:
                reply = await connection.sign_in(self.me, self._token)
                self.token_job = reply.job or self.token_job
                self._token = ""  # it has let this client in; who is refused later does not come in by it again
        return connection

    @asynccontextmanager
    async def _readable(self, passing: frozenset[grpc.StatusCode] = _GONE) -> AsyncIterator[None]:
        """Statuses back into the errors that the coordinator raised; those that may pass are Unreachable."""
        connection = self.connection
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if error.code() in _GONE:
                # "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused"
                raise tls_probe.unreachable(connection.server, (error.details() or "").rpartition(": ")[2]) from error
            if error.code() is grpc.StatusCode.UNAUTHENTICATED and connection.session:
                connection.session = ""
                raise Unreachable(
                    f"the session with the coordinator at {connection.server} is over",
                    hint="run the same command again",
                ) from error
            if error.code() in passing:
                details = one_line(error.details() or "")
                raise Unreachable(f"the coordinator at {connection.server} has a trouble: {details}") from error
            hint: Any = dict(error.trailing_metadata() or ()).get("hint-bin", b"")
            details, try_next = one_line(error.details() or ""), one_line(hint.decode(errors="replace"))
            raise from_status(error.code().name, details, try_next) from error


@asynccontextmanager
async def connect(
    server: str,
    pins: Pins,
    on_first_use: OnFirstUse,
    *,
    key: str = "",
    trusted: str = "",
    own: tls_probe.ClientCertificate | None = None,
    insecure: bool = False,
    me: ClientKey | None = None,
    token: str = "",
) -> AsyncIterator[Remote]:
    """The coordinator at HOST:PORT, over a connection that channel.opened opens, and raises as it does. Calls are made
    as `me`, or as the client whose pins these are; `token` is the secret of one, to come in by."""
    me = me or identity.me(pins.state, keep=pins.keep)
    async with channel.opened(
        server, pins, on_first_use, key=key, trusted=trusted, own=own, insecure=insecure
    ) as connection:
        yield Remote(connection, me, token=token)


def local_path(folder: Path, artifact: pb.Artifact) -> Path:
    """Where an artifact belongs in a folder of ours.

    Raises:
        BadData: its name would lead out of the folder, or it is of a kind that we have no use for.
    """
    if not stream.is_name(artifact.name):
        raise BadData(f"the coordinator names an artifact {artifact.name[:80]!r}, which is not a path inside a folder")
    if not stream.is_digest(artifact.digest):
        raise BadData(f"the coordinator names no SHA-256 for {artifact.name}")
    name = PurePosixPath(artifact.name)
    if name.suffix not in _KINDS and name.name != "Modelfile":
        raise BadData(f"the coordinator offers {artifact.name}: files of this kind are never fetched")
    file = folder.joinpath(*name.parts)
    if not file.parent.resolve().is_relative_to(folder.resolve()):
        raise BadData(f"{file} would be outside of {folder}: a folder on the way is a link", hint="remove that link")
    return file


def partial_path(to: Path, artifact: pb.Artifact) -> Path:
    """Where an artifact is while it comes; what is here of another version does not help."""
    return to.with_name(f".{to.name}.{artifact.digest[:12]}")


def _damaged(artifact: pb.Artifact) -> BadData:
    return BadData(
        f"{artifact.name} came damaged: its SHA-256 is not the one that was announced",
        hint="run it again; if it comes like that every time, tell the person who runs the coordinator",
    )
