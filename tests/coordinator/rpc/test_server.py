"""The daemon behind a real gRPC server with TLS: what survives, and what is refused."""

import asyncio
import stat
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import numpy as np
import pytest

from converters import adapter
from converters.adapter import Adapter, LowRank
from coordinator.auth import identity
from coordinator.cli import client as control
from coordinator.jobs import spec
from coordinator.rpc import transport
from coordinator.storage import database
from coordinator.storage.schema import Job
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from oneround import stream, tls
from oneround.errors import BadData, Refused, Unreachable
from oneround.v1 import federation_pb2 as pb
from oneround.v1 import federation_pb2_grpc as rpc
from tests.clients import me
from tests.daemons import (
    ALICE,
    BOB,
    SPEC,
    described,
    join,
    judged,
    nothing,
    running,
    served,
    trained,
    written,
)
from tests.waiting import until


async def test_a_contribution_is_taken_once(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        assert (await join(remote)).lease == reply.lease, "joining again renews"
        file, declaration = written(trained(reply), tmp_path)
        receipt = await remote.upload(reply.lease, declaration, file, nothing)
        assert (receipt.digest, receipt.size) == (declaration.digest, declaration.size)
        assert await remote.upload(reply.lease, declaration, file, nothing) == receipt
        assert (await join(remote)).receipt == receipt

        other, another = written(trained(reply, seed=1), tmp_path)
        with pytest.raises(Refused, match="in already"):
            await remote.upload(reply.lease, another, other, nothing)
        assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
        status = await daemon.operator.status("notes")
        assert [client.contribution.declaration.digest for client in status.clients] == [declaration.digest]


async def test_an_upload_that_breaks_off_goes_on_after_a_restart(tmp_path: Path) -> None:
    sent = 20_000

    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path)
        await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, data=file.read_bytes()[:sent])

        with pytest.raises(grpc.aio.AioRpcError, match="ended at byte 20000"):
            await remote._stub.Upload(messages())
    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path)
        opened = await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        assert opened.committed_offset == sent
        seen: list[int] = []
        await remote.upload(reply.lease, declaration, file, seen.append)
        assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
        assert min(seen) > sent, "what was there is not sent again"


async def test_a_lying_digest_drops_what_came(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path)
        lie = pb.Declaration(digest="0" * 64, size=declaration.size, num_examples=1)
        with pytest.raises(BadData, match="was declared"):
            await remote.upload(reply.lease, lie, file, nothing)
        assert not list((tmp_path / "state" / "uploads").glob(f"notes.{me(ALICE).client_id}*"))
        assert (await remote.upload(reply.lease, declaration, file, nothing)).digest == declaration.digest


async def test_unsound_adapters_are_quarantined_and_the_round_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, remote):
        reply = await join(remote)
        module = reply.job.modules[0]
        good = trained(reply).modules[module.name]
        nan = LowRank(good.a, np.full_like(good.b, np.nan))
        wide = LowRank(np.zeros((2, module.in_features + 1), np.float32), good.b)
        ranks = LowRank(np.zeros((3, module.in_features), np.float32), np.zeros((module.out_features, 3), np.float32))
        odd = {
            "1": (trained(reply, **{module.name: nan}), "NaN or Inf"),
            "2": (trained(reply, **{module.name: wide}), "the base has"),
            "3": (trained(reply, **{module.name: ranks}), "has rank 3, the job asks for 2"),
            "4": (trained(reply, **{"model.lm_head": good}), "does not ask for"),
            "5": (Adapter(trained(reply).modules, described(reply.job, base="0" * 64)), "trained over base"),
            "7": (Adapter(trained(reply).modules, described(reply.job, tokenizer="0")), "another tokenizer"),
            "6": (Adapter({module.name: good}, trained(reply).metadata), "lacks"),
        }
        for client, (made, reason) in odd.items():
            mine = await join(remote, client * 32)
            file, declaration = written(made, tmp_path)
            await remote.upload(mine.lease, declaration, file, nothing)
            found = await judged(remote, mine.lease)
            assert found.verdict == pb.VERDICT_QUARANTINED and reason in found.reason

        mine = await join(remote, BOB)
        junk = tmp_path / "junk"
        junk.write_bytes(b"\xff" * 1000)
        declaration = pb.Declaration(digest=stream.digest(junk), size=1000, num_examples=1)
        await remote.upload(mine.lease, declaration, junk, nothing)
        assert "not a safetensors file" in (await judged(remote, mine.lease)).reason

        for client, changes, reason in [
            ("8", {"num_examples": 0}, "no training examples"),
            ("9", {"num_examples": 10**9}, "at most"),
            ("c", {"num_examples": 1000, "steps": 3}, "have room for 24"),
        ]:
            mine = await join(remote, client * 32)
            file, declaration = written(trained(reply), tmp_path)
            declaration.MergeFrom(pb.Declaration(**changes))
            await remote.upload(mine.lease, declaration, file, nothing)
            assert reason in (await judged(remote, mine.lease)).reason

        wide_file = tmp_path / "float32.safetensors"
        adapter.write(trained(reply), wide_file, "float32")
        mine = await join(remote, "d" * 32)
        declaration = pb.Declaration(digest=stream.digest(wide_file), size=wide_file.stat().st_size, num_examples=1)
        await remote.upload(mine.lease, declaration, wide_file, nothing)
        assert "is in float32, the job asks for bfloat16" in (await judged(remote, mine.lease)).reason

        file, declaration = written(trained(reply), tmp_path)
        await remote.upload(reply.lease, declaration, file, nothing)
        assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
        status = await daemon.operator.status("notes")
        assert (status.admitted, status.contributed) == (1, 13)
        assert status.state == pb.STATE_OPEN


@pytest.mark.parametrize(
    ("offset", "data", "says"),
    [(7, b"x", "starts at byte 7; 0 are here"), (0, b"x" * 500_000, "more bytes came"), (0, b"x", "ended at byte 1")],
)
async def test_chunks_that_do_not_fit(tmp_path: Path, offset: int, data: bytes, says: str) -> None:
    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        _, declaration = written(trained(reply), tmp_path)
        await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, offset=offset, data=data)

        with pytest.raises(grpc.aio.AioRpcError, match=says):
            await remote._stub.Upload(messages())


async def test_one_stream_at_a_time(tmp_path: Path) -> None:
    async def _receipt(call: Awaitable[pb.Receipt]) -> pb.Receipt:
        return await call

    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        file, declaration = written(trained(reply), tmp_path)
        await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        go_on = asyncio.Event()

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(lease=reply.lease, data=file.read_bytes()[:1000])
            await go_on.wait()
            yield pb.UploadRequest(data=file.read_bytes()[1000:])

        first = asyncio.create_task(_receipt(remote._stub.Upload(messages())))
        partial = tmp_path / "state" / "uploads" / f"notes.{me(ALICE).client_id}.{declaration.digest}"
        await until(partial.exists)  # the coordinator has taken the stream
        with pytest.raises(Unreachable, match="another stream"):
            await remote.upload(reply.lease, declaration, file, nothing)
        other = pb.Declaration(digest="1" * 64, size=10, num_examples=1)
        with pytest.raises(grpc.aio.AioRpcError, match="another stream"):
            await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=other))
        go_on.set()
        assert (await first).digest == declaration.digest


async def test_what_a_stranger_may_not(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (_, remote):
        stub = remote._stub
        beat = pb.HeartbeatRequest(lease="0" * 64)
        with pytest.raises(Refused, match="lease"):
            await remote.heartbeat(beat)
        for name, says in [("../../etc/passwd", "no job"), ("nothing", "no job")]:
            with pytest.raises(Refused, match=says):
                await remote.join_as(ALICE, pb.JoinRequest(job=name))
        reply = await join(remote)
        for declaration, says in [
            (pb.Declaration(digest="../../key.pem", size=10), "not a SHA-256"),
            (pb.Declaration(digest="0" * 64, size=1 << 40), "at most"),
            (pb.Declaration(digest="0" * 64, size=0), "at most"),
        ]:
            with pytest.raises(grpc.aio.AioRpcError, match=says):
                await stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
        with pytest.raises(grpc.aio.AioRpcError, match="no artifact"):
            async for _chunk in stub.Download(pb.DownloadRequest(job="notes", digest="../../key.pem")):
                pass

        async def nothing_at_all() -> AsyncIterator[pb.UploadRequest]:
            return
            yield

        with pytest.raises(grpc.aio.AioRpcError, match="empty upload"):
            await stub.Upload(nothing_at_all())


async def test_only_the_operator_administers(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async with running(state):
        await control.submit(state, spec.parse(SPEC))
        assert [found.spec.name for found in await control.jobs(state)] == ["notes"]
        async with control.channel(state) as (channel, _):
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await rpc.AdminStub(channel).Close(pb.CloseRequest(job="notes"), metadata=metadata)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        socket = Path(transport.socket(state).removeprefix("unix:"))
        mode = stat.S_IMODE((await asyncio.to_thread(socket.stat)).st_mode)
        assert mode == 0o600, "nobody else can connect"
        assert (await control.show(state, "notes")).state == pb.STATE_OPEN
        assert (await control.close(state, "notes")).state == pb.STATE_EXPIRED


async def test_submitting_again_is_idempotent_and_another_job_of_the_name_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (daemon, _):
        again = await daemon.operator.submit(spec.parse(SPEC))
        assert again.spec.name == "notes" and len(await daemon.names()) == 1
        with pytest.raises(Refused, match="different job"):
            await daemon.operator.submit(spec.parse({**SPEC, "train": {"epochs": 1}}))
        with pytest.raises(BadData, match="is not there"):
            await daemon.operator.submit(spec.parse({**SPEC, "name": "other", "model": {"base": "/no/such/base"}}))


async def test_a_job_from_before_a_key_was_there_means_the_keys_default(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with served(state) as (daemon, _):
        assert len(await daemon.names()) == 1
    rows = database.Database(f"sqlite:///{state / 'coordinator.sqlite'}")
    with rows.writes() as session:
        row = session.get_one(Job, "notes")
        older = pb.Job.FromString(row.job.SerializeToString())
        older.spec.lora.ClearField("start_from")
        row.job = older
    rows.close()
    async with served(state) as (daemon, _):  # submits the same job again
        assert len(await daemon.names()) == 1


async def test_silent_clients_sleep_and_the_deadline_closes(tmp_path: Path) -> None:
    now = [1000.0]

    async with served(tmp_path / "state", clock=lambda: now[0]) as (daemon, remote):
        reply = await join(remote)
        now[0] += 61
        assert (await daemon.operator.status("notes")).clients[0].phase == pb.PHASE_ASLEEP
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease, step=3, total_steps=9, loss=1.5))
        assert answer.directive == pb.DIRECTIVE_CONTINUE
        client = (await daemon.operator.status("notes")).clients[0]
        assert (client.phase, client.step, client.loss) == (pb.PHASE_TRAINING, 3, 1.5)

        now[0] += 86400
        await remote.jobs()  # the session was over meanwhile
        async for status in remote.watch("notes"):
            if status.state == pb.STATE_EXPIRED:
                break
        answer = await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease))
        assert (answer.directive, "expired" in answer.reason) == (pb.DIRECTIVE_STOP, True)
        with pytest.raises(Refused, match="no more contributions"):
            await join(remote, BOB)


async def test_downloads_resume_and_are_checked(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote)
        to = tmp_path / "initial.safetensors"
        partial = tmp_path / f".initial.safetensors.{reply.job.initial.digest[:12]}"
        await remote.download("notes", reply.job.initial, to, nothing)
        whole = to.read_bytes()
        partial.write_bytes(whole[:1000])
        seen: list[int] = []
        await remote.download("notes", reply.job.initial, to, seen.append)
        assert to.read_bytes() == whole and seen[-1] == len(whole)
        partial.write_bytes(b"\0" * 1000)
        with pytest.raises(BadData, match="damaged"):
            await remote.download("notes", reply.job.initial, to, nothing)
        assert to.read_bytes() == whole and not partial.exists()
        hostile = pb.Artifact(name="../../etc/cron.d/x", digest="0" * 64)
        with pytest.raises(BadData, match="not a path inside"):
            remotes.local_path(tmp_path, hostile)


async def test_a_coordinator_with_another_key_is_refused(tmp_path: Path) -> None:
    first_use: list[str] = []
    pins = Pins(tmp_path)
    async with running(tmp_path / "one") as (_, address):
        async with remotes.connect(address, pins, lambda shown: first_use.append(shown.fingerprint)) as remote:
            with pytest.raises(Refused, match="no job is open"):
                await remote.join(pb.JoinRequest())
        async with remotes.connect(address, pins, lambda shown: first_use.append(shown.fingerprint)):
            pass
    assert first_use == [identity.load_or_create(tmp_path / "one").fingerprint]

    async with running(tmp_path / "two") as (_, other):
        pins.pin(other, first_use[0])  # that of another coordinator
        with pytest.raises(Refused, match="another key") as caught:
            async with remotes.connect(other, pins, lambda *_: None):
                pass
        assert tls.grouped(first_use[0]) in str(caught.value)


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no coordinator answers at"):
        async with remotes.connect("127.0.0.1:1", Pins(tmp_path), lambda *_: None):
            pass
