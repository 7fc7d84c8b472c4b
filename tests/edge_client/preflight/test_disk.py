"""Disks of laptops fill up: before training, while it goes on, and at its end; on a small file system of their own."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import adapter
from converters.adapter import Adapter, LowRank
from converters.updates import sizes
from coordinator.jobs import spec as job
from edge_client import outbox, session
from edge_client.connection import remote as remotes
from edge_client.preflight import disk as disks
from edge_client.training import snapshot
from edge_client.training.snapshot import Snapshot
from oneround import files
from oneround.errors import NotEnough
from oneround.v1 import federation_pb2 as pb
from tests.daemons import BASE, SPEC, running
from tests.disks import disk, full
from tests.fakes import FakeBackend, snapshot_arrays
from tests.participants import take_part

MB = 1 << 20
MODULES = [pb.Module(name=f"model.layers.{n}.self_attn.q_proj", out_features=96, in_features=64) for n in range(40)]


def announced(dtype: str = "bfloat16", rank: int = 8) -> pb.Job:
    spec = pb.JobSpec(name="notes", lora=pb.LoraSpec(rank=rank), upload=pb.UploadSpec(dtype=dtype))
    base = [pb.Artifact(name="model.safetensors", digest="ab" * 32, size=5 * MB)]
    return pb.Job(
        spec=spec,
        id="0" * 32,
        modules=MODULES,
        initial=pb.Artifact(name="initial", digest="cd" * 32, size=MB),
        base_files=base,
        base_fingerprint="ef" * 32,
    )


def factors(job: pb.Job) -> Adapter:
    rank = job.spec.lora.rank
    shapes = {m.name: (m.out_features, m.in_features) for m in job.modules}
    return Adapter(
        {n: LowRank(np.ones((rank, i), np.float32), np.ones((o, rank), np.float32)) for n, (o, i) in shapes.items()}
    )


@pytest.mark.parametrize("dtype", adapter.WIRE_DTYPES)
@pytest.mark.parametrize("rank", [1, 64])
def test_sizes_are_those_of_the_files(tmp_path: Path, dtype: str, rank: int) -> None:
    """A little more than the files have, never less."""
    spec = announced(dtype, rank)
    made = factors(spec)
    adapter.write(Adapter(made.modules, {"job": "x" * 64, "base": "ab" * 32}), tmp_path / "adapter", dtype)
    snapshot.write(tmp_path / "snapshot", Snapshot((0.5,) * 100, snapshot_arrays(made)), "ab" * 32)
    finished, kept = ((tmp_path / name).stat().st_size for name in ("adapter", "snapshot"))
    assert finished <= sizes.finished_bytes(spec) < finished + 40_000
    assert kept <= sizes.snapshot_bytes(spec) < kept + 60_000


def test_what_is_here_is_not_needed_again(tmp_path: Path) -> None:
    spec = announced()
    box = outbox.outbox(tmp_path, spec)
    fresh = disks.room(spec, tmp_path, None)
    assert fresh.base == 5 * MB and fresh.training > 2 * sizes.snapshot_bytes(spec) + MB + disks.MARGIN_BYTES
    assert disks.room(spec, tmp_path, tmp_path).base == 0, "the person has the base"

    folder = outbox.model_folder(tmp_path, spec)
    folder.mkdir(parents=True)
    partial = remotes.partial_path(folder / "model.safetensors", spec.base_files[0])
    partial.write_bytes(b"x" * 2 * MB)
    assert disks.room(spec, tmp_path, None).base == 3 * MB, "a download goes on where it was"
    partial.rename(folder / "model.safetensors")
    box.folder.mkdir(parents=True)
    box.initial.write_bytes(b"x" * MB)
    disks.keep_room(spec, box)
    later = disks.room(spec, tmp_path, None)
    assert later.base == 0 and fresh.training - later.training >= MB + sizes.finished_bytes(spec)
    box.keep_trained(factors(spec), "bfloat16", pb.Declaration(num_examples=1))
    assert disks.room(spec, tmp_path, None).needed == 0


def test_too_little_room_says_how_much_and_where(tmp_path: Path) -> None:
    disks.DiskNeed(tmp_path, 10, 10, 20).require()
    with pytest.raises(NotEnough) as caught:
        disks.DiskNeed(tmp_path, 3 * 10**9, 2 * 10**8, 10**9).require()
    assert str(tmp_path) in str(caught.value)
    assert "3.2 GB (3.0 GB of them for the base model), and 1.0 GB are free" in str(caught.value)
    assert "free 2.2 GB" in caught.value.hint and "--model" in caught.value.hint and "--state" in caught.value.hint
    with pytest.raises(NotEnough) as caught:
        disks.DiskNeed(tmp_path, 0, 2 * 10**8, 10**8).require()
    assert "--model" not in caught.value.hint


def test_reserved_room_is_written_over(tmp_path: Path) -> None:
    file = tmp_path / "result"
    files.reserve(file, MB)
    kept = files.reserved(file).stat()
    assert kept.st_blocks * 512 >= MB and not file.exists()
    files.reserve(file, MB)  # once more, after an interruption
    files.replace(file, [b"short"])
    assert file.read_bytes() == b"short" and file.stat().st_ino == kept.st_ino and not files.reserved(file).exists()


@asynccontextmanager
async def on_a_disk(
    tmp_path: Path, megabytes: int, model: Path | None = BASE
) -> AsyncIterator[tuple[Path, str, session.Participant]]:
    """A client whose state has a small disk, and a coordinator elsewhere: the state, the address, the client."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "row {n} of the data"}}\n' for n in range(90)))
    with disk(tmp_path / "client", megabytes) as state:
        who = session.Participant(state, "alice", tmp_path / "data.jsonl", FakeBackend(), model, save_every=0.0)
        async with running(tmp_path / "coordinator") as (daemon, address):
            await daemon.operator.submit(job.parse(SPEC))
            yield state, address, who


def fetched(state: Path) -> list[Path]:
    return list(state.rglob("*.safetensors"))


async def test_a_disk_that_is_too_small_is_told_before_anything_comes(tmp_path: Path) -> None:
    async with on_a_disk(tmp_path, 72, model=None) as (state, address, who):
        with pytest.raises(NotEnough, match=r"10\.\d MB of them for the base model") as caught:
            await take_part(address, who)
        assert caught.value.exit_code == 6 and "--model" in caught.value.hint
        assert not fetched(state)
        assert (await take_part(address, replace(who, model=BASE))).digest, "without the base there is room"


async def test_a_disk_that_fills_up_while_training(tmp_path: Path) -> None:
    """Snapshots cannot be kept any more, and the result has its room."""

    async with on_a_disk(tmp_path, 80) as (state, address, who):
        with ExitStack() as filled:
            backend = FakeBackend(lambda step: filled.enter_context(full(state)) if step == 5 else None)
            receipt = await take_part(address, replace(who, backend=backend))
            assert (state / "filler").exists() and receipt.digest
        (box,) = outbox.all_outboxes(state)
        assert box.receipt() == receipt and not list(box.folder.glob(".*.[pr]*"))


async def test_where_no_room_could_be_kept_the_last_snapshot_is(tmp_path: Path) -> None:
    """Some file systems keep nothing for anybody. What is reserved is taken away here, to stand for them."""

    async with on_a_disk(tmp_path, 80) as (state, address, who):
        with ExitStack() as filled:

            def fill(step: int) -> None:
                if step == 5:
                    for reserved in state.rglob(".trained.*.room"):
                        reserved.unlink()
                    filled.enter_context(full(state))

            with pytest.raises(NotEnough, match="no room on the disk for") as caught:
                await take_part(address, replace(who, backend=FakeBackend(fill)))
        assert caught.value.exit_code == 6 and "run the same command again" in caught.value.hint
        (box,) = outbox.all_outboxes(state)
        assert box.snapshot.exists() and box.trained() is None
        again = FakeBackend()
        assert (await take_part(address, replace(who, backend=again))).digest
        assert 0 < again.began_at[0] <= 5, "it went on from the last snapshot"
