"""Averages of adapters that began with another one: every method is about what was changed, and the start is in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.adapter import Adapter, LowRank
from coordinator.admission import outliers as judging
from coordinator.admission.outliers import Member
from coordinator.aggregate import METHODS, ClientUpdate, aggregate, changes, clipped
from oneround.v1 import federation_pb2 as pb
from tests.coordinator.aggregate.references import (
    FULL,
    REFERENCES,
    SHAPES,
    assert_close,
    cohort,
    deltas,
    each_method,
    how,
)

LARGE = 30.0  # times what a client changes


def begun(seed: int, n_clients: int, *, frozen: bool, small: float = 1.0) -> tuple[Adapter, list[ClientUpdate]]:
    """A start of rank 2, and clients that changed it; B alone where A is frozen."""
    rng = np.random.default_rng(seed)
    drawn = cohort(seed, n_clients, frozen=frozen)
    start, given_ = {}, []
    for name, shape in SHAPES.items():
        a = drawn[0].adapter.modules[name].a if frozen else rng.standard_normal((2, shape.into)).astype(np.float32)
        start[name] = LowRank(a, np.float32(LARGE) * rng.standard_normal((shape.out, 2)).astype(np.float32))
    for one in drawn:
        modules = {}
        for name, first in start.items():
            moved, s = one.adapter.modules[name], np.float32(small)
            a = first.a if frozen else first.a + s * np.float32(0.1) * moved.a
            modules[name] = LowRank(a, first.b + s * moved.b)
        given_.append(ClientUpdate(Adapter(modules), one.num_examples))
    return Adapter(start), given_


def changed(start: Adapter, given_: list[ClientUpdate], *, collapsed: bool) -> list[ClientUpdate]:
    """The same clients as if they had begun with nothing: B − B₀ over the same A, or both factors side by side."""

    def of(mine: LowRank, first: LowRank) -> LowRank:
        return LowRank(first.a, mine.b - first.b) if collapsed else LowRank.sum([mine, first], [1, -1])

    return [
        ClientUpdate(
            Adapter({name: of(one.adapter.modules[name], start.modules[name]) for name in SHAPES}), one.num_examples
        )
        for one in given_
    ]


@each_method
@given(st.integers(0, 2**31), st.integers(5, 8), st.sampled_from([1.0, 1.5]), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_method_averages_what_was_changed_and_adds_the_start(
    method: str, seed: int, n_clients: int, rate: float, frozen: bool
) -> None:
    needs, spec = METHODS[method], how(method, density=0.5, norm_bound=0.8)
    frozen = frozen or needs.needs_frozen_a
    start, given_ = begun(seed, n_clients, frozen=frozen)
    spec.server_learning_rate = rate
    result = aggregate(given_, spec, rank=0 if needs.is_lazy else FULL, start=start)
    before = deltas(start)
    if method == "fedavg" and not frozen:  # a mean of whole factors; the rate goes from the start to it
        middle = REFERENCES[method](given_, spec)
        expected = {name: before[name] + rate * (middle[name] - before[name]) for name in SHAPES}
    else:
        reference = "exact" if method == "svd" else method  # which truncates the whole, and here to a rank that is full
        alone = changed(start, given_, collapsed=needs.needs_frozen_a or (needs.needs_one_rank and frozen))
        made = REFERENCES[reference](alone, spec)
        expected = {name: before[name] + rate * made[name] for name in SHAPES}
    assert_close(deltas(result.adapter), expected, 2e-3)


def test_ranks_do_not_grow_by_the_start() -> None:
    start, given_ = begun(3, 4, frozen=False)
    frozen_start, frozen = begun(3, 4, frozen=True)

    def ranks(method: str, rate: float = 1.0) -> set[int]:
        first, among = (frozen_start, frozen) if METHODS[method].needs_frozen_a else (start, given_)
        spec = pb.AggregateSpec(method=method, server_learning_rate=rate)
        return set(aggregate(among, spec, start=first).adapter.ranks.values())

    assert ranks("exact") == ranks("geometric-median") == {4 * 2}, "it cancels"
    assert ranks("exact", 1.2) == ranks("norm-clip", 1.2) == {4 * 2 + 2}, "it is there once"
    assert ranks("fedavg") == ranks("svd") == ranks("ffa") == ranks("median") == ranks("ffa", 1.2) == {2}


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_clipped_is_the_change(frozen: bool) -> None:
    start, given_ = begun(5, 3, frozen=frozen)
    scale = {"q": 0.25}
    for by_factor in (False, True):
        found = clipped(given_[0].adapter, scale, start, by_factor=by_factor)
        whole, before, now = deltas(given_[0].adapter), deltas(start), deltas(found)
        np.testing.assert_array_equal(now["v"], whole["v"])
        if frozen or not by_factor:
            np.testing.assert_allclose(now["q"], before["q"] + 0.25 * (whole["q"] - before["q"]), rtol=1e-3, atol=1e-3)
        if by_factor:
            update, first, mine = found.modules["q"], start.modules["q"], given_[0].adapter.modules["q"]
            np.testing.assert_allclose(update.b, first.b + 0.25 * (mine.b - first.b), rtol=1e-5)
            assert found.ranks == start.ranks and (not frozen or np.array_equal(update.a, first.a))
    rest = [one.adapter for one in given_[1:]]
    among = [clipped(given_[0].adapter, scale, start, by_factor=False), *rest]
    exact = aggregate([ClientUpdate(one, 1) for one in among], "exact", start=start)
    assert exact.adapter.ranks == {"q": 4 * 2, "v": 3 * 2, "down": 3 * 2}, "the start once, where a part of it stays"


def test_a_bad_client_does_not_hide_behind_the_start() -> None:
    """Wholes are alike but for some per cent; changes are not."""
    start, given_ = begun(7, 7, frozen=True, small=0.5)
    wholes = [one.adapter for one in given_]
    turned = {
        name: LowRank.sum([start.modules[name], one], [2.0, -1.0]) for name, one in wholes[5].modules.items()
    }  # ΔW₀ − (ΔWᵢ − ΔW₀)
    loud = {name: LowRank.sum([start.modules[name], one], [-24.0, 25.0]) for name, one in wholes[6].modules.items()}
    same = Adapter(dict(start.modules))
    members = [*wholes[:5], Adapter(turned), Adapter(loud), same]

    def verdicts(begin: Adapter | None) -> list[str]:
        found = judging.judge(
            [Member(str(n), f"client-{n}", changes(one, begin), 10) for n, one in enumerate(members)],
            pb.AdmissionSpec(),
        )
        return [one.verdict for one in found]

    assert verdicts(None) == ["admitted"] * 8, "by their wholes nobody would know"
    assert verdicts(start) == ["admitted"] * 5 + ["quarantined"] * 3
