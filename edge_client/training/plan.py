"""What a training run goes through, step by step, as a backend sees it. A task makes it (see edge_client/tasks)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray


class StepBatch(Protocol):
    """What one optimizer step sees. What else it holds is between the task and the loss that the plan names."""

    @property
    def size(self) -> int:
        """Examples in it."""

    @property
    def num_targets(self) -> int:
        """What the loss is the mean over: tokens for a language model."""

    def split(self, parts: int) -> Sequence[StepBatch]:
        """The same examples in at most so many smaller batches, each with a target."""


class TrainingPlan(Protocol):
    """The batches of a whole run, by step from 0. Deterministic in (data, seed), the same in any order of asking and
    after a restart; what is random in a batch, such as noise, is drawn from (seed, step)."""

    loss: str  # by name; a backend maps it to its own function

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def num_examples(self) -> int: ...

    @property
    def num_targets(self) -> int:
        """Targets of one epoch."""

    @property
    def lengths(self) -> Sequence[int]:
        """Of each example, in tokens; empty where examples have no length."""

    def batch(self, step: int) -> StepBatch:
        """The batch of a step, 0 ≤ step < total_steps."""

    @property
    def settings(self) -> Sequence[int]:
        """What decides, beside the examples, what is in each batch; part of a run's digest."""

    def content(self) -> Iterator[NDArray[Any]]:
        """Everything that the examples hold, in order, for a run's digest."""
