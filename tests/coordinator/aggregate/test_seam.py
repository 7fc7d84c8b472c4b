"""What every aggregation method has to do, whatever the kind of update: one test each, over all that are registered.

That a method gives what dense NumPy gives, in any order and at any scale of the counts, is in test_methods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters.adapter import LowRank, Shape
from converters.updates.kinds import KINDS
from converters.updates.update import ModuleUpdate, Update
from coordinator.aggregate import METHODS, PARAMETERS, ClientUpdate, aggregate, unfit
from coordinator.aggregate.linear import is_linear
from coordinator.aggregate.mean import exact
from coordinator.aggregate.method import Method
from coordinator.jobs import spec as jobs
from oneround.errors import LayoutMismatch, UsageError
from oneround.v1 import federation_pb2 as pb
from tests import updates as dense
from tests.coordinator.aggregate.references import FULL, how
from tests.updates import Dense

SHAPES = {"q": Shape(12, 8), "down": Shape(8, 18)}
RANK, CLIENTS = 2, 6
COUNTS = (10, 40, 20, 30, 60, 40)
SHARES = np.array(COUNTS) / sum(COUNTS)
MINIMAL = {"name": "notes", "model": {"base": "org/model"}, "round": {"min_clients": CLIENTS}}

Cohort = list[Update[LowRank]]
Tensors = dict[str, np.ndarray]

each_method = pytest.mark.parametrize("method", METHODS)


def of_linearity(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", [name for name, it in METHODS.items() if it.linear_in in kinds])


def cohort(seed: int, *, frozen: bool) -> Cohort:
    """Adapters of one rank; with one A, which is the same in all cohorts, or each with its own."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    one_a = {name: shared.standard_normal((RANK, shape.into)).astype(np.float32) for name, shape in SHAPES.items()}
    clients = []
    for _ in range(CLIENTS):
        modules = {}
        for name, shape in SHAPES.items():
            own = rng.standard_normal((RANK, shape.into)).astype(np.float32)
            b = rng.standard_normal((shape.out, RANK)).astype(np.float32)
            modules[name] = LowRank(one_a[name] if frozen else own, b)
        clients.append(Update(modules))
    return clients


def run(method: str, updates: list[Update[ModuleUpdate]] | Cohort, rank: int = 0) -> Update[ModuleUpdate]:
    clients = [ClientUpdate(update, count) for update, count in zip(updates, COUNTS, strict=True)]
    return aggregate(clients, method, rank=rank).adapter


def deltas(update: Update[ModuleUpdate]) -> Tensors:
    return {name: module.delta() for name, module in update.modules.items()}


def tensors(update: Update[ModuleUpdate]) -> Tensors:
    return {
        name + end: np.array(tensor.make())
        for name, module in update.modules.items()
        for end, tensor in module.tensors().items()
    }


def are_close(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[name], other[name], atol=1e-3) for name in one)


def combined(x: Tensors, y: Tensors, a: float, b: float) -> Tensors:
    return {name: a * x[name] + b * y[name] for name in x}


def by_tensor(x: Cohort, y: Cohort, a: float, b: float, *, frozen: bool) -> Cohort:
    """a x + b y of each tensor that is sent: of A and B, or of B alone where A is frozen."""

    def of(mine: LowRank, other: LowRank) -> LowRank:
        a_factor = mine.a if frozen else np.float32(a) * mine.a + np.float32(b) * other.a
        return LowRank(a_factor, np.float32(a) * mine.b + np.float32(b) * other.b)

    return [
        Update({name: of(one.modules[name], two.modules[name]) for name in SHAPES})
        for one, two in zip(x, y, strict=True)
    ]


def by_delta(x: Cohort, y: Cohort, a: float, b: float) -> Cohort:
    return [
        Update({name: LowRank.sum([one.modules[name], two.modules[name]], [a, b]) for name in SHAPES})
        for one, two in zip(x, y, strict=True)
    ]


def shifted(x: Cohort, *, frozen: bool) -> Cohort:
    """The same sums of every tensor, weighted by counts: what one client has more, another has less."""
    rng, moved = np.random.default_rng(5), []
    for n, client in enumerate(x):
        sign = {0: 1 / SHARES[0], 1: -1 / SHARES[1]}.get(n, 0.0)
        modules = {}
        for name, update in client.modules.items():
            of_a, of_b = rng.standard_normal(update.a.shape), rng.standard_normal(update.b.shape)
            a = update.a if frozen else update.a + np.float32(0.1 * sign) * of_a.astype(np.float32)
            modules[name] = LowRank(a, update.b + np.float32(0.1 * sign) * of_b.astype(np.float32))
        moved.append(Update(modules))
        if n == 0:
            rng = np.random.default_rng(5)  # the same numbers for the second
    return moved


# ---- linear in what is sent ----


@of_linearity("tensors")
def test_linear_in_tensors(method: str) -> None:
    frozen = METHODS[method].needs_frozen_a
    x, y = cohort(1, frozen=frozen), cohort(2, frozen=frozen)
    result = tensors(run(method, by_tensor(x, y, 2.0, -0.5, frozen=frozen)))
    expected = combined(tensors(run(method, x)), tensors(run(method, y)), 2.0, -0.5)
    if frozen:
        expected |= {name: tensor for name, tensor in tensors(run(method, x)).items() if "lora_A" in name}
    assert are_close(result, expected)
    assert are_close(tensors(run(method, shifted(x, frozen=frozen))), tensors(run(method, x))), "sums tell all of it"
    sums = {
        name + end: sum(weight * tensors(client)[name + end] for weight, client in zip(SHARES, x, strict=True))
        for name in SHAPES
        for end in (".lora_A.weight", ".lora_B.weight")
    }
    assert are_close(tensors(run(method, x)), sums)


@of_linearity("updates")
def test_linear_in_updates_and_not_in_two_trained_factors(method: str) -> None:
    x, y = cohort(1, frozen=False), cohort(2, frozen=False)
    result = deltas(run(method, by_delta(x, y, 2.0, -0.5)))
    assert are_close(result, combined(deltas(run(method, x)), deltas(run(method, y)), 2.0, -0.5))
    mean = {name: sum(p * one.modules[name].delta() for p, one in zip(SHARES, x, strict=True)) for name in SHAPES}
    assert are_close(deltas(run(method, x)), mean)
    assert not are_close(deltas(run(method, shifted(x, frozen=False))), deltas(run(method, x))), "sums do not tell"
    frozen = cohort(1, frozen=True)
    assert are_close(deltas(run(method, shifted(frozen, frozen=True))), deltas(run(method, frozen))), (
        "but where A is one"
    )


@of_linearity("")
def test_what_does_not_say_so_is_not_linear(method: str) -> None:
    frozen = METHODS[method].needs_frozen_a
    x, y = cohort(1, frozen=frozen), cohort(2, frozen=frozen)
    both = by_tensor(x, y, 1.0, 1.0, frozen=True) if frozen else by_delta(x, y, 1.0, 1.0)
    assert not are_close(deltas(run(method, both)), combined(deltas(run(method, x)), deltas(run(method, y)), 1.0, 1.0))


@pytest.mark.parametrize(
    ("method", "freeze_a", "expected"),
    [("fedavg", False, True), ("fedavg", True, True), ("ffa", True, True), ("exact", False, False),
     ("exact", True, True), ("task-arithmetic", False, False), ("fedex", False, False), ("svd", False, False),
     ("ties", True, False), ("krum", True, False), ("median", True, False)],
)  # fmt: skip
def test_what_a_sum_alone_can_give(method: str, freeze_a: bool, expected: bool) -> None:
    spec = jobs.parse({**MINIMAL, "lora": {"freeze_a": freeze_a}, "aggregate": {"method": method}})
    assert is_linear(spec) is expected


def test_where_updates_are_sent_as_they_are_every_mean_is_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "lora", dense)
    for method in ("exact", "fedavg", "fedex", "task-arithmetic"):
        assert is_linear(jobs.parse({**MINIMAL, "aggregate": {"method": method}}))
    assert not is_linear(jobs.parse({**MINIMAL, "aggregate": {"method": "krum"}}))


# ---- what holds for every method ----


@each_method
def test_weights_are_shares(method: str) -> None:
    clients = [ClientUpdate(one, count) for one, count in zip(cohort(3, frozen=True), COUNTS, strict=True)]
    weights = np.array(aggregate(clients, method).weights)
    assert weights.shape == (CLIENTS,) and (weights >= 0).all() and 0 < weights.sum() <= 1 + 1e-9


@each_method
def test_nothing_that_is_given_is_changed(method: str) -> None:
    clients = [ClientUpdate(one, count) for one, count in zip(cohort(3, frozen=True), COUNTS, strict=True)]
    start, spec = cohort(4, frozen=True)[0], pb.AggregateSpec(method=method, server_learning_rate=1.5)
    before = [tensors(client.adapter) for client in clients], tensors(start), spec.SerializeToString()
    for module in aggregate(clients, spec, start=start).adapter.modules.values():
        module.delta()
    for client, was in zip(clients, before[0], strict=True):
        assert all(np.array_equal(tensor, was[name]) for name, tensor in tensors(client.adapter).items())
    assert all(np.array_equal(tensor, before[1][name]) for name, tensor in tensors(start).items())
    assert spec.SerializeToString() == before[2]


@each_method
def test_nobody_trained_is_nothing_changed(method: str) -> None:
    """Clients that send what they started from get that back, at any server learning rate."""
    start = cohort(4, frozen=True)[0]
    spec = how(method, density=1.0)
    spec.server_learning_rate = 1.5
    result = aggregate([ClientUpdate(start, count) for count in COUNTS], spec, start=start).adapter
    assert are_close(deltas(result), deltas(start))


@each_method
def test_every_kind_that_it_takes(method: str, tmp_path: Path) -> None:
    """Dense updates of low rank give what their factors give, and stay what they are."""
    factors = cohort(3, frozen=False)
    whole = [Update({name: Dense(one.modules[name].delta()) for name in SHAPES}) for one in factors]
    if METHODS[method].takes is not None:
        with pytest.raises(LayoutMismatch, match="averages low-rank updates, and these are dense"):
            run(method, whole)
        return
    result = aggregate(
        [ClientUpdate(update, count) for update, count in zip(whole, COUNTS, strict=True)], method, scratch=tmp_path
    )
    assert all(isinstance(module, Dense) for module in result.adapter.modules.values())
    assert result.energy_kept == 1.0
    # What has no factors is not averaged by factors, nor cut to their rank; and dare draws from what was sent.
    same = {"fedavg": "exact", "svd": "exact", "dare": "exact"}.get(method, method)
    if method == "dare":
        kept = aggregate([ClientUpdate(update, 1) for update in whole], how("dare", density=1.0)).adapter
        mean = {name: np.mean([one.modules[name].delta() for one in whole], axis=0) for name in SHAPES}
        assert are_close(deltas(kept), mean)
    else:
        assert are_close(deltas(result.adapter), deltas(run(same, factors, rank=FULL)))


# ---- what it says of itself ----


@each_method
def test_it_says_what_it_needs(method: str) -> None:
    it = METHODS[method]
    assert set(it.parameters) <= PARAMETERS.keys() - {"server_learning_rate"}
    assert it.min_clients(pb.AggregateSpec()) >= 1
    assert it.takes is not None or not it.needs_frozen_a, "only low-rank updates have an A"
    assert it.linear_in != "tensors" or not it.is_lazy, "sums of tensors are computed"
    assert not it.statistics or it.linear_in != "tensors", "statistics are no tensor of an update"


def test_a_method_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is offered, checked, run and described by its name."""
    monkeypatch.setitem(METHODS, "new", Method(exact, is_lazy=True, min_clients=lambda how: 3))
    assert jobs.parse({**MINIMAL, "aggregate": {"method": "new"}}).aggregate.method == "new"
    assert are_close(deltas(run("new", cohort(1, frozen=False))), deltas(run("exact", cohort(1, frozen=False))))
    with pytest.raises(UsageError, match="new needs at least 3 contributions, not 2"):
        jobs.parse({**MINIMAL, "round": {}, "aggregate": {"method": "new"}})


def refused(monkeypatch: pytest.MonkeyPatch, method: Method, setting: Callable[[], object] = lambda: None) -> str:
    monkeypatch.setitem(METHODS, "new", method)
    setting()
    with pytest.raises(UsageError) as caught:
        jobs.parse({**MINIMAL, "aggregate": {"method": "new"}})
    return str(caught.value)


def test_statistics_that_nobody_can_send_are_refused_before_anybody_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Method(exact, statistics=("curvature", "steps"))
    why = refused(monkeypatch, needs)
    assert why == "new needs curvature and steps of every client, which nobody can send beside low-rank updates"
    monkeypatch.setitem(KINDS, "lora", dense)
    assert "new needs curvature of every client" in refused(monkeypatch, needs), "dense updates have steps, in tests"
    monkeypatch.setitem(METHODS, "new", Method(exact, statistics=("steps",)))
    assert jobs.parse({**MINIMAL, "aggregate": {"method": "new"}})


def test_kinds_that_it_cannot_take_are_refused_before_anybody_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unfit(pb.AggregateSpec(method="exact"), clients=2, kind=Dense, frozen_a=False) == ""
    monkeypatch.setitem(KINDS, "lora", dense)
    why = refused(monkeypatch, Method(exact, takes=LowRank))
    assert why == "new averages low-rank updates, and these are dense"
