"""Taking part, with a real coordinator and a backend that honours the contract and trains in no time."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.adapter import Adapter, LowRank
from coordinator.jobs import spec
from edge_client import session
from edge_client.backends import EXACT, Progress, Setup
from edge_client.connection import remote as remotes
from edge_client.connection.identity import Pins
from edge_client.connection.remote import OnBytes, Remote
from edge_client.data.batches import Batches
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from edge_client.ui.screen import Screen
from oneround.errors import BadData, Refused, Unreachable
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.coordinator.test_server import BASE, SPEC, running


class Quick:
    """Returns the initial adapter with another B, after as many steps as the plan has."""

    name = "quick"

    def __init__(self, seconds_a_step: float = 0.0) -> None:
        self.runs = 0
        self.setup, self.steps = EXACT, 0
        self._pause = seconds_a_step

    def available(self) -> str | None:
        return None

    def device(self) -> str:
        return "cpu"

    def precision(self) -> str:
        return "float32"

    def train(
        self,
        base: Path,
        initial: Adapter,
        recipe: Recipe,
        plan: Batches,
        on_step: Callable[[Progress], None],
        snapshot: Snapshot | None = None,
        setup: Setup = EXACT,
    ) -> Adapter:
        self.runs += 1
        self.setup, self.steps = setup, plan.total_steps
        assert (base / "model.safetensors").exists()
        for step in range(plan.total_steps):
            time.sleep(self._pause)
            on_step(Progress(step + 1, plan.total_steps, 1.0, plan.batch(step).num_targets, 0.01, Setup(), dict))
        return Adapter({name: LowRank(f.a, np.ones_like(f.b)) for name, f in initial.modules.items()})


class Fails(Remote):
    """A remote whose first upload meets an error."""

    def __init__(self, remote: Remote, error: Exception | None) -> None:
        super().__init__(remote.connection, remote.me)
        self.error = error

    async def upload(self, lease: str, declaration: pb.Declaration, file: Path, on_bytes: OnBytes) -> pb.Receipt:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return await super().upload(lease, declaration, file, on_bytes)


def participant(tmp_path: Path, backend: Quick, rows: int = 30) -> session.Participant:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "row {n} of the data"}}\n' for n in range(rows)))
    state = tmp_path / "client"
    state.mkdir(exist_ok=True)
    return session.Participant(state=state, name="alice", data=data, backend=backend)


async def take_part(address: str, who: session.Participant, error: Exception | None = None) -> pb.Receipt:
    async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
        return await session.take_part(Fails(remote, error), "notes", who, Screen())


def test_running_it_again_gives_the_same_receipt_and_trains_once(tmp_path: Path) -> None:
    async def test() -> None:
        who = participant(tmp_path, backend := Quick())
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse(SPEC))
            receipt = await take_part(address, who)
            assert receipt.digest and await take_part(address, who) == receipt
        assert backend.runs == 1

    asyncio.run(test())


def test_a_job_of_the_same_name_elsewhere_is_another_job(tmp_path: Path) -> None:
    async def test() -> None:
        who = participant(tmp_path, backend := Quick())
        for coordinator in ("one", "two"):
            async with running(tmp_path / coordinator) as (daemon, address):
                await daemon.submit(spec.parse(SPEC))
                assert (await take_part(address, who)).digest
        assert backend.runs == 2, "an adapter of one job is never sent to another"

    asyncio.run(test())


def test_a_trained_adapter_waits_for_its_receipt(tmp_path: Path) -> None:
    async def test() -> None:
        who = participant(tmp_path, backend := Quick())
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse(SPEC))
            with pytest.raises(RuntimeError):
                await take_part(address, who, RuntimeError("the machine goes down"))
            assert (await take_part(address, who, Unreachable("the coordinator is away for a moment"))).digest
        assert backend.runs == 1

    asyncio.run(test())


def test_a_closed_round_stops_training(tmp_path: Path) -> None:
    async def test() -> None:
        who = participant(tmp_path, Quick(seconds_a_step=0.2), rows=2000)
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse(SPEC))

            async def close() -> None:
                async for status in daemon.statuses.watch("notes"):
                    if status.joined:
                        break
                await daemon.close("notes")

            closing = asyncio.create_task(close())
            with pytest.raises(Refused, match=r"stopped this job.*closed by the operator"):
                await take_part(address, who)
            await closing

    asyncio.run(test())


def test_a_model_of_ones_own_has_to_be_the_jobs(tmp_path: Path) -> None:
    async def test() -> None:
        who = participant(tmp_path, backend := Quick())
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse(SPEC))
            async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
                announced = (await remote.join(pb.JoinRequest(job="notes"))).job
                found = await session.fetch_base(remote, announced, who.state, BASE, Screen())
                assert found == BASE
                with pytest.raises(BadData, match="is not the job's base model"):
                    await session.fetch_base(remote, announced, who.state, tmp_path, Screen())
        assert backend.runs == 0

    asyncio.run(test())


def test_a_batch_that_is_too_large_is_taken_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = Quick()

    async def test() -> None:
        who = participant(tmp_path, quick)
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse({**SPEC, "train": {"batch_size": 65536}}))
            assert (await take_part(address, who)).digest

    asyncio.run(test())
    parts = quick.setup.parts
    assert parts > 1 and f"A batch is taken in {parts} parts" in capsys.readouterr().out


def test_packing_takes_fewer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for packing in (False, True):
        quick = Quick()

        async def test(quick: Quick = quick, packing: bool = packing) -> None:
            where = tmp_path / str(packing)
            where.mkdir()
            async with running(where / "one") as (daemon, address):
                await daemon.submit(spec.parse({**SPEC, "train": {"batch_size": 2, "packing": packing}}))
                assert (await take_part(address, participant(where, quick))).digest

        asyncio.run(test())
        steps.append(quick.steps)
    assert steps[1] < steps[0] / 2, "rows of a few tokens leave most of 2 × 512 empty"


def test_what_is_cut_dropped_or_skipped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        rows = [{"prompt": f"p{n}", "completion": "a b" * (200 if n < 3 else 1)} for n in range(40)]
        rows += [{"prompt": "very long " * 200, "completion": str(n)} for n in range(2)]
        who = participant(tmp_path, Quick())
        who.data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": 3, "completion": "x"}]))
        (tmp_path / "valid.jsonl").write_text('{"prompt": "p", "completion": "a"}\n')
        who.data.rename(tmp_path / "train.jsonl")
        who = replace(who, data=tmp_path / "train.jsonl", skip_bad_rows=True)
        async with running(tmp_path / "one") as (daemon, address):
            await daemon.submit(spec.parse({**SPEC, "train": {"max_seq_len": 64}}))
            async with remotes.connect(address, Pins(who.state), lambda *_: None) as remote:
                await session.take_part(remote, "notes", who, Screen(as_json=True))

    asyncio.run(test())
    events = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]  # the daemon logs there too
    said = commands.events("\n".join(events))
    assert said["truncated"] == {"event": "truncated", "truncated": 3, "dropped": 2, "max_seq_len": 64}
    assert said["skipped"]["skipped"] == 1
    assert (said["plan"]["examples"], said["plan"]["held_out"]) == (40, 1)
