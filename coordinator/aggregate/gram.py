"""Inner products and norms of low-rank updates, without forming any ΔW.

Each core holds a few clients' factors of one module; all else is (clients × modules) floats for norms and
(clients × clients) for products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from converters.adapter import Adapter, LowRank

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_PANEL = 128  # columns of B that go into one product
_WORKERS = min(os.cpu_count() or 1, 8)


def inner(rows: Sequence[LowRank], columns: Sequence[LowRank] | None = None) -> Floats:
    """⟨ΔWᵢ, ΔWⱼ⟩ of one module's updates, (rows, columns), in float64; of `rows` among themselves without `columns`.

    tr((BⱼᵀBᵢ)(AᵢAⱼᵀ)), several updates' factors at a time: O(Σrᵢ · Σrⱼ · (out + in)).
    """
    others = rows if columns is None else columns
    found = np.zeros((len(rows), len(others)))
    for n, batch in enumerate(left := _batches(rows)):
        owners, a, b = stacked = _stacked(rows, batch)
        for other in left[n:] if columns is None else _batches(others):
            whose, other_a, other_b = stacked if others is rows and other is batch else _stacked(others, other)
            product = (b.T @ other_b) * (a @ other_a.T)  # (Σrᵢ, Σrⱼ) of the batches
            np.add.at(found, (owners[:, None], whose[None, :]), product)
    return np.triu(found) + np.triu(found, 1).T if columns is None else found


def pieces(update: LowRank) -> list[LowRank]:
    """An update as the sum of several of a smaller rank: `inner` takes up whole updates, and a stacked one is many."""
    return [
        LowRank(term.a[start : start + _PANEL], term.b[:, start : start + _PANEL], term.weight)
        for term in update.terms
        for start in range(0, len(term.a), _PANEL)
    ]


def _batches(updates: Sequence[LowRank]) -> list[Indices]:
    """Indices of updates, as many together as have about _PANEL columns of B."""
    before = np.cumsum([0, *(update.rank for update in updates)])[:-1]
    cuts = np.flatnonzero(np.diff(before // _PANEL)) + 1
    return [batch for batch in np.split(np.arange(len(updates)), cuts) if len(batch)]


def _stacked(updates: Sequence[LowRank], batch: Indices) -> tuple[Indices, Floats, Floats]:
    """Whose each column is (Σr), A (Σr, in) and B (out, Σr)."""
    chosen = [updates[i] for i in batch]
    a = np.concatenate([update.a for update in chosen], axis=0, dtype=np.float64)
    b = np.concatenate([update.b for update in chosen], axis=1, dtype=np.float64)
    for update in chosen:
        update.forget()
    return np.repeat(batch, [update.rank for update in chosen]), a, b


def norms(adapters: Sequence[Adapter]) -> Floats:
    """‖ΔW‖ of adapters of the same modules, which are in order of their names (clients, modules)."""
    modules = sorted(adapters[0].modules)

    def of(module: str) -> Floats:
        return np.array([inner([adapter.modules[module]])[0, 0] for adapter in adapters])

    squares = np.stack(list(in_parallel(of, modules)), axis=1)
    return np.sqrt(np.maximum(squares, 0.0, out=squares), out=squares)


def products(adapters: Sequence[Adapter]) -> Floats:
    """⟨ΔWᵢ, ΔWⱼ⟩ over all modules together (clients, clients)."""

    def of(module: str) -> Floats:
        return inner([adapter.modules[module] for adapter in adapters])

    return sum(in_parallel(of, sorted(adapters[0].modules)), np.zeros((len(adapters), len(adapters))))


def in_parallel(work: Callable[[str], Floats], modules: Sequence[str]) -> Iterator[Floats]:
    """Modules side by side, results in order. Threads within a product would wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(work, modules)
