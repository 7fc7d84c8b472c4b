"""The coordinator as the client sees it. The only file that knows the stub and gRPC."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from converters import tensors
from converters.errors import BadData, Refused, Unreachable, from_status
from edge_client import probe, trust
from edge_client.identity import Pins
from oneround import stream, tls
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

CALL_SECONDS = 60.0
_OPTIONS = [
    ("grpc.max_receive_message_length", stream.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
]

_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
_PASSING = _GONE | {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_files = ThreadPoolExecutor(2, "files")  # read, hash and write what travels

OnBytes = Callable[[int], None]  # called with how many bytes of the file are across so far
OnFirstUse = Callable[
    [trust.Shown], Awaitable[None] | None
]  # called before a key is pinned; may ask, and raise Refused


class Remote:
    """A connection. Methods raise OneroundError: Refused for a no, Unreachable when nobody answers."""

    def __init__(self, server: str, channel: grpc.aio.Channel, certificate: bytes = b"", before: str = "") -> None:
        self.server = server
        self.certificate = certificate  # PEM; empty without TLS
        self.before = before  # the key that was pinned until now, and that the certificate's follows
        self._stub = rpc.FederationStub(channel)

    @property
    def fingerprint(self) -> str:
        """The key's, in hex; empty without TLS."""
        return tls.fingerprint(self.certificate) if self.certificate else ""

    def go_on_over(self, other: Remote) -> None:
        """Use another's connection from now on: the same coordinator, at another place or with another certificate."""
        self.server, self.certificate, self._stub = other.server, other.certificate, other._stub
        self.before = other.before

    async def find_again(self, lost: str) -> bool:
        """Whether there is another place to go on at, when nobody answers at `lost`. See reach.Roaming."""
        return self.server != lost

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        async with self._readable():
            return await self._stub.Join(request, timeout=CALL_SECONDS)

    async def jobs(self) -> pb.ListJobsReply:
        """What anybody may know of the coordinator's jobs, newest first, and its clock. Says nothing of who asks."""
        async with self._readable():
            return await self._stub.ListJobs(pb.ListJobsRequest(), timeout=CALL_SECONDS)

    async def describe(self, name: str) -> pb.Job:
        """What joining a job (the only open one, if empty) would announce."""
        async with self._readable():
            return await self._stub.Describe(pb.DescribeRequest(job=name), timeout=CALL_SECONDS)

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        async with self._readable():
            return await self._stub.Heartbeat(beat, timeout=CALL_SECONDS)

    async def job(self, name: str) -> pb.JobStatus:
        """The job's status now."""
        async with self._readable():
            async for status in self._stub.Watch(pb.WatchRequest(job=name), timeout=CALL_SECONDS):
                return status
        raise Refused(f"the coordinator says nothing of {name!r}")

    async def watch(self, name: str) -> AsyncIterator[pb.JobStatus]:
        """The job's status, now and whenever it changes."""
        async with self._readable():
            async for status in self._stub.Watch(pb.WatchRequest(job=name)):
                yield status

    async def download(self, job: str, artifact: pb.Artifact, to: Path, on_bytes: OnBytes) -> None:
        """Fetch an artifact to a file, from where an earlier try broke off; check its digest and put it in place.

        Raises:
            BadData: what came is not what was announced.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(to, artifact)
        sink = await asyncio.to_thread(stream.Sink, partial, tensors.sync)
        try:
            offset = partial.stat().st_size
            if offset < artifact.size:
                async with self._readable():
                    await stream.pour(self._pieces(job, artifact, offset, on_bytes), sink, _files)
            found = await asyncio.to_thread(sink.digest)
        finally:
            await asyncio.to_thread(sink.close)
        if (there := partial.stat().st_size) < artifact.size:
            raise Unreachable(
                f"{artifact.name} broke off at byte {there} of {artifact.size}", hint="run it again, to go on"
            )
        if found != artifact.digest:
            partial.unlink()
            raise BadData(
                f"{artifact.name} came damaged: its SHA-256 is not the one that was announced", hint="run it again"
            )
        partial.replace(to)
        tensors.sync_folder(to.parent)

    async def _pieces(self, job: str, artifact: pb.Artifact, offset: int, on_bytes: OnBytes) -> AsyncIterator[bytes]:
        """An artifact's bytes as they come, and not one more than were announced."""
        async for chunk in self._stub.Download(pb.DownloadRequest(job=job, digest=artifact.digest, offset=offset)):
            offset += len(chunk.data)
            if offset > artifact.size:
                return
            yield chunk.data
            on_bytes(offset)

    async def withdraw(self, lease: str) -> None:
        async with self._readable():
            await self._stub.Withdraw(pb.WithdrawRequest(lease=lease), timeout=CALL_SECONDS)

    async def report(self, lease: str, evaluation: pb.Evaluation) -> None:
        """Tell how well a publication does on this client's data, in these numbers and nothing else."""
        async with self._readable():
            await self._stub.Report(pb.ReportRequest(lease=lease, evaluation=evaluation), timeout=CALL_SECONDS)

    async def upload(self, lease: str, declaration: pb.Declaration, file: Path, on_bytes: OnBytes) -> pb.Receipt:
        """Send the contribution from the offset that the coordinator has; returns the receipt.

        Raises:
            Unreachable: also for troubles of the coordinator that may pass, such as a full disk.
        """
        async with self._readable(passing=_PASSING):
            opened = await self._stub.OpenUpload(
                pb.OpenUploadRequest(lease=lease, declaration=declaration), timeout=CALL_SECONDS
            )
        if opened.HasField("receipt"):
            return opened.receipt

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            sent = opened.committed_offset
            yield pb.UploadRequest(lease=lease, offset=sent)
            for data in stream.pieces(file, sent):
                sent += len(data)
                yield pb.UploadRequest(data=data)
                on_bytes(sent)

        async with self._readable(passing=_PASSING):
            return await self._stub.Upload(messages())

    @asynccontextmanager
    async def _readable(self, passing: frozenset[grpc.StatusCode] = _GONE) -> AsyncIterator[None]:
        """Statuses back into the errors that the coordinator raised; those that may pass are Unreachable."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if error.code() in _GONE:
                # "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused"
                raise probe.unreachable(self.server, (error.details() or "").rpartition(": ")[2]) from error
            if error.code() in passing:
                raise Unreachable(f"the coordinator at {self.server} has a trouble: {error.details()}") from error
            hint: Any = dict(error.trailing_metadata() or ()).get("hint-bin", b"")
            raise from_status(error.code().name, error.details() or "", hint.decode()) from error


@asynccontextmanager
async def connect(
    server: str,
    pins: Pins,
    on_first_use: OnFirstUse,
    *,
    key: str = "",
    trusted: str = "",
    own: probe.Own | None = None,
    insecure: bool = False,
) -> AsyncIterator[Remote]:
    """A connection to the coordinator at HOST:PORT whose key is the pinned one, or follows it.

    `key` is that of one that has moved: another one is taken for nobody. `trusted` is the key that a person has named,
    which is pinned whatever was pinned there before. `own` is shown to those who ask for a client's certificate.

    Raises:
        Refused: its key has changed, or is not the one that is trusted.
        Unreachable: nobody answers there.
    """
    if insecure:
        if await probe.speaks_tls(server):
            raise Refused(f"the coordinator at {server} speaks TLS", hint="leave --insecure out")
        async with grpc.aio.insecure_channel(server, _OPTIONS) as channel:
            yield Remote(server, channel)
        return
    shown = await probe.look(server, own)
    if key and not shown.has(key):
        raise probe.unreachable(server, "another one answers there")
    known = pins.known()
    found = trust.standing(shown, known)
    if trusted:
        trust.require_named(shown, trusted)
    else:
        trust.require(shown, found, known, pins.state)
    trust.require_dates(shown.certificate, datetime.datetime.now(datetime.UTC))
    if found is trust.Standing.NEW and not (trusted or key) and (asking := on_first_use(shown)) is not None:
        await asking
    pins.pin(server, shown.fingerprint, shown.earlier)
    # The certificate just seen is the only root: whoever answers on this channel must hold its key.
    credentials = grpc.ssl_channel_credentials(shown.certificate, *(own.read() if own else ()))
    name = ("grpc.ssl_target_name_override", tls.name(shown.certificate))
    async with grpc.aio.secure_channel(server, credentials, [*_OPTIONS, name]) as channel:
        yield Remote(server, channel, shown.certificate, trust.left_behind(shown, known))


def local_path(folder: Path, artifact: pb.Artifact) -> Path:
    """Where an artifact belongs in a folder of ours.

    Raises:
        BadData: its name would lead out of the folder.
    """
    name = PurePosixPath(artifact.name)
    if name.is_absolute() or not name.parts or ".." in name.parts or "\\" in artifact.name or "\0" in artifact.name:
        raise BadData(f"the coordinator names an artifact {artifact.name!r}, which is not a path inside a folder")
    if not stream.is_digest(artifact.digest):
        raise BadData(f"the coordinator names no SHA-256 for {artifact.name}")
    return folder.joinpath(*name.parts)


def partial_path(to: Path, artifact: pb.Artifact) -> Path:
    """Where an artifact is while it comes; what is here of another version does not help."""
    return to.with_name(f".{to.name}.{artifact.digest[:12]}")
