"""Training that is stopped in the middle and goes on: the same adapter, to the bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import tensors
from converters.adapter import Adapter, LowRank
from edge_client import backends, session
from edge_client.backends import BACKENDS, Progress, Setup
from edge_client.data.batches import Batches
from edge_client.outbox import Outbox
from edge_client.training import snapshot
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from edge_client.ui.screen import Screen
from oneround.errors import Refused
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.edge_client import tiny
from tests.waiting import LONG, eventually

ROOT = Path(__file__).parents[3]
usable = [name for name in BACKENDS if backends.load(name).available() is None]
each = pytest.mark.parametrize("name", usable)


def recipe_for(plan: Batches) -> Recipe:
    train = pb.TrainSpec(learning_rate=3e-3, schedule="cosine", warmup_ratio=0.1)
    return Recipe.from_spec(pb.JobSpec(lora=pb.LoraSpec(dropout=0.2), train=train), plan.total_steps)


@each
@pytest.mark.parametrize("stop", [1, 3, 4, 8])  # also at the end of an epoch, and of training
def test_going_on_gives_the_same_bits(tmp_path: Path, name: str, stop: int) -> None:
    base = tiny.llama(tmp_path / "base", tied=True)
    initial = tiny.nonzero(tiny.modules_of(base), ranks=(4, 2, 3))
    plan = Batches(tiny.examples(24), batch_size=8, epochs=8 / 3, seed=3)
    recipe, file = recipe_for(plan), tmp_path / "training.safetensors"
    backend = backends.load(name)
    losses: list[float] = []
    whole = backend.train(base, initial, recipe, plan, lambda progress: losses.append(progress.loss))

    before: list[float] = []

    def interrupt(progress: Progress) -> None:
        before.append(progress.loss)
        if progress.step == stop:
            snapshot.write(file, Snapshot(tuple(before), progress.arrays()), "run")
            raise Refused("enough")

    with pytest.raises(Refused):
        backend.train(base, initial, recipe, plan, interrupt)
    kept = snapshot.read(file, "run")
    assert kept is not None and kept.step == stop
    after: list[float] = []
    # Of the adapter that training started from only the shapes still matter.
    start = Adapter({n: LowRank(np.zeros_like(f.a), np.zeros_like(f.b)) for n, f in initial.modules.items()})
    result = backend.train(base, start, recipe, plan, lambda progress: after.append(progress.loss), kept)
    assert list(kept.losses) + after == losses
    for module, factors in whole.modules.items():
        assert np.array_equal(factors.a, result.modules[module].a)
        assert np.array_equal(factors.b, result.modules[module].b)


def test_a_snapshot_of_another_run_is_of_no_use(tmp_path: Path) -> None:
    plan = Batches(tiny.examples(24), batch_size=8, epochs=2, seed=3)
    recipe = recipe_for(plan)
    run = snapshot.run_digest("torch", "ab" * 32, recipe, plan)
    others = [
        snapshot.run_digest("mlx", "ab" * 32, recipe, plan),
        snapshot.run_digest("torch", "cd" * 32, recipe, plan),
        snapshot.run_digest("torch", "ab" * 32, replace(recipe, peak_learning_rate=1e-3), plan),
        snapshot.run_digest("torch", "ab" * 32, recipe, Batches(tiny.examples(24), 4, 2, 3)),
        snapshot.run_digest("torch", "ab" * 32, recipe, Batches(tiny.examples(23), 8, 2, 3)),
        snapshot.run_digest("torch", "ab" * 32, recipe, Batches(tiny.examples(24)[::-1], 8, 2, 3)),
    ]
    assert len({run, *others}) == 7
    file = tmp_path / "training.safetensors"
    assert snapshot.read(file, run) is None
    snapshot.write(file, Snapshot((1.5, 0.1), {"x.a": np.ones((2, 3), np.float32)}), run)
    kept = snapshot.read(file, run)
    assert kept is not None and kept.losses == (1.5, 0.1) and kept.arrays["x.a"].shape == (2, 3)
    assert all(snapshot.read(file, other) is None for other in others)
    file.write_bytes(file.read_bytes()[:-5])
    assert snapshot.read(file, run) is None


def test_a_disk_that_takes_no_snapshot_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = Outbox(tmp_path / "gone")
    keeping = session.SnapshotSchedule(box, "run", 0.0, Screen(as_json=True))
    progress = Progress(1, 2, 0.5, 10, 0.1, Setup(), lambda: {"x.a": np.ones((2, 3), np.float32)})
    for _ in range(3):
        keeping.after([0.5], progress, now=True)
    assert capsys.readouterr().out.count("not_kept") == 1
    box.folder.mkdir()
    keeping.after([0.5], progress, now=True)
    kept = snapshot.read(box.snapshot, "run")
    assert kept is not None and kept.step == 1


JOB = """
name = "interrupted"
[model]
base = "{base}"
[lora]
rank = 4
dropout = 0.1
[train]
epochs = 2
batch_size = 4
max_seq_len = 64
[round]
min_clients = 5
"""


@each
def test_kill_nine_and_join_again(tmp_path: Path, name: str) -> None:
    """Killed twice, and stopped once as Ctrl-C does; what is sent is what an undisturbed client sends."""
    rows = (json.dumps({"text": f"def f{n}(x):\n    return x + {n} * {n % 7}\n" * 3}) + "\n" for n in range(90))
    (tmp_path / "notes.jsonl").write_text("".join(rows))
    (tmp_path / "job.toml").write_text(JOB.format(base=ROOT / "benchmarks" / "base"))
    with commands.coordinator(tmp_path / "coordinator") as address:
        commands.run("coordinator", "submit", tmp_path / "job.toml", "--state", tmp_path / "coordinator")

        def joins(state: str) -> tuple[object, ...]:
            common = ("--server", address, "--json", "--backend", name, "--state", tmp_path / state)
            return ("edge-client", "join", "--yes", "--data", tmp_path / "notes.jsonl", "--save-every", 0, *common)

        reached = [0]
        for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            process = commands.start(*map(str, joins("disturbed")))
            _wait_for_steps(tmp_path / "disturbed", reached[-1])
            os.kill(process.pid, how)
            out, err = process.communicate(timeout=LONG)
            assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), err
            if len(reached) > 1:
                continued = commands.events(out)["continued"]
                assert continued["step"] >= reached[-1]
            reached.append(_steps(tmp_path / "disturbed"))
        disturbed, _ = commands.run(*map(str, joins("disturbed")))
        undisturbed, _ = commands.run(*map(str, joins("undisturbed")))
    ended, whole = commands.events(disturbed), commands.events(undisturbed)
    assert 0 < reached[1] < reached[2] < reached[3] <= ended["continued"]["step"] < whole["trained"]["steps"]
    assert "continued" not in whole
    assert ended["receipt"]["digest"] == whole["receipt"]["digest"]
    assert not list((tmp_path / "disturbed").rglob("training.safetensors")), "what is trained needs no snapshot"


def _steps(state: Path) -> int:
    """How many steps are kept."""
    for file in state.rglob("training.safetensors"):
        return len(tensors.read(file)[0]["losses"])
    return 0


def _wait_for_steps(state: Path, more_than: int) -> None:
    assert eventually(lambda: _steps(state) > more_than), f"no more than {more_than} steps were kept"
