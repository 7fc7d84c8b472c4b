"""The coordinator as the client sees it. The only file that knows the stub, gRPC and TLS."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from converters import tensors
from converters.errors import BadData, Refused, Unreachable, UsageError, from_status
from edge_client.identity import Pins
from oneround import rules, stream, tls
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

# What is fetched, by the ends of names: models, adapters, settings, signatures and texts. No program, and no pickle,
# which can be one.
_KINDS = frozenset({".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".sig", ".pem"})

CONNECT_SECONDS = 10.0
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
OnFirstUse = Callable[[str, str], None]  # called with the address and the fingerprint that is being pinned


class Remote:
    """A connection. Methods raise OneroundError: Refused for a no, Unreachable when nobody answers."""

    def __init__(self, server: str, channel: grpc.aio.Channel, certificate: bytes = b"") -> None:
        self.server = server
        self.certificate = certificate  # PEM; empty without TLS
        self._stub = rpc.FederationStub(channel)

    def go_on_over(self, other: Remote) -> None:
        """Use another's connection from now on: the same coordinator, at another place."""
        self.server, self.certificate, self._stub = other.server, other.certificate, other._stub

    async def find_again(self, lost: str) -> bool:
        """Whether there is another place to go on at, when nobody answers at `lost`. See reach.Roaming."""
        return self.server != lost

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        async with self._readable():
            return await self._stub.Join(request, timeout=CALL_SECONDS)

    async def jobs(self) -> pb.ListJobsReply:
        """What anybody may know of the coordinator's jobs, newest first, and its clock. Says nothing of who asks."""
        async with self._readable():
            reply = await self._stub.ListJobs(pb.ListJobsRequest(), timeout=CALL_SECONDS)
        times = [reply.now_unix, *(time for job in reply.jobs for time in (job.opened_unix, job.deadline_unix))]
        if not all(map(rules.is_time, times)):
            raise BadData(f"the coordinator at {self.server} names times that are none", hint="tell who runs it")
        return reply

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
                raise _unreachable(self.server, (error.details() or "").rpartition(": ")[2]) from error
            if error.code() in passing:
                said = stream.one_line(error.details() or "")
                raise Unreachable(f"the coordinator at {self.server} has a trouble: {said}") from error
            hint: Any = dict(error.trailing_metadata() or ()).get("hint-bin", b"")
            said, try_next = stream.one_line(error.details() or ""), stream.one_line(hint.decode(errors="replace"))
            raise from_status(error.code().name, said, try_next) from error


@asynccontextmanager
async def connect(
    server: str, pins: Pins, on_first_use: OnFirstUse, *, key: str = "", insecure: bool = False
) -> AsyncIterator[Remote]:
    """A connection to the coordinator at HOST:PORT whose key is the pinned one; or the given one, where it has moved.

    Raises:
        Refused: its key has changed.
        Unreachable: nobody answers there.
    """
    certificate = b""
    if insecure:
        channel = grpc.aio.insecure_channel(server, _OPTIONS)
    else:
        certificate = await _certificate(server)
        fingerprint = tls.fingerprint(certificate)
        if key and fingerprint != key:
            raise _unreachable(server, "another one answers there")
        if pins.check(server, fingerprint) and not key:
            on_first_use(server, fingerprint)
        # The certificate just seen is the only root: whoever answers on this channel must hold its key.
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        channel = grpc.aio.secure_channel(server, credentials, [*_OPTIONS, ("grpc.ssl_target_name_override", tls.NAME)])
    async with channel:
        yield Remote(server, channel, certificate)


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


async def answers(server: str, key: str) -> bool:
    """Whether somebody shows this key at an address."""
    try:
        return tls.fingerprint(await _certificate(server)) == key
    except Unreachable:
        return False


async def _certificate(server: str) -> bytes:
    """The PEM certificate that the server shows; not trusted by this, only seen."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{server!r} is not HOST:PORT", hint="edge-client join --server host:50051")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except ssl.SSLError as error:
        raise _unreachable(server, f"no TLS there: {error.reason}") from error
    except TimeoutError as error:
        raise _unreachable(server, f"no answer in {CONNECT_SECONDS:.0f} s") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be a name
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise _unreachable(server, why) from error
    seen = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return ssl.DER_cert_to_PEM_cert(seen).encode()


def _unreachable(server: str, why: str) -> Unreachable:
    return Unreachable(
        f"no coordinator answers at {server}" + (f": {why}" if why else ""),
        hint="check the address and that `coordinator serve` runs there; then run the same command again",
    )
