"""Methods that look at every entry of ΔW, and so form it: a module's (out, in) in float32, a few times over, one module
at a time and one client after the other. Where the round began with a start, ΔW is what was changed of it, and the
start is added to what comes out. What comes out is dense, and brought back to the updates' kind afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from converters.updates.update import Factor, ModuleUpdate
from coordinator.aggregate.method import Cohort, Outcome

_ROWS = 256  # that DARE's mask is drawn for at a time


def ties(cohort: Cohort) -> Outcome:
    """Of every client's ΔW the largest `density` of entries, module by module; for each entry the sign with the greater
    weighted sum; and the mean over the clients that have this sign there. Others count nothing there. Any ranks.

    Equal adapters give that adapter trimmed, not as it was. Weighted by examples; the paper's clients weigh the same.
    Memory: some six modules' ΔW. Cost: O(Σr out in) a module, twice. Source: arXiv 2306.01708.
    """
    weights, density = cohort.by_examples, cohort.how.density

    def update(module: str) -> Factor:
        updates = _changed(cohort, module)
        total = np.zeros(updates[0].shape, np.float32)
        for change, weight in zip(updates, weights, strict=True):
            total += np.float32(weight) * trimmed(change, density)
        sign = np.sign(total)
        total[:] = 0
        voted = np.zeros_like(total)  # the weight of those that have the sign
        for change, weight in zip(updates, weights, strict=True):
            kept = trimmed(change, density)
            kept[kept * sign <= 0] = 0
            voted[kept != 0] += np.float32(weight)
            total += np.float32(weight) * kept
        return _from_start(np.divide(total, voted, out=total, where=voted > 0), cohort, module)

    return Outcome(weights, update, _stacked_rank(cohort))


def trimmed(update: ModuleUpdate, density: float) -> Factor:
    """ΔW (out, in) with all but the largest `density` of its entries zero, by absolute value; equal ones all stay."""
    dense = update.delta()
    count = max(round(density * dense.size), 1)
    if count < dense.size:
        least = np.partition(np.abs(dense), dense.size - count, axis=None)[dense.size - count]
        dense[np.abs(dense) < least] = 0
    return dense


def dare(cohort: Cohort) -> Outcome:
    """Of every client's ΔW each entry with probability `density`, divided by it, else zero; and the mean of these. In
    expectation the exact mean. Any ranks.

    Which entries stay follows from the contribution's own bytes, so that the same cohort gives the same result in any
    order. Memory: two modules' ΔW. Cost: O(Σr out in) a module. Source: arXiv 2311.03099.
    """
    weights, density = cohort.by_examples, cohort.how.density

    def update(module: str) -> Factor:
        updates = _changed(cohort, module)
        total = np.zeros(updates[0].shape, np.float32)
        for change, weight in zip(updates, weights, strict=True):
            dense = change.delta()
            rng = np.random.default_rng(_seed(change))
            for start in range(0, len(dense), _ROWS):
                rows = dense[start : start + _ROWS]
                rows *= rng.random(rows.shape, np.float32) < density
            total += np.float32(weight / density) * dense
        return _from_start(total, cohort, module)

    return Outcome(weights, update, _stacked_rank(cohort))


def _changed(cohort: Cohort, module: str) -> list[ModuleUpdate]:
    return [update.modules[module] for update in cohort.changed]


def _from_start(change: Factor, cohort: Cohort, module: str) -> Factor:
    """The start and what was made of the changes, (out, in)."""
    return change if cohort.start is None else cohort.start.modules[module].add_to(change)


def _seed(update: ModuleUpdate) -> int:
    digest = hashlib.sha256()
    for tensor in update.tensors().values():
        digest.update(np.ascontiguousarray(tensor.make()).data)
    update.forget()
    return int.from_bytes(digest.digest()[:8])


def _stacked_rank(cohort: Cohort) -> Callable[[str], int]:
    """What `exact` would have, and the start, which does not cancel here; and what can be at most."""

    def rank(module: str) -> int:
        updates = cohort.of(module)
        start = cohort.start.modules[module].rank if cohort.start else 0
        return min(sum(update.rank for update in updates) + start, *updates[0].shape)

    return rank
