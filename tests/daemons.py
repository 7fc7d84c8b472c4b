"""A daemon and its server in this process, and what a client of it does step by step."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from converters import adapter
from converters.adapter import Adapter, LowRank, Shape
from coordinator.auth import identity
from coordinator.cli import client as control
from coordinator.daemon import Daemon
from coordinator.jobs import spec
from coordinator.rpc import server, transport
from oneround import stream
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd, connected
from tests.waiting import LONG

BASE = Path(__file__).parents[1] / "benchmarks" / "base"


ALICE, BOB = "a" * 32, "b" * 32


SPEC = {
    "name": "notes",
    "model": {"base": str(BASE)},
    "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
    "round": {"min_clients": 2, "target_clients": 0},
    "publish": {"gguf": ["f16"]},
}


@asynccontextmanager
async def running(
    state: Path,
    clock: Callable[[], float] = time.time,
    database: str = "",
    *,
    certificates: transport.Certificates | None = None,
    insecure: bool = False,
) -> AsyncIterator[tuple[Daemon, str]]:
    """A daemon and its server on a free port."""
    daemon = Daemon(state, database, clock=clock)
    loop = asyncio.create_task(daemon.run())
    who = identity.load_or_create(state)
    grpc_server, address = server.create(daemon, who, "127.0.0.1:0", insecure=insecure, certificates=certificates)
    await grpc_server.start()
    control.announce(state, address, insecure=insecure, fingerprint=who.fingerprint)
    try:
        yield daemon, address
    finally:
        await grpc_server.stop(None)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        daemon.release()


@asynccontextmanager
async def served(state: Path, **options: Any) -> AsyncIterator[tuple[Daemon, Crowd]]:
    """A daemon as `running` makes it, over a state folder that may have seen others, with the job of SPEC; and a crowd
    of clients that is connected to it."""
    async with running(state, **options) as (daemon, address), connected(address, state) as crowd:
        await daemon.operator.submit(spec.parse(SPEC))
        yield daemon, crowd


async def join(remote: Crowd, client: str = ALICE) -> pb.JoinReply:
    return await remote.join_as(client, pb.JoinRequest(job="notes", client_name=client[:5]))


def trained(reply: pb.JoinReply, seed: int = 0, **changes) -> Adapter:  # type: ignore[no-untyped-def]
    """An adapter such as training would give."""
    shapes = {module.name: Shape(module.out_features, module.in_features) for module in reply.job.modules}
    rng = np.random.default_rng(seed)
    modules = {
        name: LowRank(factors.a, rng.standard_normal(factors.b.shape).astype(np.float32))
        for name, factors in adapter.initial(shapes, 2, 0).modules.items()
    }
    return Adapter(modules | changes, described(reply.job))


def described(job: pb.Job, **changes: str) -> dict[str, str]:
    """What a client writes beside its factors."""
    over = {"base": job.base_fingerprint, "tokenizer": job.tokenizer, "chat_template": job.chat_template}
    return over | changes


async def judged(remote: Crowd, lease: str) -> pb.Judgement:
    """What is made of a contribution, once it is."""
    async with asyncio.timeout(LONG):
        while True:
            judgement = (await remote.heartbeat(pb.HeartbeatRequest(lease=lease))).judgement
            if judgement.verdict not in (pb.VERDICT_UNSPECIFIED, pb.VERDICT_PENDING):
                return judgement
            await asyncio.sleep(0.05)


def written(made: Adapter, folder: Path, num_examples: int = 10) -> tuple[Path, pb.Declaration]:
    folder.mkdir(exist_ok=True)
    file = folder / "adapter.safetensors"
    adapter.write(made, file, "bfloat16")
    return file, pb.Declaration(digest=stream.digest(file), size=file.stat().st_size, num_examples=num_examples)


def nothing(_: int) -> None:
    pass


CLIENTS = [letter * 32 for letter in "abcdef"]


async def version(daemon: Daemon, number: int, name: str = "late") -> pb.JobStatus:
    """The job once this version, and none after it, is there."""
    async with asyncio.timeout(LONG):
        async for status in daemon.statuses.watch(name):
            assert len(status.publications) <= number, status.publications[-1].reason
            if status.state == pb.STATE_PUBLISHED and len(status.publications) == number:
                return status
    raise AssertionError("watching never ends")


def manifest(status: pb.JobStatus) -> dict[str, dict[str, object]]:
    """The newest version's contributions by client."""
    written = json.loads((Path(status.publications[-1].folder) / "manifest.json").read_text())
    return {given["client"]: given for given in written["contributions"]}


async def two_contribute(remote: Crowd, folder: Path) -> None:
    """Alice and Bob; the round publishes when the operator closes it."""
    for seed, client in enumerate((ALICE, BOB)):
        reply = await join(remote, client)
        made = trained(reply, seed)
        small = {name: LowRank(factors.a, factors.b * np.float32(0.05)) for name, factors in made.modules.items()}
        file, declaration = written(Adapter(small, made.metadata), folder / client[0])
        await remote.upload(reply.lease, declaration, file, nothing)
        await judged(remote, reply.lease)


EVE = "e" * 32


async def contribute(remote: Crowd, folder: Path) -> None:
    """Alice and Bob send sound adapters, Eve one with NaN."""
    for seed, client in enumerate((ALICE, BOB, EVE)):
        reply = await join(remote, client)
        made = trained(reply, seed)
        scaled = {name: LowRank(factors.a, factors.b * np.float32(0.05)) for name, factors in made.modules.items()}
        if client == EVE:
            scaled[reply.job.modules[0].name].b[0] = np.nan
        file, declaration = written(adapter.Adapter(scaled, made.metadata), folder, num_examples=10 + 20 * seed)
        await remote.upload(reply.lease, declaration, file, nothing)
        verdict = (await judged(remote, reply.lease)).verdict
        assert verdict == (pb.VERDICT_QUARANTINED if client == EVE else pb.VERDICT_ADMITTED)


async def until(daemon: Daemon, *, stage: bool = False, state: pb.State = pb.STATE_PUBLISHED) -> pb.JobStatus:
    """Wait until the daemon is at work on the publication, or the job is in a state."""
    async for status in daemon.statuses.watch("notes"):
        if (stage and status.stage) or status.state == state:
            return status
    raise AssertionError("watching never ends")
