"""Peers that mean harm, over real gRPC: each is refused by name, costs little, and keeps nobody else out."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc import StatusCode
from rich.console import Console
from structlog.testing import capture_logs

from coordinator.auth import identity
from coordinator.cli import client as control
from coordinator.cli import tables
from coordinator.daemon import Daemon
from coordinator.jobs import spec as job
from coordinator.rpc import transport
from edge_client.connection.channel import Connection
from edge_client.connection.remote import Remote
from oneround import tls
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc
from tests.attacks.refusals import EVALUATION, MALLORY, refused, status_of
from tests.clients import Crowd, connected, me, session, signed_in, speaking
from tests.daemons import ALICE, BOB, SPEC, join, judged, nothing, running, trained, written
from tests.waiting import LONG, eventually, until

_LOSSES = ("base_loss", "own_loss", "published_loss")
# What gRPC's own client says, in place of the answer, when it was still sending as the answer came.
_BROKEN = "Internal error from Core"
HUGE = [2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
# Terminal escapes, a title, a line that a log would take for another, right-to-left, and paths.
NAMES = [
    *("", " ", "\0", "../../x", "/etc/passwd", "a/b", "..", "\x1b[2J\x1b[31mroot", "\x1b]0;owned\x07", "[red]x[/red]"),
    *("x\nevent=contribution job=notes", "\u202etxt.exe", "a" * 10_000, "\x07" * 10_000, "é" * 5000, "😀", "%s%n{0}"),
]


@contextmanager
def no_fault() -> Iterator[None]:
    """Whatever a peer says, it is never a fault of ours."""
    with capture_logs() as said:
        yield
    assert not [entry for entry in said if entry["event"] == "fault"], said


@asynccontextmanager
async def attacked(state: Path, **changes: Any) -> AsyncIterator[tuple[Daemon, Crowd]]:
    """A daemon with the job `notes`, and somebody who has found it."""
    with no_fault():
        async with (
            running(state) as (daemon, address),
            connected(address, state) as remote,
        ):
            await daemon.operator.submit(job.parse({**SPEC, **changes}))
            yield daemon, remote


async def honest(remote: Crowd, folder: Path, client: str = ALICE, name: str = "notes") -> None:
    """A client that does as it should, and is served."""
    reply = await remote.join_as(client, pb.JoinRequest(job=name, client_name="honest"))
    beat = await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease, step=1, total_steps=2, loss=1.0))
    assert beat.directive == pb.DIRECTIVE_CONTINUE
    file, declaration = written(trained(reply, seed=int(client[:2], 16)), folder / f"honest-{client[:8]}")
    receipt = await remote.upload(reply.lease, declaration, file, nothing)
    assert receipt.digest == declaration.digest
    assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED


async def test_who_one_is_cannot_be_guessed(tmp_path: Path) -> None:
    async with attacked(tmp_path / "state") as (daemon, remote):
        stub, lease = remote._stub, (await join(remote)).lease
        alice = me(ALICE).client_id
        tries = ["", "0" * 64, alice, public_id(alice), lease[:-1], lease + "0", lease.upper(), "%", "' OR 1=1 --"]
        for guess in [*tries, "\0", "\x1b[2J", "x" * 10_000]:
            assert guess != lease
            await refused(stub.Heartbeat(pb.HeartbeatRequest(lease=guess)), StatusCode.PERMISSION_DENIED)
            await refused(stub.Withdraw(pb.WithdrawRequest(lease=guess)), StatusCode.PERMISSION_DENIED)
            reported = pb.ReportRequest(lease=guess, evaluation=EVALUATION)
            await refused(stub.Report(reported), StatusCode.PERMISSION_DENIED)
            opened = pb.OpenUploadRequest(lease=guess, declaration=pb.Declaration(digest="0" * 64, size=1))
            await refused(stub.OpenUpload(opened), StatusCode.PERMISSION_DENIED)
            await refused(stub.Upload(iter([pb.UploadRequest(lease=guess)])), StatusCode.PERMISSION_DENIED)
        # Sessions cannot be guessed either, nor made from what is public.
        beat = pb.HeartbeatRequest(lease=lease)
        _, whole = (await session(await remote.speaker(ALICE)))[0]
        await refused(stub.Heartbeat(beat, metadata=[]), StatusCode.UNAUTHENTICATED)
        raw = base64.urlsafe_b64decode(whole.removeprefix("Session "))
        later = raw[:16] + struct.pack(">d", 1e12) + raw[24:]
        another = bytes.fromhex(me(MALLORY).client_id) + raw[16:]
        forged = [base64.urlsafe_b64encode(made).decode() for made in (later, another, raw[:-1], raw + b"x", raw[:24])]
        for shape in ["", "a", alice, "=" * 9999, "é", f"{raw!r}", *forged]:
            given = [("authorization", f"Session {shape}")]
            if shape.isascii():
                await refused(stub.Heartbeat(beat, metadata=given), StatusCode.UNAUTHENTICATED)
        for given in (whole.removeprefix("Session "), whole.lower(), whole.replace("Session", "Bearer")):
            await refused(stub.Heartbeat(beat, metadata=[("authorization", given)]), StatusCode.UNAUTHENTICATED)

        # What anybody may ask tells nobody enough to speak for another.
        public = (await stub.ListJobs(pb.ListJobsRequest())).SerializeToString()
        public += (await stub.Describe(pb.DescribeRequest(job="notes"))).SerializeToString()
        async for status in stub.Watch(pb.WatchRequest(job="notes")):
            public += status.SerializeToString()
            break
        for secret in (lease, alice, public_id(alice), ALICE[:5]):
            assert secret.encode() not in public
        shown = (await daemon.operator.status("notes")).SerializeToString()  # and neither what the operator may
        assert lease.encode() not in shown and alice.encode() not in shown
        await honest(remote, tmp_path)


async def test_only_the_token_administers(tmp_path: Path) -> None:
    async with attacked(tmp_path / "state") as (daemon, remote):
        async with control.channel(tmp_path / "state") as (channel, right):
            token = right[0][1]
            stub = rpc.AdminStub(channel)
            calls = [
                (stub.Submit, pb.SubmitRequest(spec=job.parse({**SPEC, "name": "mine"}))),
                (stub.Show, pb.ShowRequest(job="notes")),
                (stub.Close, pb.CloseRequest(job="notes")),
                (stub.Cancel, pb.CancelRequest(job="notes")),
                (stub.Delete, pb.DeleteRequest(job="notes")),
                (stub.Publish, pb.PublishRequest(job="notes")),
                (stub.Judge, pb.JudgeRequest(job="notes", client="aaaaa", decision=pb.DECISION_EXCLUDE)),
                (stub.CreateToken, pb.CreateTokenRequest(job="notes", holds_seconds=60)),
                (stub.ListTokens, pb.ListTokensRequest()),
                (stub.RevokeToken, pb.RevokeTokenRequest(id="0" * 8)),
                (stub.ListClients, pb.ListClientsRequest()),
                (stub.Settle, pb.SettleRequest(client="aaaaa", settlement=pb.SETTLEMENT_BAN)),
            ]
            assert {call._method.decode().rpartition("/")[2] for call, _ in calls} == {
                method.name for method in pb.DESCRIPTOR.services_by_name["Admin"].methods
            }
            wrong = (None, "", "Bearer", "Bearer ", token[:-1], token.removeprefix("Bearer "), token + "x")
            ((_, whole),) = await session(remote)
            for value in (*wrong, whole, whole.replace("Session", "Bearer")):
                metadata = [] if value is None else [("authorization", value)]
                for call, request in calls:
                    await refused(call(request, metadata=metadata), StatusCode.UNAUTHENTICATED)
            twice = [("authorization", "Bearer x"), ("authorization", token), ("authorization", "Bearer y")]
            await refused(stub.Close(pb.CloseRequest(job="notes"), metadata=twice), StatusCode.UNAUTHENTICATED)
        assert [status.state for status in await daemon.outlines(await daemon.names())] == [pb.STATE_OPEN]
        await honest(remote, tmp_path)


async def test_names_that_mean_harm(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with attacked(state) as (daemon, remote):
        stub = remote._stub
        before = {file.relative_to(state) for file in state.rglob("*")}
        for number, name in enumerate(NAMES):
            machine = pb.Machine(platform=name, backend=name, device=name)
            asked = pb.JoinRequest(job="notes", client_name=name, machine=machine)
            await remote.join_as(f"{number:032x}", asked)
            if name:  # an empty one is the only job that is open
                await refused(stub.Join(pb.JoinRequest(job=name)), StatusCode.NOT_FOUND)
            await refused(stub.Watch(pb.WatchRequest(job=name)), StatusCode.NOT_FOUND)
            for asked_of, digest in [("notes", name), (name, "0" * 64)]:
                wanted = pb.DownloadRequest(job=asked_of, digest=digest)
                await refused(stub.Download(wanted), StatusCode.NOT_FOUND)
        shown = await daemon.operator.status("notes")
        assert len(shown.clients) == len(NAMES)
        for client in shown.clients:
            machine = client.machine
            for text in (client.name, machine.platform, machine.backend, machine.device):
                assert len(text) <= 64 and text.isprintable()
            assert client.name, "everybody is called something"
        assert "\x1b" not in _printed(shown) and "[red]x[/red]" in _printed(shown)
        assert {file.relative_to(state) for file in state.rglob("*")} == before, "no name becomes a file"
        await honest(remote, tmp_path)


def _printed(shown: pb.JobStatus) -> str:
    """As `coordinator show` has it."""
    paper = io.StringIO()
    Console(file=paper, width=200).print(tables.job(shown))
    return paper.getvalue()


async def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    async with attacked(tmp_path / "state") as (_, remote):
        stub, reply = remote._stub, await join(remote, MALLORY)
        lease = reply.lease
        for odd in (math.nan, math.inf, -math.inf, -1.0, 1e300):
            for field in ("loss", "tokens_per_second"):
                beat = pb.HeartbeatRequest(lease=lease, **{field: odd})
                await refused(stub.Heartbeat(beat), StatusCode.INVALID_ARGUMENT)
        await stub.Heartbeat(pb.HeartbeatRequest(lease=lease, step=2**32 - 1, total_steps=0))

        for offset in HUGE:  # nothing is there, which is no error, or it is said that nothing can be
            for digest in (reply.job.initial.digest, reply.job.base_files[0].digest):
                wanted = pb.DownloadRequest(job="notes", digest=digest, offset=offset)
                code, details = await status_of(stub.Download(wanted))
                assert code in (StatusCode.OK, StatusCode.INVALID_ARGUMENT), (offset, code, details)

        for changes in [
            *({loss: odd} for loss in _LOSSES for odd in (math.nan, math.inf, -math.inf, -1e-9, 1001.0)),
            *({"tokens": odd} for odd in (0, *HUGE[1:])),
        ]:
            told = pb.Evaluation()
            told.CopyFrom(EVALUATION)
            told.MergeFrom(pb.Evaluation(**changes))
            report = pb.ReportRequest(lease=lease, evaluation=told)
            await refused(stub.Report(report), StatusCode.INVALID_ARGUMENT, "cannot be")
        for field in pb.Evaluation.DESCRIPTOR.fields:
            told = pb.Evaluation()
            told.CopyFrom(EVALUATION)
            told.ClearField(field.name)  # type: ignore[arg-type]
            report = pb.ReportRequest(lease=lease, evaluation=told)
            await refused(stub.Report(report), StatusCode.INVALID_ARGUMENT, field.name)
        for version in (0, 1, 2**31, 2**32 - 1):
            told = pb.Evaluation()
            told.CopyFrom(EVALUATION)
            told.version = version
            report = pb.ReportRequest(lease=lease, evaluation=told)
            await refused(stub.Report(report), StatusCode.NOT_FOUND, "no version")

        for size in [0, *HUGE]:
            declared = pb.Declaration(digest="0" * 64, size=size, num_examples=1)
            opened = pb.OpenUploadRequest(lease=lease, declaration=declared)
            await refused(stub.OpenUpload(opened), StatusCode.INVALID_ARGUMENT, "at most")
        for digest in ("", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" * 21 + "a", "\0" * 64, "٣" * 64):
            opened = pb.OpenUploadRequest(lease=lease, declaration=pb.Declaration(digest=digest, size=10))
            await refused(stub.OpenUpload(opened), StatusCode.INVALID_ARGUMENT, "SHA-256")
        assert not list((tmp_path / "state" / "uploads").iterdir())


@pytest.mark.parametrize("field", ["num_examples", "num_tokens", "steps", "train_loss"])
async def test_declarations_that_cannot_be(tmp_path: Path, field: str) -> None:
    """Refused at once, or taken and judged: either way the operator can still look at the job."""

    async with attacked(tmp_path / "state") as (_, remote):
        odd = [math.nan, math.inf, -math.inf, -1e300] if field == "train_loss" else HUGE
        for number, value in enumerate(odd):
            reply = await join(remote, f"{number:032x}")
            file, declaration = written(trained(reply, seed=number), tmp_path / "odd")
            declaration.MergeFrom(pb.Declaration(**{field: value}))
            opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
            code, _ = await status_of(remote._stub.OpenUpload(opened))
            assert code in (StatusCode.OK, StatusCode.INVALID_ARGUMENT)
            if code == StatusCode.OK:
                await remote.upload(reply.lease, declaration, file, nothing)
                verdict = (await judged(remote, reply.lease)).verdict
                if field == "num_examples":
                    assert verdict == pb.VERDICT_QUARANTINED
            shown = await control.show(tmp_path / "state", "notes")
            assert len(shown.clients) == number + 1
            assert "notes" in _printed(shown)
            assert json.loads(json_format.MessageToJson(shown))["state"] == "STATE_OPEN"
        await honest(remote, tmp_path)


async def test_streams_that_do_not_fit(tmp_path: Path) -> None:
    """Each is refused by name, and its client can still send what it declared."""

    async with attacked(tmp_path / "state") as (_, remote):
        stub, reply = remote._stub, await join(remote, MALLORY)
        lease = reply.lease
        file, declaration = written(trained(reply), tmp_path / "mallory")
        data = file.read_bytes()

        def sent(*pieces: tuple[int, bytes]) -> Iterator[pb.UploadRequest]:
            for number, (offset, content) in enumerate(pieces):
                yield pb.UploadRequest(lease="" if number else lease, offset=offset, data=content)

        async def tried(code: StatusCode, *pieces: tuple[int, bytes], here: int) -> None:
            """A stream while so many bytes are here already."""
            opened = pb.OpenUploadRequest(lease=lease, declaration=declaration)
            assert (await stub.OpenUpload(opened)).committed_offset == here
            await refused(stub.Upload(sent(*pieces)), code)

        await tried(StatusCode.INVALID_ARGUMENT, here=0)
        await tried(StatusCode.ABORTED, (1, data[1:]), here=0)
        await tried(StatusCode.ABORTED, (2**64 - 1, data), here=0)
        # What came before a chunk that does not fit is good, and stays.
        await tried(StatusCode.ABORTED, (0, data[:10]), (11, data[11:]), here=0)
        await tried(StatusCode.ABORTED, (10, data[10:20]), (15, data[15:]), here=10)
        await tried(StatusCode.ABORTED, (20, data[20:30]), (0, data[:20]), here=20)
        await tried(StatusCode.ABORTED, (0, data), here=30)
        await tried(StatusCode.INVALID_ARGUMENT, (30, data[30:] + b"x"), here=30)
        await tried(StatusCode.INVALID_ARGUMENT, (30, bytes(1024 * 1024 + 1)), here=30)
        await tried(StatusCode.RESOURCE_EXHAUSTED, (30, bytes(8 << 20)), here=30)
        await tried(StatusCode.INVALID_ARGUMENT, (30, data[30:]), (len(data), b"x"), here=30)
        # All of it is here now. One that then sends a byte too many has said something else than it declared, and
        # sends it from the start or not at all; either way the honest bytes still come through.
        assert (await remote.upload(lease, declaration, file, nothing)).digest == declaration.digest


async def test_crumbs(tmp_path: Path) -> None:
    """A message costs a hundred times what a byte costs; an upload of single bytes is cut off."""

    async with attacked(tmp_path / "state") as (_, remote):
        reply = await join(remote, MALLORY)
        file, declaration = written(trained(reply), tmp_path / "mallory")
        data = file.read_bytes()
        opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)

        async def crumbs(here: int, crumb: int, pause: float) -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, offset=here)
            for start in range(here, len(data)):
                await asyncio.sleep(pause)  # who is not sending hears the answer
                yield pb.UploadRequest(data=data[start : start + crumb])

        for crumb in (1, 0):
            for attempt in range(12):
                here = (await remote._stub.OpenUpload(opened)).committed_offset
                code, details = await status_of(remote._stub.Upload(crumbs(here, crumb, attempt / 1000)))
                if details != _BROKEN:
                    break
            assert code == StatusCode.INVALID_ARGUMENT and "small pieces" in details, (code, details)
        await remote.upload(reply.lease, declaration, file, nothing)


async def test_lies_about_the_content(tmp_path: Path) -> None:
    async with attacked(tmp_path / "state") as (daemon, remote):
        stub, alice, mallory = remote._stub, await join(remote), await join(remote, MALLORY)
        file, declaration = written(trained(alice), tmp_path / "alice")
        junk = os.urandom(declaration.size)
        lying = pb.UploadRequest(lease=mallory.lease, offset=0, data=junk)
        # That another's digest is known gives nothing: bytes that do not have it are dropped.
        await stub.OpenUpload(pb.OpenUploadRequest(lease=mallory.lease, declaration=declaration))
        await refused(stub.Upload(iter([lying])), StatusCode.DATA_LOSS, "was declared")
        await remote.upload(alice.lease, declaration, file, nothing)
        await stub.OpenUpload(pb.OpenUploadRequest(lease=mallory.lease, declaration=declaration))
        await refused(stub.Upload(iter([lying])), StatusCode.DATA_LOSS, "was declared")
        assert not list((tmp_path / "state" / "uploads").iterdir())
        stored = tmp_path / "state" / "blobs" / declaration.digest
        assert stored.read_bytes() == file.read_bytes()

        other = pb.Declaration(digest="1" * 64, size=100, num_examples=1)
        again = pb.OpenUploadRequest(lease=alice.lease, declaration=other)
        await refused(stub.OpenUpload(again), StatusCode.ALREADY_EXISTS, "in already")
        undeclared = await join(remote, BOB)
        sent = pb.UploadRequest(lease=undeclared.lease, offset=0, data=b"x")
        await refused(stub.Upload(iter([sent])), StatusCode.FAILED_PRECONDITION, "OpenUpload")
        await daemon.operator.close("notes")
        late = await remote.stub("d" * 32)
        await refused(late.Join(pb.JoinRequest(job="notes")), StatusCode.FAILED_PRECONDITION, "no more contributions")


async def test_quotas(tmp_path: Path) -> None:
    """Of a job's bytes, of a job's clients, and of one client's bytes."""

    limits = {"round": {**SPEC["round"], "max_clients": 4}, "upload": {"quota": "70kB"}}  # type: ignore[dict-item]
    async with attacked(tmp_path / "state", **limits) as (_, remote):
        stub, clients = remote._stub, [f"{number:032x}" for number in range(4)]
        leases = [(await join(remote, client)).lease for client in clients]
        for number in range(4, 20):
            stranger = await remote.stub(f"{number:032x}")
            await refused(stranger.Join(pb.JoinRequest(job="notes")), StatusCode.RESOURCE_EXHAUSTED, "max_clients")
        assert [(await join(remote, client)).lease for client in clients] == leases, "who is in stays in"

        def opens(lease: str, size: int, digest: str = "0" * 64) -> Awaitable[pb.OpenUploadReply]:
            declared = pb.Declaration(digest=digest, size=size, num_examples=1)
            return stub.OpenUpload(pb.OpenUploadRequest(lease=lease, declaration=declared))  # type: ignore[no-any-return]

        await opens(leases[0], 30_000)
        await opens(leases[1], 30_000)
        await refused(opens(leases[2], 30_000), StatusCode.RESOURCE_EXHAUSTED, "quota")
        await opens(leases[0], 40_000, "1" * 64)  # another declaration takes the place of the first
        await refused(opens(leases[2], 1), StatusCode.RESOURCE_EXHAUSTED, "quota")
        await refused(opens(leases[0], 40_001, "2" * 64), StatusCode.RESOURCE_EXHAUSTED, "quota")
        await opens(leases[0], 10, "3" * 64)
        await opens(leases[2], 30_000)
        await refused(opens(leases[3], 10**7), StatusCode.INVALID_ARGUMENT, "at most")


async def test_a_quota_that_many_reach_for_at_once(tmp_path: Path) -> None:
    quota = {"upload": {"quota": "70kB"}}
    async with attacked(tmp_path / "state") as (daemon, remote):
        for name in ("once", "twice", "thrice"):
            await daemon.operator.submit(job.parse({**SPEC, **quota, "name": name}))
            asked = pb.JoinRequest(job=name)
            leases = [(await remote.join_as(f"{number:032x}", asked)).lease for number in range(8)]
            declared = pb.Declaration(digest="0" * 64, size=30_000, num_examples=1)
            opened = [pb.OpenUploadRequest(lease=lease, declaration=declared) for lease in leases]
            answers = await asyncio.gather(*(status_of(remote._stub.OpenUpload(request)) for request in opened))
            found = Counter(code for code, _ in answers)
            assert found == {StatusCode.OK: 2, StatusCode.RESOURCE_EXHAUSTED: 6}


async def test_a_job_that_goes_while_it_is_sent_to(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with attacked(state) as (daemon, remote):
        await daemon.operator.submit(job.parse({**SPEC, "name": "other"}))
        reply = await join(remote, MALLORY)
        file, declaration = written(trained(reply), tmp_path / "mallory")
        stub, data = remote._stub, file.read_bytes()
        await stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        gone = asyncio.Event()

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, offset=0, data=data[:100])
            await gone.wait()
            yield pb.UploadRequest(data=data[100:])

        sending = asyncio.create_task(status_of(stub.Upload(messages())))
        await until(lambda: list((state / "uploads").iterdir()))  # the coordinator has taken the stream
        await daemon.operator.cancel("notes")
        await daemon.operator.delete("notes")
        gone.set()
        code, details = await sending
        assert code in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION, StatusCode.ABORTED), details
        assert not list((state / "uploads").iterdir())
        assert len(list((state / "blobs").iterdir())) == 1, "the other job's initial adapter; nothing is left over"
        await refused(stub.Heartbeat(pb.HeartbeatRequest(lease=reply.lease)), StatusCode.PERMISSION_DENIED)
        await honest(remote, tmp_path, name="other")


async def test_a_job_that_is_submitted_twice_at_once(tmp_path: Path) -> None:
    """By an operator who does not wait for an answer: one job comes of it, and another one of its name is refused."""

    state = tmp_path / "state"
    async with attacked(state) as (daemon, _):
        same, other = {**SPEC, "name": "twice"}, {**SPEC, "name": "twice", "train": {"seed": 7}}
        specs = [job.parse(spec) for spec in (same, same, other, same)]
        answers = await asyncio.gather(*(control.submit(state, spec) for spec in specs), return_exceptions=True)
        seeds = {answer.spec.train.seed for answer in answers if isinstance(answer, pb.JobStatus)}
        assert len(seeds) == 1
        refusals = [answer for answer in answers if not isinstance(answer, pb.JobStatus)]
        assert 1 <= len(refusals) <= 3 and all("different job" in str(refusal) for refusal in refusals), refusals
        assert len(await daemon.names()) == 2
        initial = {daemon._store.announced(name).job.initial.digest for name in ("notes", "twice")}
        assert {file.name for file in (state / "blobs").iterdir()} == initial


# ---- crowds, against a daemon in a process of its own ----

# Time in which a stream may be silent goes by twenty times faster, so that a test need not wait for minutes.
_HASTY = """
from coordinator.cli import app
from coordinator.uploads import flow_control, service
real = flow_control.FlowControl
service.FlowControl = lambda turns=flow_control.TURNS, patience=flow_control.PATIENCE, idle=flow_control.IDLE: real(
    turns, patience / 20, idle / 20
)
app.main()
"""
GROWTH = 200 << 20  # bytes of memory that a crowd may cost; what it sends and asks for is many times that


@dataclass(frozen=True)
class Target:
    """A daemon in its own process."""

    process: subprocess.Popen[bytes]
    state: Path
    address: str

    @property
    def certificate(self) -> bytes:
        return (self.state / "certificate.pem").read_bytes()

    def memory(self) -> int:
        """Resident bytes now."""
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)

    def log(self) -> str:
        return self.state.with_suffix(".log").read_text(errors="replace")

    def channel(self) -> grpc.aio.Channel:
        """A connection that no other channel shares."""
        options = [("grpc.ssl_target_name_override", tls.NAME), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(
            self.address, grpc.ssl_channel_credentials(root_certificates=self.certificate), options
        )


@contextmanager
def target(state: Path) -> Iterator[Target]:
    pytest.importorskip("psutil")
    command = [sys.executable, "-c", _HASTY, "serve", "--listen", "127.0.0.1:0", "--state", str(state)]
    with state.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        assert eventually(lambda: (state / "daemon.json").exists() or process.poll() is not None)
        yield Target(process, state, json.loads((state / "daemon.json").read_text())["address"])
        assert process.poll() is None, "it died"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=LONG)
    said = state.with_suffix(".log").read_text(errors="replace")
    assert code == 0 and "event=fault" not in said, said[said.find("event=fault") - 100 :][:5000]
    # gRPC logs that it cannot answer who has gone; there is no other trouble.
    theirs = said.count("\ngrpc._cython.cygrpc.ExecuteBatchError: ")
    assert said.count("Traceback") <= theirs, said[-5000:]


def _crowd(sizes: tuple[int, int]) -> Any:
    """A small crowd in `make test`, a large one in `make test-all`."""
    return pytest.mark.parametrize("count", [sizes[0], pytest.param(sizes[1], marks=pytest.mark.slow)])


@_crowd((200, 1000))
async def test_streams_that_stay_half_open(tmp_path: Path, count: int) -> None:
    """Many declare an upload, and then send nothing, or little, or all of it without an end, and stay."""

    with target(tmp_path / "state") as daemon:
        await control.submit(daemon.state, job.parse({**SPEC, "round": {"max_clients": 2000}}))
        async with AsyncExitStack() as stack:
            remote = await stack.enter_async_context(connected(daemon.address, tmp_path))
            channels = [await stack.enter_async_context(daemon.channel()) for _ in range(count // 50)]
            there = [Remote(Connection(daemon.address, channel, daemon.certificate)) for channel in channels]
            before = daemon.memory()
            ended: Counter[str] = Counter()
            over = asyncio.Event()

            async def half_open(number: int) -> None:
                speaker = speaking(there[number % len(there)], f"{number:032x}")
                stub, known = speaker.connection.stub, await session(speaker)
                lease = (await stub.Join(pb.JoinRequest(job="notes"), metadata=known)).lease
                declared = pb.Declaration(digest=f"{number:064x}", size=30_000, num_examples=1)
                await stub.OpenUpload(pb.OpenUploadRequest(lease=lease, declaration=declared), metadata=known)

                async def silence() -> AsyncIterator[pb.UploadRequest]:
                    if number % 4:
                        yield pb.UploadRequest(lease=lease, offset=0, data=bytes((0, 0, 1, 30_000)[number % 4]))
                    await over.wait()

                code, _ = await status_of(stub.Upload(silence(), metadata=known))
                ended[code.name] += 1

            crowd = [asyncio.create_task(half_open(number)) for number in range(count)]
            await until(lambda: daemon.log().count("event=joined") == count or all(task.done() for task in crowd))
            async with asyncio.timeout(LONG):
                await honest(remote, tmp_path)
            growth = daemon.memory() - before
            async with asyncio.timeout(LONG):
                await asyncio.gather(*crowd)  # each is told to come back; none of them stays
            over.set()
            assert ended == {"ABORTED": count * 3 // 4, "DATA_LOSS": count // 4}
            assert growth < GROWTH, growth
            await honest(remote, tmp_path, BOB)


@_crowd((100, 600))
async def test_downloads_that_nobody_reads(tmp_path: Path, count: int) -> None:
    """A base model is a thousand times larger than the question for it."""

    with target(tmp_path / "state") as daemon:
        await control.submit(daemon.state, job.parse(SPEC))
        async with AsyncExitStack() as stack:
            remote = await stack.enter_async_context(connected(daemon.address, tmp_path))
            largest = max((await join(remote)).job.base_files, key=lambda file: file.size)
            before = daemon.memory()
            calls = []
            for number in range(count):
                if number % 50 == 0:
                    stub = rpc.FederationStub(await stack.enter_async_context(daemon.channel()))
                wanted = pb.DownloadRequest(job="notes", digest=largest.digest)
                calls.append(stub.Download(wanted, metadata=await session(remote)))
            await asyncio.gather(*(call.read() for call in calls))  # the first chunk, and no more
            assert largest.size > 4 << 20 and daemon.memory() - before < GROWTH, daemon.memory() - before
            await honest(remote, tmp_path)
            for call in calls:
                call.cancel()


@_crowd((100, 900))
async def test_connections_that_say_little(tmp_path: Path, count: int) -> None:
    """A third opens a socket, a third begins a TLS handshake, a third finishes it and sends half an HTTP/2 preface."""

    with target(tmp_path / "state") as daemon:
        await control.submit(daemon.state, job.parse(SPEC))
        host, _, port = daemon.address.rpartition(":")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        opened: list[socket.socket] = []
        before = daemon.memory()
        try:
            for number in range(count):
                one = socket.create_connection((host, int(port)), timeout=LONG)
                if number % 3 == 1:
                    one.sendall(b"\x16\x03\x01\x02\x00\x01")
                if number % 3 == 2:
                    one = context.wrap_socket(one)
                    one.sendall(b"PRI * HTTP/2.0")
                opened.append(one)
            async with asyncio.timeout(LONG), connected(daemon.address, tmp_path) as remote:
                await honest(remote, tmp_path)
            assert daemon.memory() - before < GROWTH
        finally:
            for one in opened:
                one.close()


# ---- requests that were changed on their way ----

# How a call may end whatever was said: never UNKNOWN, never INTERNAL.
_ENDS = {
    *(StatusCode.OK, StatusCode.NOT_FOUND, StatusCode.PERMISSION_DENIED, StatusCode.ALREADY_EXISTS),
    *(StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED),
    *(StatusCode.FAILED_PRECONDITION, StatusCode.DATA_LOSS, StatusCode.UNAUTHENTICATED),
    StatusCode.DEADLINE_EXCEEDED,  # a Watch that was understood
}


@dataclass(frozen=True)
class Asked:
    """A call as it goes over the wire."""

    path: str
    messages: tuple[bytes, ...]
    known: tuple[tuple[str, str], ...] = ()  # its metadata

    @property
    def method(self) -> str:
        return self.path.rpartition("/")[2]


def _mutated(rng: random.Random, asked: Asked, others: list[bytes]) -> Asked:
    """Bits flipped, bytes cut out or put in, lengths made absurd, fields of other messages added before or after."""
    if asked.method in ("Close", "Cancel", "Delete"):
        others = [b""]  # or another's name would get in, and the prey would soon be gone
    return Asked(asked.path, tuple(_bent(rng, message, others) for message in asked.messages), asked.known)


def _bent(rng: random.Random, message: bytes, others: list[bytes]) -> bytes:
    data = bytearray(message)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice([0, 0x7F, 0x80, 0xFF, 0x1B, ord("."), ord("/")])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 5:
                data += rng.choice(others)
            case 6:
                data[:0] = rng.choice(others)
            case 7:  # a number as large as a varint can be
                data[at:at] = b"\xff" * 9 + b"\x01"
    return bytes(data)


async def _corpus(remote: Crowd, folder: Path, admin: str) -> list[Asked]:
    """A valid request of every method, from clients and over jobs that nobody minds losing: by who may make it, by
    nobody, and by somebody else."""
    leases, declared = [], []
    for number in range(4):
        reply = await remote.join_as(f"{number:032x}", pb.JoinRequest(job="prey", client_name=f"prey {number}"))
        file, declaration = written(trained(reply, seed=number), folder / "prey")
        declaration.MergeFrom(pb.Declaration(num_tokens=1000, steps=30, train_loss=1.25))
        leases.append(reply.lease)
        declared.append((declaration, file.read_bytes()))
    await remote.upload(leases[0], declared[0][0], _file(folder, declared[0][1]), nothing)
    labels = [f"{number:032x}" for number in range(9)]
    prey = [public_id(me(label).client_id) for label in labels]
    requests: dict[str, list[list[Message]]] = {
        "Challenge": [[pb.ChallengeRequest()]],
        "SignIn": [[await signed_in(remote, label, token)] for label in labels for token in ("", "x" * 22)],
        "ListJobs": [[pb.ListJobsRequest()]],
        "Describe": [[pb.DescribeRequest(job="prey")]],
        "Join": [[pb.JoinRequest(job="prey", client_name="x" * number)] for number in range(9)],
        "Heartbeat": [
            [pb.HeartbeatRequest(lease=lease, step=3, total_steps=9, loss=1.5, tokens_per_second=99)]
            for lease in leases
        ],
        "Download": [
            [pb.DownloadRequest(job="prey", digest=file.digest, offset=max(file.size - 100, 0))]
            for file in [reply.job.initial, *reply.job.base_files]
        ],
        "OpenUpload": [
            [pb.OpenUploadRequest(lease=lease, declaration=declaration)]
            for lease, (declaration, _) in zip(leases, declared, strict=True)
        ],
        "Upload": [
            [
                pb.UploadRequest(lease=lease, offset=0, data=data[:9000]),
                pb.UploadRequest(data=data[9000:18000]),
                pb.UploadRequest(offset=18000, data=data[18000:]),
            ]
            for lease, (_, data) in zip(leases, declared, strict=True)
        ],
        "Withdraw": [[pb.WithdrawRequest(lease=leases[3])]],
        "Report": [[pb.ReportRequest(lease=lease, evaluation=EVALUATION)] for lease in leases],
        "Watch": [[pb.WatchRequest(job="prey")]],
        "Submit": [[pb.SubmitRequest(spec=job.parse({**SPEC, "name": "prey"}))]],
        "Show": [[pb.ShowRequest(job="prey")]],
        "Close": [[pb.CloseRequest(job="closed")]],
        "Cancel": [[pb.CancelRequest(job="cancelled")]],
        "Delete": [[pb.DeleteRequest(job="deleted")]],
        "Publish": [[pb.PublishRequest(job="cancelled", adapter_rank=3, reason="why not")]],
        "Judge": [
            [pb.JudgeRequest(job="prey", client=prey[0], decision=decision, why="because")]
            for decision in (pb.DECISION_ADMIT, pb.DECISION_EXCLUDE, pb.DECISION_LET_REPLACE)
        ],
        "CreateToken": [[pb.CreateTokenRequest(job="prey", holds_seconds=3600, uses=2, note="for nobody")]],
        "ListTokens": [[pb.ListTokensRequest()]],
        "RevokeToken": [[pb.RevokeTokenRequest(id="3f9a01bc")]],
        "ListClients": [[pb.ListClientsRequest(job="prey")]],
        "Settle": [
            [pb.SettleRequest(client=client, job="prey", settlement=settlement, why="because")]
            for client in prey[:2]
            for settlement in (pb.SETTLEMENT_APPROVE, pb.SETTLEMENT_REFUSE, pb.SETTLEMENT_UNBAN)
        ],
    }
    sessions = {label: tuple(await session(await remote.speaker(label))) for label in labels}
    corpus = []
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            for number, messages in enumerate(requests.pop(method.name)):
                raw = tuple(message.SerializeToString() for message in messages)
                path = f"/{service.full_name}/{method.name}"
                known, another = sessions[labels[number % 4]], sessions[labels[8]]
                if method.name == "Join":
                    known = sessions[labels[number]]
                if method.name == "Withdraw":
                    known = sessions[labels[3]]
                if service.name == "Admin":
                    known = (("authorization", admin),)
                corpus += [Asked(path, raw, metadata) for metadata in (known, known, (), another)]
    assert not requests
    return corpus


def _file(folder: Path, data: bytes) -> Path:
    file = folder / "sent"
    file.write_bytes(data)
    return file


async def _answer(channel: grpc.aio.Channel, asked: Asked) -> tuple[StatusCode, str]:
    metadata = asked.known
    if asked.method == "Upload":
        return await status_of(channel.stream_unary(asked.path)(iter(asked.messages), metadata=metadata, timeout=20))
    (message,) = asked.messages
    if asked.method in ("Download", "Watch"):
        seconds = 0.2 if asked.method == "Watch" else 20
        return await status_of(channel.unary_stream(asked.path)(message, metadata=metadata, timeout=seconds))
    return await status_of(channel.unary_unary(asked.path)(message, metadata=metadata, timeout=LONG))


@_crowd((500, 10_000))
async def test_requests_with_changed_bytes(tmp_path: Path, count: int) -> None:
    with target(tmp_path / "state") as daemon:
        for name in ("notes", "prey", "closed", "cancelled", "deleted"):
            await control.submit(daemon.state, job.parse({**SPEC, "name": name}))
        rng = random.Random(count)
        admin = f"Bearer {identity.load_or_create(daemon.state).admin_token}"
        async with AsyncExitStack() as stack:
            remote = await stack.enter_async_context(connected(daemon.address, tmp_path))
            channels = [await stack.enter_async_context(daemon.channel()) for _ in range(4)]
            local = await stack.enter_async_context(grpc.aio.insecure_channel(transport.socket(daemon.state)))
            corpus = await _corpus(remote, tmp_path, admin)
            by_method: dict[str, list[Asked]] = {}
            for asked in corpus:
                by_method.setdefault(asked.method, []).append(asked)
            fragments = [message for asked in corpus for message in asked.messages if len(message) < 2000]
            before = daemon.memory()
            seen: Counter[tuple[str, str]] = Counter()

            async def worker(number: int) -> None:
                for _ in range(count // 16 + 1):
                    asked = rng.choice(by_method[rng.choice(sorted(by_method))])
                    bent = _mutated(rng, asked, fragments)
                    channel = local if ".Admin/" in asked.path else channels[number % 4]
                    code, details = await _answer(channel, bent)
                    assert code in _ENDS or (asked.method == "Upload" and details == _BROKEN), (bent, code, details)
                    seen[asked.method, code.name] += 1

            async with asyncio.TaskGroup() as group:
                for number in range(16):
                    group.create_task(worker(number))
            for (method, code), times in sorted(seen.items()):
                print(f"{times:6} {method:12} {code}")
            assert {method for method, _ in seen} == by_method.keys()
            assert daemon.memory() - before < GROWTH
            await honest(remote, tmp_path)
