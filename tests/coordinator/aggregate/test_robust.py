"""Robust methods against minorities that flip signs, scale, send noise, or agree among themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from converters.adapter import Adapter, LowRank
from coordinator.admission.outliers import Member, judge
from coordinator.aggregate import METHODS, ClientUpdate, aggregate
from oneround.v1 import federation_pb2 as pb
from tests.coordinator.cohorts import dense, honest

Attack = Callable[[list[Adapter], np.random.Generator, int], list[Adapter]]
K, BAD = 15, 4
ROBUST = ("krum", "geometric-median", "trimmed-mean", "median")


def updates(seed: int) -> list[Adapter]:
    """Honest clients' adapters over one frozen A; pairwise cosines are about 0.4."""
    members = honest(seed, K, spread=1.5)
    a = {name: one.a for name, one in members[0].adapter.modules.items()}
    return [
        Adapter({name: LowRank(a[name], one.b) for name, one in member.adapter.modules.items()}) for member in members
    ]


def changed(update: Adapter, change: Callable[[np.ndarray], np.ndarray]) -> Adapter:
    return Adapter({name: LowRank(o.a, change(o.b).astype(np.float32)) for name, o in update.modules.items()})


def mean(given: list[Adapter]) -> Adapter:
    """The mean over one A."""
    names = given[0].modules
    b = {name: np.mean([one.modules[name].b for one in given], axis=0) for name in names}
    return Adapter({name: LowRank(one.a, b[name]) for name, one in names.items()})


ATTACKS: dict[str, Attack] = {
    "sign-flip": lambda good, rng, n: [changed(one, lambda b: -b) for one in good[:n]],
    "scaled": lambda good, rng, n: [changed(one, lambda b: -100 * b) for one in good[:n]],
    "random": lambda good, rng, n: [
        changed(one, lambda b: 10 * b.std() * rng.standard_normal(b.shape)) for one in good[:n]
    ],
    "colluding": lambda good, rng, n: [changed(mean(good), lambda b: -2 * b)] * n,
}


def error(found: Adapter, right: np.ndarray) -> float:
    """‖ΔW − honest mean‖ / ‖honest mean‖: 0 is right, and 1 is what publishing nothing would have."""
    return float(np.linalg.norm(dense(found) - right) / np.linalg.norm(right))


def attacked(attack: str, seed: int, n_bad: int = BAD) -> tuple[list[ClientUpdate], np.ndarray]:
    """A cohort of which the first are bad, declare a hundred times the examples, and the honest ones' mean."""
    good = updates(seed)
    bad = ATTACKS[attack](good, np.random.default_rng((seed, 1)), n_bad)
    sent = [ClientUpdate(one, 10_000) for one in bad] + [ClientUpdate(one, 100) for one in good[n_bad:]]
    return sent, np.mean([dense(one) for one in good[n_bad:]], axis=0)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("method", ROBUST)
def test_a_minority_does_not_move_a_robust_method_far(method: str, attack: str) -> None:
    for seed in range(3):
        sent, right = attacked(attack, seed)
        spec = pb.AggregateSpec(method=method)
        if "byzantine_clients" in METHODS[method].parameters:
            spec.byzantine_clients = BAD
        assert error(aggregate(sent, spec).adapter, right) < 0.65, f"seed {seed}"
        assert error(aggregate(sent, "exact").adapter, right) > 1.5, "the attack has to be one"


@pytest.mark.parametrize("attack", ATTACKS)
def test_clipping_bounds_what_one_client_does(attack: str) -> None:
    sent, right = attacked(attack, 0, n_bad=1)
    assert error(aggregate(sent, "norm-clip").adapter, right) < 0.4


def test_krum_leaves_out_those_that_it_should() -> None:
    for attack in ATTACKS:
        sent, _ = attacked(attack, 1)
        weights = aggregate(sent, pb.AggregateSpec(method="krum", byzantine_clients=BAD)).weights
        assert not any(weights[:BAD]), attack


@pytest.mark.parametrize("method", ROBUST)
def test_a_majority_breaks_any_of_them(method: str) -> None:
    """The breaking point is where it should be, and not somewhere below it that the other tests do not reach."""
    sent, right = attacked("colluding", 2, n_bad=9)
    assert error(aggregate(sent, method).adapter, right) > 1


def test_what_admission_lets_through_a_robust_method_still_holds_against() -> None:
    """Bad ones of about the usual size, at about a right angle to the others."""
    sent, right = attacked("random", 3)
    shrunk = [
        ClientUpdate(changed(one.adapter, lambda b: b / 10) if n < BAD else one.adapter, 100)
        for n, one in enumerate(sent)
    ]
    members = [Member(str(n), str(n), one.adapter, one.num_examples) for n, one in enumerate(shrunk)]
    assert {finding.verdict for finding in judge(members, pb.AdmissionSpec(min_cosine=-0.3))} == {"admitted"}
    krum = aggregate(shrunk, pb.AggregateSpec(method="krum", byzantine_clients=BAD))
    assert not any(krum.weights[:BAD])
    assert error(krum.adapter, right) < error(aggregate(shrunk, "exact").adapter, right)
