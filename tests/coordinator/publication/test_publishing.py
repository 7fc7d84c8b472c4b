"""From contributions to a verified publication, through an interruption and a failure."""

import json
from pathlib import Path

import numpy as np

from converters import llama
from coordinator.jobs import spec
from oneround.v1 import federation_pb2 as pb
from tests.clients import connected
from tests.daemons import (
    SPEC,
    contribute,
    running,
    served,
    until,
)


async def test_an_interrupted_publication_is_made_again(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async with (
        running(state) as (daemon, address),
        connected(address, state) as remote,
    ):
        await daemon.operator.submit(spec.parse(SPEC))
        await contribute(remote, tmp_path)
        await daemon.operator.close("notes")
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


async def test_a_failed_publication_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    state = tmp_path / "state"

    async with served(state) as (daemon, remote):
        await contribute(remote, tmp_path)
        (base,) = (state / "bases").iterdir()
        whole = base.read_bytes()
        base.write_bytes(whole[: len(whole) // 2])
        await daemon.operator.close("notes")
        failed = await until(daemon, state=pb.STATE_FAILED)
        assert "is not a sound GGUF file" in failed.reason and "coordinator publish notes" in failed.reason
        assert (state / "publications" / "notes" / "v1.failed").is_dir(), "what was made is kept aside"
        base.write_bytes(whole)
        await daemon.operator.close("notes")
        assert len((await until(daemon)).publications) == 1
        assert not (state / "publications" / "notes" / "v1.failed").exists()
