"""What a method is: a function of a cohort, and what has to be so before it can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from converters.adapter import Adapter, Factor, LowRank
from coordinator.aggregate.delta import changes
from oneround.v1 import federation_pb2 as pb

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    """The contributions that a method is given: adapters of the same modules, K of them, and the job's parameters.

    `start`: the adapter that all clients started from, where it is not zero; the contributions hold it.
    """

    adapters: Sequence[Adapter]
    num_examples: Sequence[int]
    how: pb.AggregateSpec
    start: Adapter | None = None

    def factors(self, module: str) -> list[LowRank]:
        """One module's update of every client."""
        return [adapter.modules[module] for adapter in self.adapters]

    @property
    def changed(self) -> list[Adapter]:
        """What every client changed."""
        return [changes(adapter, self.start) for adapter in self.adapters]

    @property
    def by_examples(self) -> Weights:
        """Each client's share of all examples (K,)."""
        counts = np.array(self.num_examples, np.float64)
        shares: Weights = counts / counts.sum()
        return shares

    @property
    def alike(self) -> Weights:
        """The same weight for each (K,). What holds against bad clients counts so: num_examples is only declared."""
        return np.full(len(self.adapters), 1 / len(self.adapters))


def _kept(module: str) -> int:
    return 0


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a cohort.

    `weights` (K,): how much each contribution counts; 0 for one that was left out. `update`: a module's ΔW, with the
    start in it, low-rank, or dense (out, in), which is then brought to low rank. `rank`: what a module's ΔW is
    truncated to where the job asks for no rank; 0: it is kept as it is.
    """

    weights: Weights
    update: Callable[[str], LowRank | Factor]
    rank: Callable[[str], int] = _kept


@dataclass(frozen=True)
class Method:
    """A function behind a name, and what it takes.

    `parameters`: the fields of AggregateSpec that it looks at, besides server_learning_rate. `one_rank`: all clients
    send adapters of one rank. `frozen_a`: all have the same A, which nobody trained. `at_least`: how many contributions
    it needs. `free`: its result is the clients' own factors with weights on them, so that nothing has to be made.
    """

    run: Callable[[Cohort], Outcome]
    parameters: tuple[str, ...] = ()
    one_rank: bool = False
    frozen_a: bool = False
    at_least: Callable[[pb.AggregateSpec], int] = field(default=lambda how: 1)
    free: bool = False


# What a parameter of AggregateSpec may be, and how that is said.
PARAMETERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "server_learning_rate": (lambda value: 0 < value <= 100, "more than 0, at most 100"),
    "density": (lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "byzantine_clients": (lambda value: value <= 1_000_000, "0 or more"),
    "krum_keep": (lambda value: value <= 1_000_000, "0 or more"),
    "norm_bound": (lambda value: 0 < value <= 1000, "more than 0, at most 1000"),
}
