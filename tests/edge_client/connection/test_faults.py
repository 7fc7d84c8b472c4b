"""Faults of the coordinator: they are no refusals, and who stays tries again."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.daemon import Daemon
from coordinator.jobs import spec as job_spec
from edge_client import session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.session.heartbeat import Heartbeat
from edge_client.unattended import watch
from edge_client.unattended.watch import RetryLater
from oneround.errors import Conflict, Denied, NotEnough, NotFound, NotSignedIn, OneroundError, Refused
from oneround.v1 import federation_pb2 as pb
from tests.daemons import SPEC, running
from tests.fakes import FakeBackend
from tests.watching import Listening, at_work, quick_stay


def failing(times: int, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A call of the daemon that has a fault for the first so many times."""
    left = [times]

    async def called(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("a fault of ours")
        return await call(*arguments, **options)

    return called


async def test_a_fault_at_joining_is_no_refusal(tmp_path: Path) -> None:
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(job_spec.parse({**SPEC, "name": "ward-1"}))
        daemon.participation.join = failing(1, daemon.participation.join)  # type: ignore[method-assign]
        async with remotes.connect(address, Pins(tmp_path), lambda *_: None) as remote:
            with pytest.raises(OneroundError, match="a fault in the coordinator") as caught:
                await remote.join(pb.JoinRequest(job="ward-1"))
            assert type(caught.value) is OneroundError and caught.value.exit_code == 1
            reply = await remote.join(pb.JoinRequest(job="ward-1"))

            # Nor do faults stop a training: the next heartbeat may get through.
            beats = daemon.participation.heartbeat
            daemon.participation.heartbeat = failing(2, beats)  # type: ignore[method-assign]
            heartbeat = Heartbeat(reply.lease)
            heartbeat.now.step, heartbeat.now.total_steps = 1, 2
            beating = asyncio.create_task(heartbeat.beat(remote))
            for _ in range(600):
                if (await daemon.operator.status("ward-1")).clients[0].step == 1:
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError("no heartbeat got through in a minute")
            heartbeat.check()
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


@pytest.mark.parametrize("where", ["join", "jobs"])
async def test_who_stays_gets_over_a_fault(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_FIRST_TRY_AGAIN", 0.1)
    heard, backend = Listening(capsys), FakeBackend()

    def break_it(daemon: Daemon) -> None:
        if where == "join":
            daemon.participation.join = failing(2, daemon.participation.join)  # type: ignore[method-assign]
        else:
            daemon.outlines = failing(2, daemon.outlines)  # type: ignore[method-assign]

    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(job_spec.parse({**SPEC, "name": "ward-1"}))
        break_it(daemon)
        async with at_work(quick_stay(address, tmp_path, backend)):
            await heard.until("no_part" if where == "join" else "retry")
            await heard.until("receipt")
    assert backend.runs == 1


@pytest.mark.parametrize(
    ("error", "stands"),
    [
        (OneroundError("a fault"), False),
        (NotEnough("the job has its clients"), False),
        (session.AwaitsApproval("nobody has"), False),
        *((kind("no"), True) for kind in (Refused, NotFound, Denied, Conflict, NotSignedIn)),
    ],
)
def test_what_is_tried_again(error: OneroundError, stands: bool) -> None:
    assert math.isinf(RetryLater.once_more(None, error, 0.0).again) is stands
