"""A disk that is full, and one that can only be read, for real: small file systems that are mounted for a test.

What cannot be written is refused with a sentence, what is there stays, and nobody has to restart anything.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from structlog.testing import capture_logs

from coordinator.cli import client as control
from coordinator.daemon import Daemon
from coordinator.jobs import spec
from coordinator.publication import scheduler
from oneround import stream
from oneround.errors import NotEnough, Unreachable
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.clients import Crowd, connected
from tests.daemons import ALICE, BASE, BOB, SPEC, join, judged, nothing, running, trained, written
from tests.disks import disk, full
from tests.waiting import LONG, until

MB = 1 << 20


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


@contextmanager
def full_of_files(folder: Path) -> Iterator[None]:
    """No room for one more file, though there is room in those that are there."""
    fillers = []
    try:
        while os.statvfs(folder).f_ffree:
            fillers.append(folder / f"filler-{len(fillers)}")
            fillers[-1].touch()
        yield
    finally:
        for filler in fillers:
            filler.unlink()


@asynccontextmanager
async def at_work(state: Path, **options: object) -> AsyncIterator[tuple[Daemon, Crowd]]:
    """A daemon over the disk with the job `notes`, which never has a fault of its own."""
    with capture_logs() as said:
        async with (
            running(state, **options) as (daemon, address),  # type: ignore[arg-type]
            connected(address, state.parent) as remote,
        ):
            await daemon.operator.submit(spec.parse(SPEC))
            yield daemon, remote
    assert not [entry for entry in said if entry["event"] in ("fault", "publishing_failed")], said


async def no_room(call: object, says: str = "") -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED, caught.value
    details = caught.value.details() or ""
    assert says in details and "Traceback" not in details and "sqlalche" not in details, details
    return details


async def contribute(remote: Crowd, folder: Path, client: str) -> pb.Receipt:
    reply = await join(remote, client)
    file, declaration = written(trained(reply, seed=int(client[:2], 16)), folder / client[:5])
    receipt = await remote.upload(reply.lease, declaration, file, nothing)
    assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
    return receipt


def intact(state: Path, receipt: pb.Receipt) -> bool:
    blob = state / "blobs" / receipt.digest
    return blob.stat().st_size == receipt.size and stream.digest(blob) == receipt.digest


async def test_a_full_disk_and_room_again(tmp_path: Path) -> None:
    with disk(tmp_path / "state") as state:
        async with at_work(state) as (daemon, remote):
            stub, earlier = remote._stub, await contribute(remote, tmp_path, ALICE)
            reply = await join(remote, BOB)
            file, declaration = written(trained(reply, seed=1), tmp_path / "bob")
            opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
            await stub.OpenUpload(opened)
            filled = asyncio.Event()

            async def messages() -> AsyncIterator[pb.UploadRequest]:
                yield pb.UploadRequest(lease=reply.lease, offset=0, data=file.read_bytes()[:8192])
                await filled.wait()
                yield pb.UploadRequest(data=file.read_bytes()[8192:])

            sending = asyncio.ensure_future(no_room(stub.Upload(messages()), "No space left"))
            await until(lambda: [file.stat().st_size for file in (state / "uploads").iterdir()] == [8192])
            with full(state):
                filled.set()
                await sending
                await no_room(stub.OpenUpload(opened), "no room")
                with pytest.raises(Unreachable, match="no room"):  # which a client waits out
                    await remote.upload(reply.lease, declaration, file, nothing)
                newcomer = await remote.stub("c" * 32)
                await no_room(newcomer.Join(pb.JoinRequest(job="notes")), "database")
                for step in range(20):
                    said = pb.HeartbeatRequest(lease=reply.lease, step=step, total_steps=20, loss=1.0)
                    assert (await remote.heartbeat(said)).directive == pb.DIRECTIVE_CONTINUE
                with pytest.raises(NotEnough, match="no room"):
                    await control.submit(state, spec.parse({**SPEC, "name": "other"}))
                assert await daemon.names() == ["notes"]
                assert intact(state, earlier)
                assert (await daemon.operator.status("notes")).contributed == 1
            seen: list[int] = []
            receipt = await remote.upload(reply.lease, declaration, file, seen.append)
            assert min(seen) > 8192, "what was there is not sent again"
            assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
            assert intact(state, earlier) and intact(state, receipt)
            await contribute(remote, tmp_path, "c" * 32)
            assert not list((state / "uploads").iterdir())


async def test_room_for_the_bytes_and_none_for_their_row(tmp_path: Path) -> None:
    """The last thing that fails before a receipt: all of the upload is here, and the commit has no room."""

    with disk(tmp_path / "state") as state:
        async with at_work(state) as (daemon, remote):
            reply = await join(remote)
            file, declaration = written(trained(reply), tmp_path / "alice")
            opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
            await remote._stub.OpenUpload(opened)
            with full(state, but=-(-declaration.size // 4096) * 4096):
                sent = [pb.UploadRequest(lease=reply.lease, offset=0, data=file.read_bytes())]
                await no_room(remote._stub.Upload(iter(sent)), "database")
                assert (await daemon.operator.status("notes")).contributed == 0, "no receipt, no contribution"
            assert (await remote._stub.OpenUpload(opened)).committed_offset == declaration.size
            receipt = await remote.upload(reply.lease, declaration, file, nothing)
            assert (await judged(remote, reply.lease)).verdict == pb.VERDICT_ADMITTED
            assert intact(state, receipt) and not list((state / "uploads").iterdir())


async def test_no_room_for_another_file(tmp_path: Path) -> None:
    """File systems run out of inodes too; every folder looks half empty then."""

    async def _send_some(remote: Crowd, lease: str, data: bytes) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="ended at byte"):
            await remote._stub.Upload(iter([pb.UploadRequest(lease=lease, offset=0, data=data)]))

    with disk(tmp_path / "state") as state:
        async with at_work(state) as (daemon, remote):
            earlier = await contribute(remote, tmp_path, ALICE)
            reply = await join(remote, BOB)
            file, declaration = written(trained(reply, seed=1), tmp_path / "bob")
            opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
            await remote._stub.OpenUpload(opened)
            data = file.read_bytes()
            with full_of_files(state):
                sent = [pb.UploadRequest(lease=reply.lease, offset=0, data=data)]
                await no_room(remote._stub.Upload(iter(sent)), "No space left")
            await _send_some(remote, reply.lease, data[:100])
            with full_of_files(state):  # now the blob's name is what there is no room for
                sent = [pb.UploadRequest(lease=reply.lease, offset=100, data=data[100:])]
                await no_room(remote._stub.Upload(iter(sent)), "No space left")
                assert (await daemon.operator.status("notes")).contributed == 1
            receipt = await remote.upload(reply.lease, declaration, file, nothing)
            assert intact(state, earlier) and intact(state, receipt)


@pytest.mark.parametrize("of", ["bytes", "files"])
async def test_a_publication_waits_for_room(tmp_path: Path, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY", 0.2)

    with disk(tmp_path / "state", 48) as state:
        async with at_work(state) as (daemon, remote):
            receipts = [await contribute(remote, tmp_path, client) for client in (ALICE, BOB)]
            # The database has to note that the round closes, so there is some room, and too little for a model.
            with full(state, but=2 * MB) if of == "bytes" else full_of_files(state):
                await daemon.operator.close("notes")
                async with asyncio.timeout(LONG):
                    async for status in daemon.statuses.watch("notes"):
                        if status.stage.startswith("waiting for room"):
                            break
                assert status.state == pb.STATE_PUBLISHING
                assert (await remote.heartbeat(pb.HeartbeatRequest(lease=(await join(remote)).lease))).directive
                await asyncio.sleep(1)  # it tries again, and there is still no room
                assert (await daemon.operator.status("notes")).state == pb.STATE_PUBLISHING
            async with asyncio.timeout(LONG):
                async for status in remote.watch("notes"):
                    assert status.state in (pb.STATE_PUBLISHING, pb.STATE_PUBLISHED), status.reason
                    if status.state == pb.STATE_PUBLISHED:
                        break
            assert [publication.version for publication in status.publications] == [1]
            for artifact in status.publications[0].artifacts:
                there = state / "publications" / "notes" / "v1" / artifact.name
                assert stream.digest(there) == artifact.digest
            assert [entry.name for entry in (state / "publications" / "notes").iterdir()] == ["v1"]
            assert all(intact(state, receipt) for receipt in receipts)


async def test_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    """As one becomes when it fails. The database is elsewhere: no mount with a file open for writing can be changed."""

    with disk(tmp_path / "state") as state:
        async with at_work(state, database=f"sqlite:///{tmp_path / 'rows.sqlite'}") as (daemon, remote):
            earlier = await contribute(remote, tmp_path, ALICE)
            with read_only(state):
                reply = await join(remote, BOB)
                file, declaration = written(trained(reply, seed=1), tmp_path / "bob")
                opened = pb.OpenUploadRequest(lease=reply.lease, declaration=declaration)
                await remote._stub.OpenUpload(opened)
                sent = [pb.UploadRequest(lease=reply.lease, offset=0, data=file.read_bytes())]
                await no_room(remote._stub.Upload(iter(sent)), "Read-only file system")
                with pytest.raises(Unreachable, match="Read-only"):
                    await remote.upload(reply.lease, declaration, file, nothing)
                assert (await remote.heartbeat(pb.HeartbeatRequest(lease=reply.lease))).directive
                assert intact(state, earlier) and (await daemon.operator.status("notes")).contributed == 1
            receipt = await remote.upload(reply.lease, declaration, file, nothing)
            assert intact(state, earlier) and intact(state, receipt)


def test_a_daemon_that_cannot_write_says_so_and_starts_later(tmp_path: Path) -> None:
    with disk(tmp_path / "state") as state:
        with commands.coordinator(state):
            (tmp_path / "job.toml").write_text(f'name = "notes"\n[model]\nbase = "{BASE}"\n')
            assert tomllib.loads((tmp_path / "job.toml").read_text())
            commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", state)
        serve = ("serve", "--listen", "127.0.0.1:0", "--state", state)
        with read_only(state):
            _, error = commands.run("coordinator", *serve, code=6)
            assert "Read-only file system" in error
        with full(state):
            _, error = commands.run("coordinator", *serve, code=6)
            assert "cannot use its database" in error or "No space left" in error or "no room" in error
        with commands.coordinator(state):
            shown, _ = commands.run("coordinator", "jobs", "--state", state)
            assert "notes" in shown
