"""How contributions become one adapter: a function behind a name, applied module by module.

A method gets the same module's factors from every contribution and their weights, which sum to 1, and returns the
module's factors in the mean. Memory is one module, whatever the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from converters.adapter import Adapter, LowRank, Made
from converters.errors import LayoutMismatch
from coordinator.aggregate.mean import exact, fedavg
from coordinator.aggregate.truncate import truncate

Method = Callable[[Sequence[LowRank], Sequence[float]], LowRank]

METHODS: dict[str, Method] = {
    "exact": exact,
    "fedavg": fedavg,
}


@dataclass(frozen=True)
class Contribution:
    """One client's adapter and its weight in the mean (num_examples)."""

    adapter: Adapter
    num_examples: int


@dataclass(frozen=True)
class Aggregated:
    """The cohort's adapter, and the share of ‖ΔW‖² that truncation kept (1.0 when there was none)."""

    adapter: Adapter
    energy_kept: float


def aggregate(
    contributions: Sequence[Contribution], method: str, *, server_learning_rate: float = 1.0, rank: int = 0
) -> Aggregated:
    """The mean adapter, weighted by num_examples, times the server learning rate.

    With `rank` > 0 every module is truncated to it.

    Raises:
        LayoutMismatch: the contributions do not adapt the same modules, or the method cannot take their ranks.
    """
    assert contributions, "a round closes with at least one contribution"
    modules = contributions[0].adapter.modules.keys()
    for contribution in contributions[1:]:
        if contribution.adapter.modules.keys() != modules:
            raise LayoutMismatch("the contributions do not adapt the same modules")
    counts = np.array([contribution.num_examples for contribution in contributions], np.float64)
    weights = (counts / counts.sum()).tolist()

    def mean(name: str) -> LowRank:
        update = METHODS[method]([contribution.adapter.modules[name] for contribution in contributions], weights)
        return LowRank.sum([update], [server_learning_rate])

    if not rank:
        for name in modules:
            mean(name)  # what a method refuses, it refuses now
        return Aggregated(Adapter(Made(modules, mean)), 1.0)
    kept = whole = 0.0
    cut: dict[str, LowRank] = {}
    for name in sorted(modules):
        cut[name] = mean(name)
        if rank < cut[name].rank:
            cut[name], energy, total = truncate(cut[name], rank)
            kept, whole = kept + energy, whole + total
    return Aggregated(Adapter(cut), kept / whole if whole else 1.0)
