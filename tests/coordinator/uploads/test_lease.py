"""Who may upload is known from the call's metadata; clients and coordinators from before that still understand each
other."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from grpc import StatusCode

from coordinator.rpc import federation
from coordinator.uploads.flow_control import FlowControl, PacedStream
from oneround.v1 import federation_pb2 as pb
from tests.attacks.refusals import refused
from tests.clients import Crowd, session
from tests.daemons import ALICE, BOB, join, nothing, served, trained, written


async def declared(remote: Crowd, folder: Path, client: str) -> tuple[str, bytes]:
    """A client that may send now: its lease, and its bytes."""
    reply = await join(remote, client)
    file, declaration = written(trained(reply), folder / client[:5])
    await remote._stub.OpenUpload(pb.OpenUploadRequest(lease=reply.lease, declaration=declaration))
    return reply.lease, file.read_bytes()


async def test_the_lease_in_the_metadata_is_enough(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (_, remote):
        lease, data = await declared(remote, tmp_path, ALICE)
        metadata = [*await session(await remote.speaker(ALICE)), ("lease", lease)]
        receipt = await remote.plain.Upload(iter([pb.UploadRequest(data=data)]), metadata=metadata)
        assert receipt.size == len(data)


async def test_another_ones_lease_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async with served(tmp_path / "state") as (_, remote):
        lease, data = await declared(remote, tmp_path, ALICE)
        mine, _data = await declared(remote, tmp_path, BOB)
        bob = await session(await remote.speaker(BOB))

        async def silence() -> AsyncIterator[pb.UploadRequest]:
            await asyncio.Event().wait()
            yield pb.UploadRequest()

        async with asyncio.timeout(30):
            for wrong in (lease, "0" * 64, " ", "é".encode().hex()):
                call = remote.plain.Upload(silence(), metadata=[*bob, ("lease", wrong)])
                await refused(call, StatusCode.PERMISSION_DENIED, "lease")
        both = iter([pb.UploadRequest(lease=lease, data=data)])
        call = remote.plain.Upload(both, metadata=[*bob, ("lease", mine)])
        await refused(call, StatusCode.INVALID_ARGUMENT, "another lease")
        call = remote.plain.Upload(iter(()), metadata=[*bob, ("lease", mine)])
        await refused(call, StatusCode.INVALID_ARGUMENT, "empty upload")
        assert not [file for file in (tmp_path / "state" / "uploads").iterdir() if file.stat().st_size]


@pytest.mark.parametrize("coordinator_knows_metadata", [True, False], ids=["new", "old"])
async def test_old_and_new_ends_understand_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coordinator_knows_metadata: bool
) -> None:
    """An old client has the lease in its first message alone; an old coordinator looks for it nowhere else."""
    if not coordinator_knows_metadata:
        metadata = federation._metadata

        def without_lease(context: federation.Context) -> Mapping[str, str | bytes]:
            return {key: value for key, value in metadata(context).items() if key != "lease"}

        monkeypatch.setattr(federation, "_metadata", without_lease)

    async with served(tmp_path / "state") as (_, remote):
        reply = await join(remote, ALICE)
        file, declaration = written(trained(reply), tmp_path / "alice")
        assert (await remote.upload(reply.lease, declaration, file, nothing)).digest == declaration.digest
        lease, data = await declared(remote, tmp_path, BOB)
        old_client = iter([pb.UploadRequest(lease=lease, data=data)])
        receipt = await remote.plain.Upload(old_client, metadata=await session(await remote.speaker(BOB)))
        assert receipt.size == len(data)


async def test_who_is_known_does_not_wait_behind_strangers() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    strangers, known = FlowControl(1), FlowControl(1)
    first = PacedStream(numbers(), strangers, known)
    assert await first.peek() == await first.peek() == 0
    waiting = asyncio.create_task(PacedStream(numbers(), strangers, known).next())
    authorised = PacedStream(numbers(), known, known)
    assert await authorised.next() == 0 and not waiting.done()
    authorised.close()
    assert await first.next() == 0, "what was looked at is not lost"
    assert await first.next() == 1, "and costs one turn"
    first.close()
    assert await waiting == 0
