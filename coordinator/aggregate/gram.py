"""Inner products and norms of updates, without forming any ΔW, over many clients and modules.

Each core holds a few clients' tensors of one module; all else is (clients × modules) floats for norms and
(clients × clients) for products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from converters.updates.update import Floats, ModuleUpdate, Update

Indices = NDArray[np.intp]

_WORKERS = min(os.cpu_count() or 1, 8)


def inner(rows: Sequence[ModuleUpdate], columns: Sequence[ModuleUpdate] | None = None) -> Floats:
    """⟨ΔWᵢ, ΔWⱼ⟩ of one module's updates, (rows, columns), in float64; of `rows` among themselves without `columns`."""
    if not rows:
        return np.zeros((0, 0 if columns is None else len(columns)))
    return rows[0].inner(rows, columns)


def norms(updates: Sequence[Update[ModuleUpdate]]) -> Floats:
    """‖ΔW‖ of updates of the same modules, which are in order of their names (clients, modules)."""
    modules = sorted(updates[0].modules)

    def of(module: str) -> Floats:
        return np.array([inner([update.modules[module]])[0, 0] for update in updates])

    squares = np.stack(list(in_parallel(of, modules)), axis=1)
    return np.sqrt(np.maximum(squares, 0.0, out=squares), out=squares)


def products(updates: Sequence[Update[ModuleUpdate]]) -> Floats:
    """⟨ΔWᵢ, ΔWⱼ⟩ over all modules together (clients, clients)."""

    def of(module: str) -> Floats:
        return inner([update.modules[module] for update in updates])

    return sum(in_parallel(of, sorted(updates[0].modules)), np.zeros((len(updates), len(updates))))


def in_parallel(work: Callable[[str], Floats], modules: Sequence[str]) -> Iterator[Floats]:
    """Modules side by side, results in order. Threads within a product would wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(work, modules)
