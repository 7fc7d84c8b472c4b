"""Honest contributions as a cohort of clients would send them."""

from __future__ import annotations

import numpy as np

from converters import adapter
from converters.adapter import Adapter, LowRank, Shape
from coordinator.admission.outliers import Member

SHAPES = {"q": Shape(24, 16), "v": Shape(12, 16), "down": Shape(16, 40)}


def member(n: int, update: Adapter, *, by_hand: bool = False) -> Member:
    return Member(f"{n:012x}", f"client-{n}", update, 10, by_hand)


def honest(seed: int, n_clients: int, spread: float = 2.5, alike: float = 0.4) -> list[Member]:
    """Clients that start from one A and drift; B has a common part and their own, pairwise cosines are about `alike`,
    and every module's norms lie within a factor of `spread`."""
    rng, start = np.random.default_rng(seed), adapter.initial(SHAPES, 4, seed=7)
    common = {name: rng.standard_normal(update.b.shape) for name, update in start.modules.items()}
    members = []
    for n in range(n_clients):
        modules = {}
        for name, update in start.modules.items():
            a = update.a + 0.05 * np.abs(update.a).mean() * rng.standard_normal(update.a.shape)
            b = np.sqrt(alike) * common[name] + np.sqrt(1 - alike) * rng.standard_normal(update.b.shape)
            b *= spread ** rng.uniform(0, 1) / np.linalg.norm(b @ a)
            modules[name] = LowRank(a.astype(np.float32), b.astype(np.float32))
        members.append(member(n, Adapter(modules)))
    return members


def dense(update: Adapter) -> np.ndarray:
    return np.concatenate([one.delta().astype(np.float64).ravel() for _, one in sorted(update.modules.items())])
