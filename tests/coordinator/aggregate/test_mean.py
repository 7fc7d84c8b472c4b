"""The exact mean, its neighbours and truncation. test_methods.py has what holds for all methods."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.adapter import Adapter, LowRank
from coordinator.aggregate import ClientUpdate, aggregate
from oneround.errors import LayoutMismatch
from oneround.v1 import federation_pb2 as pb

SHAPES = {"q": (6, 4), "v": (3, 4), "down": (4, 9)}


def adapter(seed: int, ranks: dict[str, int], a_seed: int | None = None) -> Adapter:
    rng, a_rng = np.random.default_rng(seed), np.random.default_rng(seed if a_seed is None else a_seed)
    return Adapter(
        {
            name: LowRank(
                a_rng.standard_normal((ranks[name], into)).astype(np.float32),
                rng.standard_normal((out, ranks[name])).astype(np.float32),
            )
            for name, (out, into) in SHAPES.items()
        }
    )


RANKS = st.fixed_dictionaries({name: st.integers(1, 5) for name in SHAPES})
COHORTS = st.lists(
    st.builds(ClientUpdate, st.builds(adapter, st.integers(0, 2**31), RANKS), st.integers(1, 1000)),
    min_size=1,
    max_size=6,
)


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: factors.delta() for name, factors in adapter.modules.items()}


def dense_mean(cohort: list[ClientUpdate]) -> dict[str, np.ndarray]:
    whole = sum(contribution.num_examples for contribution in cohort)
    return {
        name: sum(c.num_examples / whole * c.adapter.modules[name].delta().astype(np.float64) for c in cohort)
        for name in SHAPES
    }


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


@given(COHORTS)
@settings(max_examples=50, deadline=None)
def test_exact_is_the_dense_mean_whatever_the_ranks(cohort: list[ClientUpdate]) -> None:
    result = aggregate(cohort, "exact")
    assert_close(deltas(result.adapter), dense_mean(cohort))
    for name, rank in result.adapter.ranks.items():
        assert rank == sum(contribution.adapter.ranks[name] for contribution in cohort)


@given(COHORTS, st.integers(2, 7))
@settings(max_examples=25, deadline=None)
def test_order_and_common_scale_of_weights_do_not_matter(cohort: list[ClientUpdate], factor: int) -> None:
    expected = deltas(aggregate(cohort, "exact").adapter)
    assert_close(deltas(aggregate(cohort[::-1], "exact").adapter), expected)
    scaled = [ClientUpdate(contribution.adapter, factor * contribution.num_examples) for contribution in cohort]
    assert_close(deltas(aggregate(scaled, "exact").adapter), expected)


def test_the_server_learning_rate_multiplies_the_mean() -> None:
    cohort = [ClientUpdate(adapter(seed, dict.fromkeys(SHAPES, 2)), seed + 1) for seed in range(3)]
    result = aggregate(cohort, pb.AggregateSpec(method="exact", server_learning_rate=1.5))
    assert_close(deltas(result.adapter), {name: 1.5 * mean for name, mean in dense_mean(cohort).items()})


def test_fedavg_is_the_mean_where_a_is_shared_and_not_elsewhere() -> None:
    ranks = dict.fromkeys(SHAPES, 2)
    shared = [ClientUpdate(adapter(seed, ranks, a_seed=9), 1) for seed in range(4)]
    assert_close(deltas(aggregate(shared, "fedavg").adapter), dense_mean(shared))
    apart = [ClientUpdate(adapter(seed, ranks), 1) for seed in range(4)]
    found, mean = deltas(aggregate(apart, "fedavg").adapter)["q"], dense_mean(apart)["q"]
    assert np.linalg.norm(found - mean) > 0.3 * np.linalg.norm(mean)


def test_fedavg_says_that_it_cannot_take_mixed_ranks() -> None:
    cohort = [ClientUpdate(adapter(rank, dict.fromkeys(SHAPES, rank)), 1) for rank in (2, 3)]
    with pytest.raises(LayoutMismatch, match="one rank"):
        aggregate(cohort, "fedavg")


def test_contributions_must_adapt_the_same_modules() -> None:
    one = adapter(1, dict.fromkeys(SHAPES, 2))
    less = Adapter({name: factors for name, factors in one.modules.items() if name != "q"})
    with pytest.raises(LayoutMismatch, match="same modules"):
        aggregate([ClientUpdate(one, 1), ClientUpdate(less, 1)], "exact")


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_truncation_is_the_best_of_its_rank(seed: int, rank: int) -> None:
    factors = adapter(seed, dict.fromkeys(SHAPES, 5)).modules["q"]
    found, kept, whole = factors.compact(rank)
    values = np.linalg.svd(factors.delta().astype(np.float64), compute_uv=False)
    assert found.rank == rank
    np.testing.assert_allclose([kept, whole], [(values[:rank] ** 2).sum(), (values**2).sum()], rtol=1e-4)
    residual = np.linalg.norm(factors.delta() - found.delta()) ** 2
    np.testing.assert_allclose(residual, whole - kept, rtol=1e-3, atol=1e-3 * whole)


def test_a_truncated_mean_reports_the_energy_it_kept() -> None:
    cohort = [ClientUpdate(adapter(seed, dict.fromkeys(SHAPES, 2)), 1) for seed in range(3)]
    result = aggregate(cohort, "exact", rank=2)
    assert set(result.adapter.ranks.values()) == {2}
    assert 0 < result.energy_kept < 1
    assert aggregate(cohort, "exact", rank=50).energy_kept == 1.0
