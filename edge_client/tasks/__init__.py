"""What is learnt from a person's files: rows → examples → batches → loss. A task is a module with the functions of
`Task`, and an entry in TASKS; tests/edge_client/tasks/test_seam.py holds it to the contract.

Whatever counts tokens, or knows what a row is, asks the task. A backend knows the loss by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from edge_client.backends import MemoryFigures
from edge_client.tasks import language_modelling
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import Setup
from oneround.v1 import federation_pb2 as pb

__all__ = ["TASKS", "ExampleSet", "RowSet", "Task", "of"]


class RowSet(Protocol):
    """What a person's files hold: rows to train on, rows held out, and how many bad ones were skipped."""

    @property
    def train(self) -> Sequence[Any]: ...

    @property
    def held_out(self) -> Sequence[Any]:
        """The same rows whenever the same files are read; none of them is trained on."""

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def skipped(self) -> int: ...


class ExampleSet(Protocol):
    """What rows became: examples, how many rows were cut, had nothing left to learn, or were bad, and the longest."""

    @property
    def examples(self) -> Sequence[Any]: ...

    @property
    def truncated(self) -> int: ...

    @property
    def dropped(self) -> int: ...

    @property
    def skipped(self) -> int: ...

    @property
    def longest(self) -> int:
        """Length of the longest row before anything was cut; 0 where rows have none."""


class Task(Protocol):
    """What a task's module offers."""

    def load(self, path: Path, *, skip_bad_rows: bool = False) -> RowSet:
        """Read a file or a folder, and hold a part out.

        Raises:
            BadData: there is nothing to read, or a bad row, named by file and line. With `skip_bad_rows` bad rows are
                left out and counted.
        """

    def prepare(self, rows: Iterable[Any], base: Path, spec: pb.JobSpec, *, skip_bad_rows: bool = False) -> ExampleSet:
        """Rows as the base model in a folder takes them; of the base its small files are enough.

        Raises:
            BadData: a row that the base cannot take.
            BadModel: the folder does not say how to take them.
        """

    def batches(self, examples: Sequence[Any], spec: pb.JobSpec) -> TrainingPlan:
        """The whole run, by step.

        Raises:
            BadData: nothing can be learnt from these examples.
        """

    def memory_needed(
        self, base: Path, job: pb.Job, figures: MemoryFigures, longest: int | None = None
    ) -> Callable[[Setup], int] | None:
        """Bytes that training takes by setup; None where the base's config.json does not say enough. `longest` is that
        of an ExampleSet, if it is known. The base's weights need not be there."""


TASKS: dict[str, Task] = {"language-modelling": language_modelling}


def of(spec: pb.JobSpec) -> Task:
    """The task of a job. A job does not name one so far: all of them are language modelling."""
    return TASKS["language-modelling"]
