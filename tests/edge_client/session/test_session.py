"""Taking part, with a real coordinator and a backend that honours the contract and trains in no time."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.jobs import spec
from edge_client import session
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.ui.screen import Screen
from oneround.errors import BadData, Refused, Unreachable
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.daemons import BASE, SPEC, running
from tests.fakes import FakeBackend
from tests.participants import participant, take_part


async def test_running_it_again_gives_the_same_receipt_and_trains_once(tmp_path: Path) -> None:
    who = participant(tmp_path, backend := FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))
        receipt = await take_part(address, who)
        assert receipt.digest and await take_part(address, who) == receipt
    assert backend.runs == 1


async def test_a_job_of_the_same_name_elsewhere_is_another_job(tmp_path: Path) -> None:
    who = participant(tmp_path, backend := FakeBackend())
    for coordinator in ("one", "two"):
        async with running(tmp_path / coordinator) as (daemon, address):
            await daemon.operator.submit(spec.parse(SPEC))
            assert (await take_part(address, who)).digest
    assert backend.runs == 2, "an adapter of one job is never sent to another"


async def test_a_trained_adapter_waits_for_its_receipt(tmp_path: Path) -> None:
    who = participant(tmp_path, backend := FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))
        with pytest.raises(RuntimeError):
            await take_part(address, who, RuntimeError("the machine goes down"))
        assert (await take_part(address, who, Unreachable("the coordinator is away for a moment"))).digest
    assert backend.runs == 1


async def test_a_closed_round_stops_training(tmp_path: Path) -> None:
    who = participant(tmp_path, FakeBackend(seconds_a_step=0.2), rows=2000)
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))

        async def close() -> None:
            async for status in daemon.statuses.watch("notes"):
                if status.joined:
                    break
            await daemon.operator.close("notes")

        closing = asyncio.create_task(close())
        with pytest.raises(Refused, match=r"stopped this job.*closed by the operator"):
            await take_part(address, who)
        await closing


async def test_a_model_of_ones_own_has_to_be_the_jobs(tmp_path: Path) -> None:
    who = participant(tmp_path, backend := FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse(SPEC))
        async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
            announced = (await remote.join(pb.JoinRequest(job="notes"))).job
            found = await session.fetch_base(remote, announced, who.state, BASE, Screen())
            assert found == BASE
            with pytest.raises(BadData, match="is not the job's base model"):
                await session.fetch_base(remote, announced, who.state, tmp_path, Screen())
    assert backend.runs == 0


async def test_a_batch_that_is_too_large_is_taken_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = participant(tmp_path, backend := FakeBackend())
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse({**SPEC, "train": {"batch_size": 65536}}))
        assert (await take_part(address, who)).digest
    parts = backend.setup.parts
    assert parts > 1 and f"Each batch is processed in {parts} parts" in capsys.readouterr().out


async def test_packing_takes_fewer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for packing in (False, True):
        backend, folder = FakeBackend(), tmp_path / str(packing)
        folder.mkdir()
        async with running(folder / "one") as (daemon, address):
            await daemon.operator.submit(spec.parse({**SPEC, "train": {"batch_size": 2, "packing": packing}}))
            assert (await take_part(address, participant(folder, backend))).digest
        steps.append(backend.steps)
    assert steps[1] < steps[0] / 2, "rows of a few tokens leave most of 2 × 512 empty"


async def test_what_is_cut_dropped_or_skipped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"p{n}", "completion": "a b" * (200 if n < 3 else 1)} for n in range(40)]
    rows += [{"prompt": "very long " * 200, "completion": str(n)} for n in range(2)]
    who = participant(tmp_path, FakeBackend())
    who.data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": 3, "completion": "x"}]))
    (tmp_path / "valid.jsonl").write_text('{"prompt": "p", "completion": "a"}\n')
    who.data.rename(tmp_path / "train.jsonl")
    who = replace(who, data=tmp_path / "train.jsonl", skip_bad_rows=True)
    async with running(tmp_path / "one") as (daemon, address):
        await daemon.operator.submit(spec.parse({**SPEC, "train": {"max_seq_len": 64}}))
        async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
            await session.take_part(remote, "notes", who, Screen(as_json=True))
    events = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]  # the daemon logs there too
    said = commands.events("\n".join(events))
    assert said["truncated"] == {"event": "truncated", "truncated": 3, "dropped": 2, "max_seq_len": 64}
    assert said["skipped"]["skipped"] == 1
    assert (said["plan"]["examples"], said["plan"]["held_out"]) == (40, 1)
