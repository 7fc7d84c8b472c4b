"""Every aggregation method against dense NumPy, its properties, what it refuses, and that it is documented."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import adapter
from converters.adapter import Adapter, LowRank, Shape
from coordinator.aggregate import METHODS, PARAMETERS, ClientUpdate, aggregate, described
from oneround.errors import LayoutMismatch
from oneround.v1 import federation_pb2 as pb
from tests.coordinator.aggregate.references import (
    FULL,
    REFERENCES,
    assert_close,
    cohort,
    deltas,
    each_method,
    how,
)

ROOT = Path(__file__).parents[3]


# What each method should give, spelled out over dense matrices, one line of thought each.


def test_every_method_is_documented_everywhere() -> None:
    assert REFERENCES.keys() == METHODS.keys()
    readme = (ROOT / "README.md").read_text()
    table = readme.split("## Aggregation methods")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, flags=re.M) == list(METHODS)
    proto = (ROOT / "proto/oneround/v1/federation.proto").read_text()
    comment = proto.split("message AggregateSpec {")[1].split("string method")[0]
    assert re.findall(r"`([\w-]+)`", comment) == list(METHODS)
    fields = {field.name for field in pb.AggregateSpec.DESCRIPTOR.fields}
    assert fields - {"method"} == PARAMETERS.keys()
    assert {name for method in METHODS.values() for name in method.parameters} <= PARAMETERS.keys()
    for name, method in METHODS.items():
        text = method.run.__doc__ or ""
        assert re.search(r"arXiv \d{4}\.\d{5}", text) and re.search(r"[Cc]ost", text), f"{name}: source and cost"


@each_method
@given(st.integers(0, 2**31), st.integers(5, 9), st.sampled_from([0.3, 0.5, 1.0]), st.integers(0, 1))
@settings(max_examples=15, deadline=None)
def test_a_method_gives_what_dense_numpy_gives(
    method: str, seed: int, n_clients: int, density: float, keep: int
) -> None:
    spec = how(method, density=density, krum_keep=keep, norm_bound=0.5 + density)
    needs = METHODS[method]
    cohorts = [cohort(seed, n_clients)]
    if not needs.needs_frozen_a:
        cohorts.append(cohort(seed, n_clients, frozen=False, ranks=(2,) if needs.needs_one_rank else (1, 3, 2)))
    for given_ in cohorts:
        result = aggregate(given_, spec, rank=0 if method == "svd" else FULL)
        assert_close(deltas(result.adapter), REFERENCES[method](given_, spec), 1e-3)


@each_method
@given(st.integers(0, 2**31), st.integers(5, 8), st.integers(2, 7))
@settings(max_examples=10, deadline=None)
def test_order_and_common_scale_of_the_counts_do_not_matter(
    method: str, seed: int, n_clients: int, factor: int
) -> None:
    given_ = cohort(seed, n_clients)
    first = aggregate(given_, method)
    turned = aggregate(given_[::-1], method)
    np.testing.assert_allclose(turned.weights[::-1], first.weights, atol=1e-6)
    assert_close(deltas(turned.adapter), deltas(first.adapter), 1e-3)
    scaled = [ClientUpdate(one.adapter, factor * one.num_examples) for one in given_]
    assert_close(deltas(aggregate(scaled, method).adapter), deltas(first.adapter))


@each_method
def test_equal_contributions_are_a_fixed_point_and_inputs_stay_as_they_are(method: str) -> None:
    """`ties` and `dare` change an adapter by itself, unless they keep all of it."""
    one = cohort(1, 1)[0].adapter
    before = {name: (update.a.copy(), update.b.copy()) for name, update in one.modules.items()}
    result = aggregate([ClientUpdate(one, n) for n in (5, 7, 9, 11, 4)], how(method, density=1.0))
    assert_close(deltas(result.adapter), deltas(one))
    for name, (a, b) in before.items():
        assert np.array_equal(one.modules[name].a, a) and np.array_equal(one.modules[name].b, b)


@each_method
def test_the_server_learning_rate_multiplies_and_scratch_changes_nothing(method: str, tmp_path: Path) -> None:
    given_, spec = cohort(2, 6), pb.AggregateSpec(method=method)
    plain = deltas(aggregate(given_, spec).adapter)
    spec.server_learning_rate = 1.5
    result = aggregate(given_, spec, scratch=tmp_path)
    assert_close(deltas(result.adapter), {name: 1.5 * delta for name, delta in plain.items()})


@each_method
def test_a_truncated_result_has_the_rank_and_reports_the_energy(method: str) -> None:
    given_ = cohort(3, 6)
    whole, cut = (aggregate(given_, method, rank=rank) for rank in (FULL, 1))
    assert set(cut.adapter.ranks.values()) == {1} and whole.energy_kept == pytest.approx(1.0, abs=1e-6)
    energies = [sum(float(np.square(delta).sum()) for delta in deltas(one.adapter).values()) for one in (cut, whole)]
    assert cut.energy_kept == pytest.approx(energies[0] / energies[1], rel=1e-4) and cut.energy_kept < 1


def test_what_a_method_cannot_take_it_refuses_at_once() -> None:
    mixed, apart, few = cohort(0, 5, frozen=False, ranks=(2, 3)), cohort(0, 5, frozen=False), cohort(0, 2)
    for method, needs in METHODS.items():
        for given_, bad, says in (
            (mixed, needs.needs_one_rank, "of one rank"),
            (apart, needs.needs_frozen_a, "lora.freeze_a = true"),
            (few, needs.min_clients(pb.AggregateSpec()) > 2, "contributions, not 2"),
        ):
            if bad:
                with pytest.raises(LayoutMismatch, match=says):
                    aggregate(given_, method)
            elif not (given_ is mixed and needs.needs_frozen_a):
                aggregate(given_, method)
    with pytest.raises(LayoutMismatch, match="needs at least 9 contributions, not 5"):
        aggregate(apart, how("krum", byzantine_clients=3))


def test_krum_says_whom_it_took() -> None:
    given_ = cohort(4, 7)
    for keep, expected in ((0, 4), (1, 1), (3, 3)):
        result = aggregate(given_, how("krum", krum_keep=keep))
        assert sum(weight > 0 for weight in result.weights) == expected
        assert result.adapter.ranks["q"] == 2 * expected, "who is left out takes no room"


def test_dare_is_the_exact_mean_in_expectation() -> None:
    """Over many clients with the same ΔW in other factors, so that masks differ."""
    base, rng = cohort(5, 1)[0].adapter, np.random.default_rng(0)
    turned = []
    for _ in range(400):
        turn = np.linalg.qr(rng.standard_normal((2, 2)))[0]
        modules = {
            name: LowRank((turn @ one.a).astype(np.float32), (one.b @ turn.T).astype(np.float32))
            for name, one in base.modules.items()
        }
        turned.append(ClientUpdate(Adapter(modules), 1))
    found = deltas(aggregate(turned, how("dare", density=0.5), rank=FULL).adapter)
    for name, expected in deltas(base).items():
        assert np.linalg.norm(found[name] - expected) < 4 * np.linalg.norm(expected) / np.sqrt(400)


@pytest.mark.parametrize("spectrum", ["flat", "falling"])
def test_subspace_iteration_comes_close_to_the_best(spectrum: str) -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((300, 400)).astype(np.float32)
    if spectrum == "falling":
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        dense = (left * (values[0] / np.arange(1, 301))) @ right
    best = np.square(np.linalg.svd(dense, compute_uv=False)[:20]).sum()
    found = LowRank.nearest(dense, 20)
    assert found.update.rank == 20 and 0.95 * best < found.kept < 1.0001 * best
    assert np.square(dense - found.update.delta()).sum() == pytest.approx(found.whole - found.kept, rel=1e-3)


def test_a_method_is_described_with_its_parameters() -> None:
    assert described(how("exact")) == "exact"
    assert described(how("ties", density=0.3)) == "ties (density 0.3)"
    spec = how("krum", byzantine_clients=2)
    spec.server_learning_rate = 1.2
    assert described(spec) == "krum (byzantine clients 2, server learning rate 1.2)"


@each_method
def test_memory_is_flat_in_the_number_of_clients(tmp_path: Path, method: str) -> None:
    """Rows of all clients' B are one slab from some size on, and ΔW is small beside all factors."""
    dense = "density" in METHODS[method].parameters
    shape = Shape(8192, 16) if METHODS[method].needs_frozen_a else Shape(160, 128) if dense else Shape(512, 128)
    shapes = {f"layers.{n}": shape for n in range(2)}
    start, rng, files = adapter.initial(shapes, 16, seed=0), np.random.default_rng(0), []
    for n in range(120):
        files.append(tmp_path / f"{n}.safetensors")
        modules = {
            name: LowRank(one.a, rng.standard_normal(one.b.shape).astype(np.float32))
            for name, one in start.modules.items()
        }
        adapter.write(Adapter(modules), files[-1], "bfloat16")

    def peak(n_clients: int) -> int:
        given_ = [ClientUpdate(adapter.read(file), 1) for file in files[:n_clients]]
        tracemalloc.start()
        result = aggregate(given_, method)
        for update in result.adapter.modules.values():
            update.delta()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(5)  # imports
    few, many = peak(16), peak(120)
    assert many < 2.5 * few, (few, many)
