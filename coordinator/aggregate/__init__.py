"""How contributions become one adapter: a function behind a name (method.py), and a module of them each.

A method is given the cohort and gives each contribution's weight and, asked for a module, that module's update. Memory
is one module's, whatever the number of clients: factors are taken up from their mapped files, one client after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from converters import adapter as layout
from converters.adapter import Adapter, Factor, LazyUpdates, LowRank
from coordinator.aggregate import coordinatewise, mean, robust, sparse
from coordinator.aggregate.delta import changes, clipped, joined
from coordinator.aggregate.gram import inner, pieces
from coordinator.aggregate.method import PARAMETERS, Cohort, Method, Outcome
from coordinator.aggregate.truncate import Truncated, low_rank, truncate
from oneround.errors import LayoutMismatch
from oneround.v1 import federation_pb2 as pb

__all__ = [
    "METHODS",
    "PARAMETERS",
    "Aggregated",
    "ClientUpdate",
    "aggregate",
    "changes",
    "clipped",
    "described",
    "unfit",
]

METHODS: dict[str, Method] = {
    "exact": Method(mean.exact, free=True),
    "fedavg": Method(mean.fedavg, one_rank=True),
    "svd": Method(mean.svd),
    "ffa": Method(mean.ffa, frozen_a=True),
    "fedex": Method(mean.fedex, one_rank=True),
    "task-arithmetic": Method(mean.task_arithmetic, free=True),
    "ties": Method(sparse.ties, ("density",)),
    "dare": Method(sparse.dare, ("density",)),
    "norm-clip": Method(robust.norm_clip, ("norm_bound",), free=True),
    "krum": Method(robust.krum, ("byzantine_clients", "krum_keep"), at_least=robust.krum_needs, free=True),
    "geometric-median": Method(robust.geometric_median, free=True),
    "trimmed-mean": Method(
        coordinatewise.trimmed_mean,
        ("byzantine_clients",),
        frozen_a=True,
        at_least=coordinatewise.trimmed_mean_needs,
    ),
    "median": Method(coordinatewise.median, frozen_a=True),
}


@dataclass(frozen=True)
class ClientUpdate:
    """One client's adapter and how many examples it was trained on."""

    adapter: Adapter
    num_examples: int


@dataclass(frozen=True)
class Aggregated:
    """The cohort's adapter, the share of ‖ΔW‖² that truncation kept (1.0 when there was none), and how much each
    contribution counts in it: 0.0 for one that the method left out."""

    adapter: Adapter
    energy_kept: float
    weights: tuple[float, ...]


def aggregate(
    contributions: Sequence[ClientUpdate],
    how: pb.AggregateSpec | str,
    *,
    rank: int = 0,
    scratch: Path | None = None,
    start: Adapter | None = None,
) -> Aggregated:
    """One adapter of all contributions, by a method's name or with parameters, times the server learning rate.

    `start`: the adapter that all clients started from, with one term a module, where it is not zero. Contributions hold
    it, and so does the result: the methods and the server learning rate are about what was changed of it.
    With `rank` > 0 every module is truncated to it. What has to be computed is computed once, module by module, and
    kept in the folder `scratch`, from where it is mapped; in memory without one.

    Raises:
        LayoutMismatch: the contributions do not adapt the same modules, or the method cannot take them.
    """
    assert contributions, "a round closes with at least one contribution"
    how = pb.AggregateSpec(method=how) if isinstance(how, str) else how
    adapters, counts = [one.adapter for one in contributions], [one.num_examples for one in contributions]
    modules = adapters[0].modules.keys()
    if any(one.modules.keys() != modules for one in adapters[1:]):
        raise LayoutMismatch("the contributions do not adapt the same modules")
    method = METHODS[how.method]
    one_rank = not method.one_rank or _one_rank(adapters)
    frozen_a = not method.frozen_a or _one_a(adapters)
    if why := unfit(how, clients=len(adapters), one_rank=one_rank, frozen_a=frozen_a):
        raise LayoutMismatch(why, hint='use method = "exact", which takes any adapters')
    outcome = method.run(Cohort(adapters, counts, how, start))
    whole = partial(_whole, outcome, how, start)
    weights = tuple(outcome.weights.tolist())
    if method.free and not rank:
        return Aggregated(Adapter(LazyUpdates(modules, lambda name: _stacked(whole(name)))), 1.0, weights)
    made: dict[str, LowRank] = {}
    kept = all_of_it = 0.0
    for name in sorted(modules):
        cut = _truncated(whole(name), rank or outcome.rank(name))
        kept, all_of_it = kept + cut.kept, all_of_it + cut.whole
        made[name] = cut.update
        if scratch is not None:
            file = scratch / f"{len(made)}.safetensors"
            layout.write(Adapter({name: made[name]}), file)
            made[name] = layout.read(file).modules[name]
    return Aggregated(Adapter(made), kept / all_of_it if all_of_it else 1.0, weights)


def unfit(how: pb.AggregateSpec, *, clients: int, one_rank: bool = True, frozen_a: bool) -> str:
    """Why a method cannot take so many contributions of such a kind; empty when it can.

    `one_rank`: they have one rank. `frozen_a`: they have one A, which nobody trained.
    """
    method = METHODS[how.method]
    if method.frozen_a and not frozen_a:
        return f"{how.method} needs one A that nobody trains: lora.freeze_a = true in the job, before it starts"
    if method.one_rank and not one_rank:
        return f"{how.method} needs adapters of one rank, and these have several"
    if clients < (least := method.at_least(how)):
        return f"{described(how)} needs at least {least} contributions, not {clients}"
    return ""


def described(how: pb.AggregateSpec) -> str:
    """A method and its parameters, for people: `ties (density 0.2)`."""
    names = METHODS[how.method].parameters if how.method in METHODS else ()
    values = [f"{name.replace('_', ' ')} {value:g}" for name in names if (value := getattr(how, name))]
    if how.server_learning_rate != 1:
        values.append(f"server learning rate {how.server_learning_rate:g}")
    return f"{how.method} ({', '.join(values)})" if values else how.method


def _whole(outcome: Outcome, how: pb.AggregateSpec, start: Adapter | None, name: str) -> LowRank | Factor:
    """A module's ΔW₀ + λ (ΔW − ΔW₀), where λ is the server learning rate; λ ΔW without a start."""
    update, rate = outcome.update(name), how.server_learning_rate
    first = start.modules[name] if start else None
    if isinstance(update, np.ndarray):
        update *= np.float32(rate)
        return update if first is None else LowRank.sum([first], [1 - rate]).add_to(update)
    scaled = LowRank.sum([update], [rate])
    if first is None or rate == 1:
        return scaled
    if METHODS[how.method].frozen_a:  # one A in both: the rank stays
        return LowRank(update.a, scaled.b + np.float32(1 - rate) * first.b)
    return joined(scaled, first, 1 - rate)


def _stacked(update: LowRank | Factor) -> LowRank:
    assert isinstance(update, LowRank), "what is free is stacked"
    return update


def _truncated(update: LowRank | Factor, wanted: int) -> Truncated:
    """A module's update in its final rank."""
    if isinstance(update, np.ndarray):
        return low_rank(update, wanted)
    if 0 < wanted < update.rank:
        return truncate(update, wanted)
    energy = (
        float(inner(pieces(update)).sum()) if wanted else 0.0
    )  # nothing is lost: what others lose is held against it
    return Truncated(update, energy, energy)


def _one_rank(adapters: Sequence[Adapter]) -> bool:
    ranks = adapters[0].ranks
    return all(one.ranks == ranks for one in adapters[1:])


def _one_a(adapters: Sequence[Adapter]) -> bool:
    """Whether all have the same A, to the bit."""
    for name, first in adapters[0].modules.items():
        a = first.a
        for other in adapters[1:]:
            update = other.modules[name]
            if not np.array_equal(a, update.a):
                return False
            update.forget()
        first.forget()
    return True
