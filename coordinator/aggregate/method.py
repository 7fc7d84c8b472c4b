"""What a method is: a function of a cohort, and what has to be so before it can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from converters.updates.low_rank import LowRank
from converters.updates.update import Factor, ModuleUpdate, Update
from coordinator.aggregate.delta import changes
from oneround.v1 import federation_pb2 as pb

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    """The contributions that a method is given: updates of the same modules, K of them, and the job's parameters.

    `start`: the update that all clients started from, where it is not zero; the contributions hold it.
    """

    updates: Sequence[Update[ModuleUpdate]]
    num_examples: Sequence[int]
    how: pb.AggregateSpec
    start: Update[ModuleUpdate] | None = None

    def of(self, module: str) -> list[ModuleUpdate]:
        """One module's update of every client."""
        return [update.modules[module] for update in self.updates]

    def factors(self, module: str) -> list[LowRank]:
        """The same, for methods that take low-rank updates alone."""
        factors = [update for update in self.of(module) if isinstance(update, LowRank)]
        assert len(factors) == len(self.updates), "`takes` of the method says so"
        return factors

    @property
    def changed(self) -> list[Update[ModuleUpdate]]:
        """What every client changed."""
        return [changes(update, self.start) for update in self.updates]

    @property
    def by_examples(self) -> Weights:
        """Each client's share of all examples (K,)."""
        counts = np.array(self.num_examples, np.float64)
        shares: Weights = counts / counts.sum()
        return shares

    @property
    def alike(self) -> Weights:
        """The same weight for each (K,). What holds against bad clients counts so: num_examples is only declared."""
        return np.full(len(self.updates), 1 / len(self.updates))


def _own_rank(module: str) -> int:
    return 0


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a cohort.

    `weights` (K,): how much each contribution counts; 0 for one that was left out. `update`: a module's ΔW, with the
    start in it, as an update of the cohort's kind, or dense (out, in), which is then brought to that kind. `rank`: what
    a module's ΔW is truncated to where the job asks for no rank; 0: it is kept as it is.
    """

    weights: Weights
    update: Callable[[str], ModuleUpdate | Factor]
    rank: Callable[[str], int] = _own_rank


def _any_number(how: pb.AggregateSpec) -> int:
    return 1


@dataclass(frozen=True)
class Method:
    """A function behind a name, what it needs, and what others may count on.

    `run`: the function.
    `parameters`: the fields of AggregateSpec that it looks at, besides server_learning_rate.
    `takes`: the class of module updates that it can average; None: every kind's.
    `needs_one_rank`: all clients have to send updates of one rank.
    `needs_frozen_a`: all have to have the same A, which nobody trained.
    `min_clients`: how many contributions it needs, by its parameters.
    `is_lazy`: its result is the clients' own tensors with weights on them, so that nothing is computed or kept before
    something is written.
    `linear_in`: what the result is a weighted sum of, with weights that depend on the declared counts alone.
    "tensors": each tensor of the result is that sum of the clients' tensors of its name, so that whoever knows only the
    sums can have the result; this is what secure aggregation asks for. "updates": ΔW is that sum of the clients' ΔW,
    which is the same where ΔW is linear in what is sent (`UpdateKind.is_linear`), and is not for two trained factors.
    Empty: neither.
    `statistics`: what clients have to send beside their updates, by names that are in their kind's STATISTICS.
    """

    run: Callable[[Cohort], Outcome]
    parameters: tuple[str, ...] = ()
    takes: type[ModuleUpdate] | None = None
    needs_one_rank: bool = False
    needs_frozen_a: bool = False
    min_clients: Callable[[pb.AggregateSpec], int] = field(default=_any_number)
    is_lazy: bool = False
    linear_in: Literal["tensors", "updates", ""] = ""
    statistics: tuple[str, ...] = ()


# What a parameter of AggregateSpec may be, and how that is said.
PARAMETERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "server_learning_rate": (lambda value: 0 < value <= 100, "more than 0, at most 100"),
    "density": (lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "byzantine_clients": (lambda value: value <= 1_000_000, "0 or more"),
    "krum_keep": (lambda value: value <= 1_000_000, "0 or more"),
    "norm_bound": (lambda value: 0 < value <= 1000, "more than 0, at most 1000"),
}
