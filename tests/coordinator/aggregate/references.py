"""What each aggregation method should give, spelled out over dense matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from converters.adapter import Adapter, LowRank, Shape
from coordinator.aggregate import METHODS, ClientUpdate
from oneround.v1 import federation_pb2 as pb

SHAPES = {"q": Shape(6, 4), "v": Shape(3, 4), "down": Shape(4, 9)}


FULL = 50  # a rank that nothing is lost in


Dense = dict[str, np.ndarray]


each_method = pytest.mark.parametrize("method", METHODS)


def how(method: str, **parameters: float) -> pb.AggregateSpec:
    """With a method's parameters as far as it has them."""
    taken = {name: value for name, value in parameters.items() if name in METHODS[method].parameters}
    return pb.AggregateSpec(method=method, **taken)  # type: ignore[arg-type]


def cohort(
    seed: int, n_clients: int, *, ranks: tuple[int, ...] = (2,), frozen: bool = True, examples: int = 1000
) -> list[ClientUpdate]:
    """Clients with a common part; with A frozen, or each with its own."""
    rng = np.random.default_rng(seed)
    rank = ranks[0]
    shared = {name: rng.standard_normal((rank, s.into)).astype(np.float32) for name, s in SHAPES.items()}
    common = {name: rng.standard_normal((s.out, rank)) for name, s in SHAPES.items()}
    made = []
    for n in range(n_clients):
        modules = {}
        for name, shape in SHAPES.items():
            if frozen:
                a, b = shared[name], common[name] + rng.standard_normal((shape.out, rank))
            else:
                own = ranks[n % len(ranks)]
                a = rng.standard_normal((own, shape.into)).astype(np.float32)
                b = rng.standard_normal((shape.out, own))
            modules[name] = LowRank(a, b.astype(np.float32))
        made.append(ClientUpdate(Adapter(modules), int(rng.integers(1, examples + 1))))
    return made


def deltas(made: Adapter) -> Dense:
    return {name: update.delta().astype(np.float64) for name, update in made.modules.items()}


def assert_close(found: Dense, expected: Dense, tolerance: float = 1e-4) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance)


def shares(given: list[ClientUpdate]) -> np.ndarray:
    counts = np.array([one.num_examples for one in given], np.float64)
    return counts / counts.sum()


def stack(given: list[ClientUpdate], name: str) -> np.ndarray:
    return np.stack([one.adapter.modules[name].delta().astype(np.float64) for one in given])  # (K, out, in)


def flat(given: list[ClientUpdate]) -> np.ndarray:
    return np.stack([np.concatenate([stack([one], name).ravel() for name in SHAPES]) for one in given])  # (K, all)


def weighted(given: list[ClientUpdate], weights: np.ndarray) -> Dense:
    return {name: np.tensordot(weights, stack(given, name), 1) for name in SHAPES}


def dense_exact(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    return weighted(given, shares(given))


def dense_svd(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    found = {}
    for name, mean in dense_exact(given, spec).items():
        rank = max(one.adapter.modules[name].rank for one in given)
        left, values, right = np.linalg.svd(mean, full_matrices=False)
        found[name] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return found


def dense_fedavg(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    weights = shares(given)
    a = {name: sum(w * one.adapter.modules[name].a for w, one in zip(weights, given, strict=True)) for name in SHAPES}
    b = {name: sum(w * one.adapter.modules[name].b for w, one in zip(weights, given, strict=True)) for name in SHAPES}
    return {name: b[name] @ a[name] for name in SHAPES}


def dense_ties(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    found, weights = {}, shares(given)[:, None, None]
    for name in SHAPES:
        whole = stack(given, name)
        kept = np.zeros_like(whole)
        for one, out in zip(whole, kept, strict=True):
            largest = np.argsort(-np.abs(one), axis=None)[: max(round(spec.density * one.size), 1)]
            out.flat[largest] = one.flat[largest]
        elected = np.sign((weights * kept).sum(0))
        agrees = (np.sign(kept) == elected) & (kept != 0)
        voted = (weights * agrees).sum(0)
        found[name] = np.where(voted > 0, (weights * kept * agrees).sum(0) / np.where(voted > 0, voted, 1), 0)
    return found


def dense_dare(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    found = {}
    for name in SHAPES:
        masked = []
        for one, delta in zip(given, stack(given, name), strict=True):
            update = one.adapter.modules[name]
            digest = hashlib.sha256(update.a.tobytes() + update.b.tobytes()).digest()
            lot = np.random.default_rng(int.from_bytes(digest[:8]))
            masked.append(np.where(lot.random(delta.shape, np.float32) < spec.density, delta / spec.density, 0))
        found[name] = np.tensordot(shares(given), np.stack(masked), 1)
    return found


def dense_norm_clip(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    norms = np.linalg.norm(flat(given), axis=1)
    return weighted(given, np.minimum(1, spec.norm_bound * np.median(norms) / norms) / len(given))


def dense_krum(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    points, near = flat(given), len(given) - spec.byzantine_clients - 2
    scores = []
    for point in points:
        others = np.sort(np.square(points - point).sum(1))[1:]
        scores.append(others[:near].sum())
    weights = np.zeros(len(given))
    weights[np.argsort(scores)[: spec.krum_keep or near]] = 1 / (spec.krum_keep or near)
    return weighted(given, weights)


def dense_geometric_median(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    """Weiszfeld's iteration in the space of the updates themselves."""
    points = flat(given)
    middle = points.mean(0)
    for _ in range(20_000):
        distances = np.maximum(np.linalg.norm(points - middle, axis=1), 1e-9)
        before, middle = middle, (points / distances[:, None]).sum(0) / (1 / distances).sum()
        if np.abs(before - middle).max() < 1e-12:
            break
    ends = np.cumsum([shape.out * shape.into for shape in SHAPES.values()])[:-1]
    return {
        name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), np.split(middle, ends), strict=True)
    }


def dense_trimmed_mean(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    f, found = spec.byzantine_clients, {}
    for name in SHAPES:
        b = np.sort(np.stack([one.adapter.modules[name].b for one in given]), axis=0)
        found[name] = b[f : len(given) - f].mean(0) @ given[0].adapter.modules[name].a
    return found


def dense_median(given: list[ClientUpdate], spec: pb.AggregateSpec) -> Dense:
    return {
        name: np.median(np.stack([one.adapter.modules[name].b for one in given]), axis=0)
        @ given[0].adapter.modules[name].a
        for name in SHAPES
    }


REFERENCES: dict[str, Callable[[list[ClientUpdate], pb.AggregateSpec], Dense]] = {
    "exact": dense_exact,
    "fedavg": dense_fedavg,
    "svd": dense_svd,
    "ffa": dense_exact,
    "fedex": dense_exact,
    "task-arithmetic": dense_exact,
    "ties": dense_ties,
    "dare": dense_dare,
    "norm-clip": dense_norm_clip,
    "krum": dense_krum,
    "geometric-median": dense_geometric_median,
    "trimmed-mean": dense_trimmed_mean,
    "median": dense_median,
}
