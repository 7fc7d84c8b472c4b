"""Methods that look at every number of B by itself, which means something only where all clients share one frozen A.

ΔWᵢ = BᵢA, and what is taken of the Bᵢ is taken in A's coordinates: a (r, in), b (out, r). All clients have
the same say, since num_examples is only declared. Some rows of all clients' B are in memory at a time, however many
clients there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converters.tensors import Array
from converters.updates.low_rank import LowRank
from converters.updates.update import Factor
from coordinator.aggregate.method import Cohort, Outcome
from oneround.v1 import federation_pb2 as pb

_SLAB = 1 << 20  # numbers of all clients' B together that are looked at at a time


def median(cohort: Cohort) -> Outcome:
    """The median over clients of every number of B. Holds against fewer than half.

    Cost: O(K r out) a module. Source: arXiv 1803.01498.
    """
    return _by_number(cohort, lambda numbers: np.median(numbers, axis=0))


def trimmed_mean(cohort: Cohort) -> Outcome:
    """The mean over clients of every number of B, less the f smallest and the f largest (f = `byzantine_clients`).

    Holds against f of K ≥ 2f + 1. Cost: O(K r out) a module. Source: arXiv 1803.01498.
    """
    f = cohort.how.byzantine_clients
    most = len(cohort.updates) - f
    return _by_number(cohort, lambda numbers: np.partition(numbers, (f, most - 1), axis=0)[f:most].mean(0))


def trimmed_mean_needs(how: pb.AggregateSpec) -> int:
    """Contributions of which something is left: 2f + 1."""
    return 2 * how.byzantine_clients + 1


def _by_number(cohort: Cohort, middle: Callable[[Factor], Factor]) -> Outcome:
    """`middle` takes (K, rows, r) to (rows, r)."""

    def of(module: str) -> LowRank:
        factors = cohort.factors(module)
        (out, _), rank = factors[0].shape, factors[0].rank
        b = np.empty((out, rank), np.float32)
        step = max(_SLAB // (len(factors) * rank), 1)
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            numbers = np.empty((len(factors), rows.stop - start, rank), np.float32)
            for update, place in zip(factors, numbers, strict=True):
                np.concatenate([_scaled(term.b[rows], term.weight) for term in update.terms], axis=1, out=place)
                update.forget()
            b[rows] = middle(numbers)
        return LowRank(factors[0].a, b)

    return Outcome(cohort.alike, of)


def _scaled(b: Array, weight: float) -> Factor:
    return b.astype(np.float32) * np.float32(weight)
