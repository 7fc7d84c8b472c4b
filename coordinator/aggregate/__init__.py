"""How contributions become one update: a function behind a name (method.py), and a module of them each.

A method is given the cohort and gives each contribution's weight and, asked for a module, that module's update. Memory
is one module's, whatever the number of clients: tensors are taken up from their mapped files, one client after another.
A new method is one function and one line in METHODS; what that line can say is in method.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, cast

import numpy as np

from converters import tensors
from converters.updates.low_rank import LowRank
from converters.updates.update import Factor, LazyUpdates, M, M_co, ModuleUpdate, Truncated, Update
from coordinator.aggregate import coordinatewise, mean, robust, sparse
from coordinator.aggregate.delta import changes, clipped
from coordinator.aggregate.method import PARAMETERS, Cohort, Method, Outcome
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
    "exact": Method(mean.exact, is_lazy=True, linear_in="updates"),
    "fedavg": Method(mean.fedavg, needs_one_rank=True, linear_in="tensors"),
    "svd": Method(mean.svd),
    "ffa": Method(mean.ffa, takes=LowRank, needs_frozen_a=True, linear_in="tensors"),
    "fedex": Method(mean.fedex, needs_one_rank=True, linear_in="updates"),
    "task-arithmetic": Method(mean.task_arithmetic, is_lazy=True, linear_in="updates"),
    "ties": Method(sparse.ties, ("density",)),
    "dare": Method(sparse.dare, ("density",)),
    "norm-clip": Method(robust.norm_clip, ("norm_bound",), is_lazy=True),
    "krum": Method(robust.krum, ("byzantine_clients", "krum_keep"), min_clients=robust.krum_needs, is_lazy=True),
    "geometric-median": Method(robust.geometric_median, is_lazy=True),
    "trimmed-mean": Method(
        coordinatewise.trimmed_mean,
        ("byzantine_clients",),
        takes=LowRank,
        needs_frozen_a=True,
        min_clients=coordinatewise.trimmed_mean_needs,
    ),
    "median": Method(coordinatewise.median, takes=LowRank, needs_frozen_a=True),
}


@dataclass(frozen=True)
class ClientUpdate(Generic[M_co]):
    """One client's update and how many examples it was trained on."""

    adapter: Update[M_co]
    num_examples: int


@dataclass(frozen=True)
class Aggregated(Generic[M_co]):
    """The cohort's update, the share of ‖ΔW‖² that truncation kept (1.0 when there was none), and how much each
    contribution counts in it: 0.0 for one that the method left out."""

    adapter: Update[M_co]
    energy_kept: float
    weights: tuple[float, ...]


def aggregate(
    contributions: Sequence[ClientUpdate[M]],
    how: pb.AggregateSpec | str,
    *,
    rank: int = 0,
    scratch: Path | None = None,
    start: Update[M] | None = None,
) -> Aggregated[M]:
    """One update of all contributions, by a method's name or with parameters, times the server learning rate.

    `start`: the update that all clients started from, with one term a module, where it is not zero. Contributions hold
    it, and so does the result: the methods and the server learning rate are about what was changed of it.
    With `rank` > 0 every module is truncated to it. What has to be computed is computed once, module by module, and
    kept in the folder `scratch`, from where it is mapped; in memory without one.

    Raises:
        LayoutMismatch: the contributions are not of the same modules, or the method cannot take them.
    """
    assert contributions, "a round closes with at least one contribution"
    how = pb.AggregateSpec(method=how) if isinstance(how, str) else how
    updates = [contribution.adapter for contribution in contributions]
    counts = [contribution.num_examples for contribution in contributions]
    modules = updates[0].modules
    kind = type(next(iter(modules.values())))
    _check_fit(how, updates, kind)
    outcome = METHODS[how.method].run(Cohort(updates, counts, how, start))
    whole = partial(_whole, outcome, how, start)
    weights = tuple(outcome.weights.tolist())
    if METHODS[how.method].is_lazy and not rank:
        return Aggregated(Update(LazyUpdates(modules, lambda name: cast(M, whole(name)))), 1.0, weights)
    computed: dict[str, M] = {}
    kept = energy = 0.0
    for name in sorted(modules):
        cut = _in_rank(whole(name), rank or outcome.rank(name), kind)
        kept, energy = kept + cut.kept, energy + cut.whole
        file = scratch / f"{len(computed) + 1}.safetensors" if scratch else None
        computed[name] = _mapped(cut.update, file) if file else cut.update
    return Aggregated(Update(computed), kept / energy if energy else 1.0, weights)


def _check_fit(how: pb.AggregateSpec, updates: Sequence[Update[ModuleUpdate]], kind: type[ModuleUpdate]) -> None:
    """Whether the method can take these."""
    modules = updates[0].modules.keys()
    if any(update.modules.keys() != modules for update in updates[1:]):
        raise LayoutMismatch("the contributions do not adapt the same modules")
    method = METHODS[how.method]
    one_rank = not method.needs_one_rank or all(update.ranks == updates[0].ranks for update in updates[1:])
    frozen_a = not method.needs_frozen_a or all(
        kind.have_one_frozen_part([update.modules[name] for update in updates]) for name in modules
    )
    if why := unfit(how, clients=len(updates), kind=kind, one_rank=one_rank, frozen_a=frozen_a):
        raise LayoutMismatch(why, hint='use method = "exact", which takes any adapters')


def unfit(
    how: pb.AggregateSpec, *, clients: int, kind: type[ModuleUpdate] = LowRank, one_rank: bool = True, frozen_a: bool
) -> str:
    """Why a method cannot take so many contributions of such a kind; empty when it can.

    `one_rank`: they have one rank. `frozen_a`: they have one A, which nobody trained.
    """
    method = METHODS[how.method]
    if method.takes is not None and not issubclass(kind, method.takes):
        return f"{how.method} averages {method.takes.kind} updates, and these are {kind.kind}"
    if method.needs_frozen_a and not frozen_a:
        return f"{how.method} needs one A that nobody trains: lora.freeze_a = true in the job, before it starts"
    if method.needs_one_rank and not one_rank:
        return f"{how.method} needs adapters of one rank, and these have several"
    if clients < (least := method.min_clients(how)):
        return f"{described(how)} needs at least {least} contributions, not {clients}"
    return ""


def described(how: pb.AggregateSpec) -> str:
    """A method and its parameters, for people: `ties (density 0.2)`."""
    names = METHODS[how.method].parameters if how.method in METHODS else ()
    values = [f"{name.replace('_', ' ')} {value:g}" for name in names if (value := getattr(how, name))]
    if how.server_learning_rate != 1:
        values.append(f"server learning rate {how.server_learning_rate:g}")
    return f"{how.method} ({', '.join(values)})" if values else how.method


def _whole(
    outcome: Outcome, how: pb.AggregateSpec, start: Update[ModuleUpdate] | None, name: str
) -> ModuleUpdate | Factor:
    """A module's ΔW₀ + λ (ΔW − ΔW₀), where λ is the server learning rate; λ ΔW without a start."""
    update, rate = outcome.update(name), how.server_learning_rate
    first = start.modules[name] if start else None
    if isinstance(update, np.ndarray):
        update *= np.float32(rate)
        return update if first is None else first.sum([first], [1 - rate]).add_to(update)
    scaled = update.sum([update], [rate])
    if first is None or rate == 1:
        return scaled
    return scaled.plus(first, 1 - rate, keep_rank=METHODS[how.method].needs_frozen_a)


def _in_rank(update: ModuleUpdate | Factor, rank: int, kind: type[M]) -> Truncated[M]:
    """A module's update in its final rank and kind."""
    if isinstance(update, np.ndarray):
        return kind.nearest(update, rank)
    return cast(M, update).compact(rank)


def _mapped(update: M, file: Path) -> M:
    """The same update, kept in a file."""
    tensors.write(file, update.tensors(), {})
    stored: Mapping[str, tensors.Array] = tensors.read(file)[0]
    return update.from_tensors(stored)
