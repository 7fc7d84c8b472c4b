"""What any task has to hold to. A new one adds an entry to CASES."""

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import backends, tasks
from edge_client.backends import MemoryFigures
from edge_client.tasks import TASKS, Task
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import EXACT
from oneround.errors import BadData
from oneround.v1 import federation_pb2 as pb

BASE = Path(__file__).parents[3] / "benchmarks" / "base"


@dataclass(frozen=True)
class TaskCase:
    """A task's own kind of data: `write` puts some, from a seed, into a folder; `members` tells what examples are in a
    batch, and `key` what one of them is."""

    base: Path
    write: Callable[[Path, int], Path]
    members: Callable[[Any], list[Hashable]]
    key: Callable[[Any], Hashable]


def _texts(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = [
        f'{{"prompt": "{n} is", "completion": "{" ".join(map(str, rng.integers(0, 99, 2 + n % 9)))}"}}'
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def _token_rows(batch: Any) -> list[Hashable]:
    rows = np.concatenate([batch.inputs, batch.labels[:, -1:]], axis=1)
    return [tuple(np.trim_zeros(row, "b").tolist()) for row in rows]


CASES = {
    "language-modelling": TaskCase(
        BASE, _texts, _token_rows, lambda example: tuple(np.trim_zeros(example.ids, "b").tolist())
    )
}
each = pytest.mark.parametrize("name", TASKS)


def spec_of(seed: int = 3, batch_size: int = 7, **train: Any) -> pb.JobSpec:
    return pb.JobSpec(train=pb.TrainSpec(seed=seed, batch_size=batch_size, epochs=2, **train))


def planned(task: Task, data: Path, base: Path, spec: pb.JobSpec) -> TrainingPlan:
    return task.batches(task.prepare(task.load(data).train, base, spec).examples, spec)


def digest(plan: TrainingPlan, members: Callable[[Any], list[Hashable]]) -> str:
    """Of everything that a run would see, in order."""
    steps = [members(plan.batch(step)) for step in range(plan.total_steps)]
    content = hashlib.sha256(repr(steps).encode())
    for array in plan.content():
        content.update(array.tobytes())
    return content.hexdigest()


def test_every_task_has_its_case_and_every_job_a_task() -> None:
    assert CASES.keys() == TASKS.keys()
    assert tasks.of(pb.JobSpec()) in TASKS.values()


@each
def test_what_is_held_out_is_never_trained_on(tmp_path: Path, name: str) -> None:
    task, case = TASKS[name], CASES[name]
    rows = task.load(case.write(tmp_path, 0))
    assert rows.train and rows.held_out and rows.files and not rows.skipped
    spec = spec_of()
    train, held_out = (
        {case.key(example) for example in task.prepare(side, case.base, spec).examples}
        for side in (rows.train, rows.held_out)
    )
    assert train and held_out and not train & held_out
    plan = planned(task, tmp_path, case.base, spec)
    assert {key for step in range(plan.total_steps) for key in case.members(plan.batch(step))} == train
    again = task.load(tmp_path)
    assert (list(again.train), list(again.held_out)) == (list(rows.train), list(rows.held_out))


@each
@pytest.mark.parametrize("packing", [False, True])
def test_every_example_once_an_epoch(tmp_path: Path, name: str, packing: bool) -> None:
    task, case = TASKS[name], CASES[name]
    spec = spec_of(packing=packing, max_seq_len=40)
    examples = task.prepare(task.load(case.write(tmp_path, 0)).train, case.base, spec).examples
    plan = task.batches(examples, spec)
    assert plan.num_examples == len(examples) and plan.total_steps == 2 * plan.steps_per_epoch
    assert len(plan.lengths) in (0, len(examples))
    for epoch in range(2):
        batches = [plan.batch(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        seen = Counter(key for batch in batches for key in case.members(batch))
        assert seen == Counter(map(case.key, examples))
        assert sum(batch.size for batch in batches) == plan.num_examples
        assert sum(batch.num_targets for batch in batches) == plan.num_targets


@each
def test_parts_of_a_batch_hold_its_targets_once(tmp_path: Path, name: str) -> None:
    task, case = TASKS[name], CASES[name]
    batch = planned(task, case.write(tmp_path, 0), case.base, spec_of()).batch(0)
    for parts in (1, 2, 3, batch.size, 2 * batch.size):
        pieces = batch.split(parts)
        assert 1 <= len(pieces) <= parts and all(piece.num_targets for piece in pieces)
        assert sum(piece.num_targets for piece in pieces) == batch.num_targets


@each
def test_a_step_is_the_same_in_any_order_of_asking(tmp_path: Path, name: str) -> None:
    task, case = TASKS[name], CASES[name]
    data, spec = case.write(tmp_path, 0), spec_of()
    forwards, backwards = (planned(task, data, case.base, spec) for _ in range(2))
    steps = range(forwards.total_steps)
    expected = {step: case.members(forwards.batch(step)) for step in steps}
    assert {step: case.members(backwards.batch(step)) for step in reversed(steps)} == expected
    assert case.members(forwards.batch(0)) == expected[0], "after the last one, too"


@each
def test_data_and_seed_decide_and_nothing_else(tmp_path: Path, name: str) -> None:
    """In another process the same; with other data, another seed or another batch size not."""
    task, case = TASKS[name], CASES[name]
    data = case.write(tmp_path / "one", 0)
    plan = planned(task, data, case.base, spec_of())
    program = (
        "import sys; from pathlib import Path; from tests.edge_client.tasks.test_seam import *\n"
        f"print(digest(planned(TASKS[{name!r}], Path({str(data)!r}), CASES[{name!r}].base, spec_of()), "
        f"CASES[{name!r}].members))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == digest(plan, case.members)
    reseeded = planned(task, data, case.base, spec_of(seed=4))
    others = [
        reseeded,
        planned(task, case.write(tmp_path / "two", 1), case.base, spec_of()),
        planned(task, data, case.base, spec_of(batch_size=5)),
    ]
    assert len({digest(other, case.members) for other in (plan, *others)}) == 4
    assert list(reseeded.settings) != list(plan.settings) != list(others[2].settings)


@each
def test_some_backend_knows_the_loss(tmp_path: Path, name: str) -> None:
    usable = [backends.load(other) for other in backends.BACKENDS if backends.load(other).available() is None]
    if not usable:
        pytest.skip("no training framework is here")
    case = CASES[name]
    plan = planned(TASKS[name], case.write(tmp_path, 0), case.base, spec_of())
    assert any(not backend.incompatible(case.base, plan) for backend in usable)


@each
def test_nothing_to_learn_is_bad_data(name: str) -> None:
    with pytest.raises(BadData):
        TASKS[name].batches([], spec_of())


@each
def test_memory_is_told_or_not_known(tmp_path: Path, name: str) -> None:
    task, case, figures = TASKS[name], CASES[name], MemoryFigures(overhead=1.5)
    job = pb.Job(spec=spec_of())
    needed = task.memory_needed(case.base, job, figures, 64)
    smaller = EXACT.smaller(job.spec.train.batch_size)
    assert needed is not None and smaller is not None and needed(EXACT) > needed(smaller) > 0
    (tmp_path / "config.json").write_text("{}")
    assert task.memory_needed(tmp_path, job, figures) is None
