"""From contributions to a verified publication, through an interruption and a failure."""

import asyncio
import json
from pathlib import Path

import numpy as np

from converters import adapter, llama
from converters.adapter import LowRank
from coordinator.daemon import Daemon
from coordinator.jobs import spec
from oneround.v1 import federation_pb2 as pb
from tests.clients import Crowd, connected
from tests.coordinator.test_server import (
    ALICE,
    BOB,
    SPEC,
    join,
    judged,
    nothing,
    running,
    trained,
    with_server,
    written,
)

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


def test_an_interrupted_publication_is_made_again(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async def test() -> None:
        async with (
            running(state) as (daemon, address),
            connected(address, state) as remote,
        ):
            await daemon.submit(spec.parse(SPEC))
            await contribute(remote, tmp_path)
            await daemon.close("notes")
            assert (await until(daemon, stage=True)).state == pb.STATE_PUBLISHING
        async with running(state) as (daemon, _):
            status = await until(daemon)
        (publication,) = status.publications
        folder = Path(publication.folder)
        assert {file.name for file in folder.parent.iterdir()} == {"v1"}, "nothing half-made is left"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert [(given["num_examples"], given["verdict"]) for given in manifest["contributions"]] == [
            (10, "admitted"),
            (30, "admitted"),
            (50, "quarantined"),
        ]
        assert [given["weight"] for given in manifest["contributions"]] == [0.25, 0.75, 0.0]
        assert "NaN" in manifest["contributions"][2]["reason"]
        assert manifest["verification"]["notes-f16.gguf"]["passed"]
        assert {artifact.name for artifact in publication.artifacts} == {
            *("manifest.json", "manifest.json.signature"),
            *manifest["files"],
        }
        assert np.isfinite(llama.logits(llama.load(folder / "notes-f16.gguf"), [5, 6, 7])).all()

    asyncio.run(test())


def test_a_failed_publication_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async def test(daemon: Daemon, remote: Crowd) -> None:
        await contribute(remote, tmp_path)
        (base,) = (state / "bases").iterdir()
        whole = base.read_bytes()
        base.write_bytes(whole[: len(whole) // 2])
        await daemon.close("notes")
        failed = await until(daemon, state=pb.STATE_FAILED)
        assert "is not a sound GGUF file" in failed.reason and "coordinator publish notes" in failed.reason
        assert (state / "publications" / "notes" / "v1.failed").is_dir(), "what was made is kept aside"
        base.write_bytes(whole)
        await daemon.close("notes")
        assert len((await until(daemon)).publications) == 1
        assert not (state / "publications" / "notes" / "v1.failed").exists()

    with_server(state, test)
