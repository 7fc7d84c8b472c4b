"""The coordinator as the client sees it. The only file that knows the stub and gRPC."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc
from google.protobuf.message import Message

from edge_client.connection import identity, tls_probe, trust
from edge_client.connection.identity import ClientKey, Pins
from oneround import files, rules, signing, stream, tls
from oneround.errors import BadData, Refused, Unreachable, from_status
from oneround.text import one_line
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc

# What is fetched, by the ends of names: models, adapters, settings, signatures and texts. No program, and no pickle,
# which can be one.
_KINDS = frozenset({".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".signature"})

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
    [trust.ShownCertificate], Awaitable[None] | None
]  # called before a key is pinned; may ask, and raise Refused


class Remote:
    """A connection. Methods raise OneroundError: Refused for a no, Unreachable when nobody answers."""

    def __init__(
        self,
        server: str,
        channel: grpc.aio.Channel,
        certificate: bytes = b"",
        me: ClientKey | None = None,
        *,
        token: str = "",
        before: str = "",
    ) -> None:
        """`certificate` is PEM, and empty without TLS; `before` is the key that was pinned until now, and that the
        certificate's follows; `token` is the secret of one, to come in by."""
        self.server = server
        self.certificate = certificate
        self.before = before
        self.channel = channel
        self._stub = rpc.FederationStub(channel)
        self.me = me or identity.passing()
        self._token = token
        self.token_job = ""  # the job that the token is for, once signed in
        self._session, self._renew_at = "", 0.0
        self._signing_in = asyncio.Lock()

    @property
    def fingerprint(self) -> str:
        """The key's, in hex; empty without TLS."""
        return tls.fingerprint(self.certificate) if self.certificate else ""

    def go_on_over(self, other: Remote) -> None:
        """Use another's connection from now on: the same coordinator, at another place or with another certificate."""
        self.__dict__ |= other.__dict__

    async def find_again(self, lost: str) -> bool:
        """Whether there is another place to go on at, when nobody answers at `lost`. See reach.Roaming."""
        return self.server != lost

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
            known = await self._signed_in()
            async for status in self._stub.Watch(pb.WatchRequest(job=name), timeout=CALL_SECONDS, metadata=known):
                return status
        raise Refused(f"the coordinator says nothing of {name!r}")

    async def watch(self, name: str) -> AsyncIterator[pb.JobStatus]:
        """The job's status, now and whenever it changes."""
        async with self._readable():
            async for status in self._stub.Watch(pb.WatchRequest(job=name), metadata=await self._signed_in()):
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
            found = await asyncio.to_thread(sink.digest)
        finally:
            await asyncio.to_thread(sink.close)
        if (there := partial.stat().st_size) < artifact.size:
            raise Unreachable(
                f"{artifact.name} broke off at byte {there} of {artifact.size}", hint="run it again, to go on"
            )
        if found != artifact.digest:
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
        wanted = pb.DownloadRequest(job=job, digest=artifact.digest, offset=offset)
        async for chunk in self._stub.Download(wanted, metadata=await self._signed_in()):
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
            yield pb.UploadRequest(lease=lease, offset=sent)
            for data in stream.pieces(file, sent):
                sent += len(data)
                yield pb.UploadRequest(data=data)
                on_bytes(sent)

        async with self._readable(passing=_PASSING):
            return await self._stub.Upload(messages(), metadata=await self._signed_in())

    async def _call(self, method: str, request: Message, passing: frozenset[grpc.StatusCode] = _GONE) -> Any:
        """A call with one answer. A session that is over meanwhile, as after a day asleep, is begun anew, once."""
        async with self._readable(passing):
            had = self._session
            try:
                known = await self._signed_in()
                return await getattr(self._stub, method)(request, timeout=CALL_SECONDS, metadata=known)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED or not had:
                    raise
                self._session = ""
            known = await self._signed_in()
            return await getattr(self._stub, method)(request, timeout=CALL_SECONDS, metadata=known)

    async def _signed_in(self) -> Sequence[tuple[str, str]]:
        """What goes with every call, so that the coordinator knows who makes it."""
        async with self._signing_in:
            if not self._session or time.monotonic() > self._renew_at:
                self._session = ""
                asked: pb.ChallengeReply = await self._stub.Challenge(pb.ChallengeRequest(), timeout=CALL_SECONDS)
                request = pb.SignInRequest(
                    key=self.me.public_key,
                    challenge=asked.challenge,
                    signature=signing.sign(
                        self.me.key, signing.sign_in(self.fingerprint, asked.challenge, self._token)
                    ),
                    token=self._token,
                )
                reply: pb.SignInReply = await self._stub.SignIn(request, timeout=CALL_SECONDS)
                self._session, self.token_job = reply.session, reply.job or self.token_job
                self._token = ""  # it has let this client in; who is refused later does not come in by it again
                self._renew_at = time.monotonic() + reply.holds_seconds / 2
        return [("authorization", f"Session {self._session}")]

    @asynccontextmanager
    async def _readable(self, passing: frozenset[grpc.StatusCode] = _GONE) -> AsyncIterator[None]:
        """Statuses back into the errors that the coordinator raised; those that may pass are Unreachable."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if error.code() in _GONE:
                # "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused"
                raise tls_probe.unreachable(self.server, (error.details() or "").rpartition(": ")[2]) from error
            if error.code() is grpc.StatusCode.UNAUTHENTICATED and self._session:
                self._session = ""
                raise Unreachable(
                    f"the session with the coordinator at {self.server} is over", hint="run the same command again"
                ) from error
            if error.code() in passing:
                said = one_line(error.details() or "")
                raise Unreachable(f"the coordinator at {self.server} has a trouble: {said}") from error
            hint: Any = dict(error.trailing_metadata() or ()).get("hint-bin", b"")
            said, try_next = one_line(error.details() or ""), one_line(hint.decode(errors="replace"))
            raise from_status(error.code().name, said, try_next) from error


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
    """A connection to the coordinator at HOST:PORT whose key is the pinned one, or follows it.

    `key` is that of one that has moved: another one is taken for nobody. `trusted` is the key that a person has named,
    which is pinned whatever was pinned there before. `own` is shown to those who ask for a client's certificate. Made
    as `me`, or as who the pins are of; `token` is the secret of one, to come in by.

    Raises:
        Refused: its key has changed, or is not the one that is trusted.
        Unreachable: nobody answers there.
    """
    me = me or identity.me(pins.state, keep=pins.keep)
    if insecure:
        if await tls_probe.speaks_tls(server):
            raise Refused(f"the coordinator at {server} speaks TLS", hint="leave --insecure out")
        async with grpc.aio.insecure_channel(server, _OPTIONS) as channel:
            yield Remote(server, channel, me=me, token=token)
        return
    shown = await tls_probe.look(server, own)
    if key and not shown.has(key):
        raise tls_probe.unreachable(server, "another one answers there")
    known = pins.known()
    found = trust.standing(shown, known)
    if trusted:
        trust.require_named(shown, trusted)
    else:
        trust.require(shown, found, known, pins.state)
    trust.require_dates(shown.certificate, datetime.datetime.now(datetime.UTC))
    if found is trust.KeyStanding.NEW and not (trusted or key) and (asking := on_first_use(shown)) is not None:
        await asking
    pins.pin(server, shown.fingerprint, shown.earlier)
    # The certificate just seen is the only root: whoever answers on this channel must hold its key.
    credentials = grpc.ssl_channel_credentials(shown.certificate, *(own.read() if own else ()))
    name = ("grpc.ssl_target_name_override", tls.name(shown.certificate))
    async with grpc.aio.secure_channel(server, credentials, [*_OPTIONS, name]) as channel:
        before = trust.left_behind(shown, known)
        yield Remote(server, channel, shown.certificate, me, token=token, before=before)


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
