"""From a person's rows to what a backend is handed. `join` and `doctor` prepare by these functions, so doctor tells of
what join would do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_client import backends, tasks
from edge_client.backends import Backend
from edge_client.preflight import memory
from edge_client.preflight.memory import MemoryEstimate
from edge_client.tasks import ExampleSet, RowSet
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import Setup
from oneround.errors import UsageError
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Prepared:
    """Rows as a training plan, and what was cut, dropped or skipped on the way."""

    plan: TrainingPlan
    held_out: int  # rows
    longest: int  # of the longest row, before anything was cut
    truncated: int  # rows that were cut
    dropped: int  # rows with nothing left to learn
    skipped: int  # bad rows
    incompatible: UsageError | None = None  # why the backend must not train this

    def require_compatible(self) -> None:
        """Raises UsageError when the backend would compute something else than the base model's config.json says."""
        if self.incompatible is not None:
            raise self.incompatible


def load_rows(data: Path, spec: pb.JobSpec, *, skip_bad_rows: bool) -> RowSet:
    """A person's rows, as the task of a job reads them.

    Raises:
        BadData: there is nothing to read, or a bad row.
    """
    return tasks.of(spec).load(data, skip_bad_rows=skip_bad_rows)


def prepare(rows: RowSet, base: Path, spec: pb.JobSpec, backend: Backend, *, skip_bad_rows: bool) -> Prepared:
    """Rows → examples → plan, and whether the backend can train it; of the base its small files are enough.

    Raises:
        BadData: there is a row that the base cannot take, or nothing to learn.
        BadModel: the folder holds no tokenizer, or no config.json, that can be read.
    """
    task = tasks.of(spec)
    examples: ExampleSet = task.prepare(rows.train, base, spec, skip_bad_rows=skip_bad_rows)
    plan = task.batches(examples.examples, spec)
    return Prepared(
        plan,
        held_out=len(rows.held_out),
        longest=examples.longest,
        truncated=examples.truncated,
        dropped=examples.dropped,
        skipped=rows.skipped + examples.skipped,
        incompatible=_incompatible(backend, base, plan),
    )


def _incompatible(backend: Backend, base: Path, plan: TrainingPlan) -> UsageError | None:
    why = backend.incompatible(base, plan)
    if not why:
        return None
    ways = (
        f"pip install 'oneround[{name}]', and edge-client join --backend {name}"
        for name in backends.others(backend.name)
    )
    return UsageError(why, hint="; or ".join(ways))


def estimate_memory(
    base: Path, job: pb.Job, backend: Backend, longest: int | None, setup: Setup
) -> MemoryEstimate | None:
    """What training over the base in a folder will take here, with the first setup that fits, from the given one on; or
    with the smallest, if none does. None when the base's config.json does not say enough.

    Where the folder has no weights yet, their announced sizes count.
    """
    figures = backend.memory_figures()
    needed = tasks.of(job.spec).memory_needed(base, job, figures, longest)
    if needed is None:
        return None
    available = memory.free() if figures.in_main_memory else None
    return memory.first_that_fits(needed, available, job.spec.train.batch_size, setup)
