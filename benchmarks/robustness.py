"""How far bad clients move each aggregation method, and where it breaks.

    python benchmarks/robustness.py

Twenty clients over one frozen A; honest updates have a common part and one of their own (pairwise cosines of 0.4, norms
within a factor of 1.5). A share of them is bad, from none to 60 %, and does one of four things:

- sign-flip: sends its honest update with the opposite sign;
- scaled: the same, a hundred times as large;
- random: noise of ten times the usual size;
- colluding: all of them send one and the same update, the honest mean's opposite, twice as large.

Figures are ‖ΔW − honest mean‖ / ‖honest mean‖: 0 is right, and 1 is what publishing nothing would have. A method breaks
at the smallest share with a mean above 1, over seeds. `krum` and `trimmed-mean` assume six bad clients of twenty
throughout. `admission, exact` is what the coordinator does by default: it looks for outliers first, and then takes the
exact mean of what is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from converters.adapter import Adapter, LazyUpdates, LowRank, initial
from converters.architectures import Shape
from coordinator.admission.outliers import Member, judge
from coordinator.aggregate import METHODS, ClientUpdate, aggregate
from oneround.v1 import federation_pb2 as pb

SHAPES = {"q": Shape(96, 64), "v": Shape(48, 64), "down": Shape(64, 160)}
RANK, CLIENTS, ASSUMED = 8, 20, 6
ALIKE, SPREAD = 0.4, 1.5
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BY_DEFAULT = "admission, exact"
ARMS = ("exact", BY_DEFAULT, "norm-clip", "krum", "geometric-median", "trimmed-mean", "median")

Update = dict[str, NDArray[np.float64]]  # B by module; A is everybody's
Attack = Callable[[Sequence[Update], np.random.Generator, int], list[Update]]


def changed(update: Update, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Update:
    return {name: change(b) for name, b in update.items()}


def mean(updates: Sequence[Update]) -> Update:
    return {name: np.mean([one[name] for one in updates], axis=0) for name in SHAPES}


ATTACKS: dict[str, Attack] = {
    "sign-flip": lambda good, rng, n: [changed(one, lambda b: -b) for one in good[:n]],
    "scaled": lambda good, rng, n: [changed(one, lambda b: -100 * b) for one in good[:n]],
    "random": lambda good, rng, n: [
        changed(one, lambda b: 10 * b.std() * rng.standard_normal(b.shape)) for one in good[:n]
    ],
    "colluding": lambda good, rng, n: [changed(mean(good), lambda b: -2 * b)] * n,
}


def honest(rng: np.random.Generator, a: dict[str, NDArray[np.float32]]) -> list[Update]:
    common = {name: rng.standard_normal((shape.out, RANK)) for name, shape in SHAPES.items()}
    found = []
    for _ in range(CLIENTS):
        update = {}
        for name, shape in SHAPES.items():
            b = np.sqrt(ALIKE) * common[name] + np.sqrt(1 - ALIKE) * rng.standard_normal((shape.out, RANK))
            update[name] = b * SPREAD ** rng.uniform(0, 1) / np.linalg.norm(b @ a[name])
        found.append(update)
    return found


def by_default(sent: Sequence[Adapter]) -> Adapter | None:
    """The exact mean of what the cohort admits, as the publisher makes it; None where that is nobody."""
    members = [Member(f"{n:012x}", str(n), one, 100) for n, one in enumerate(sent)]
    taking = []
    for one, finding in zip(sent, judge(members, pb.AdmissionSpec()), strict=True):
        if finding.verdict != "quarantined":
            taking.append(ClientUpdate(scaled(one, finding.scale), 100))
    return aggregate(taking, "exact").adapter if taking else None


def scaled(update: Adapter, scale: object) -> Adapter:
    factors = dict(scale)  # type: ignore[call-overload]
    modules = update.modules
    return Adapter(LazyUpdates(modules, lambda name: LowRank.sum([modules[name]], [factors.get(name, 1.0)])))


def result(arm: str, sent: Sequence[Adapter]) -> Adapter | None:
    if arm == BY_DEFAULT:
        return by_default(sent)
    spec = pb.AggregateSpec(method=arm)
    if "byzantine_clients" in METHODS[arm].parameters:
        spec.byzantine_clients = ASSUMED
    return aggregate([ClientUpdate(one, 100) for one in sent], spec).adapter


def error(found: Adapter | None, right: Adapter) -> float:
    """Over all modules; 1.0 where nothing was published."""
    if found is None:
        return 1.0
    pairs = [(found.modules[name].delta(), right.modules[name].delta()) for name in SHAPES]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    a = {name: update.a for name, update in initial(SHAPES, RANK, seed=0).modules.items()}

    def adapter(update: Update) -> Adapter:
        return Adapter({name: LowRank(a[name], b.astype(np.float32)) for name, b in update.items()})

    began = time.perf_counter()
    errors: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    breaks: dict[str, dict[str, float | None]] = {}
    for arm in ARMS:
        errors[arm], breaks[arm] = {}, {}
        for attack, make in ATTACKS.items():
            at: dict[str, dict[str, float]] = {}
            for share in SHARES:
                n_bad = round(share * CLIENTS)
                runs = []
                for seed in range(seeds):
                    rng = np.random.default_rng(seed)
                    good = honest(rng, a)
                    sent = [adapter(one) for one in [*make(good, rng, n_bad), *good[n_bad:]]]
                    runs.append(error(result(arm, sent), adapter(mean(good[n_bad:]))))
                at[f"{share:.1f}"] = {"mean": round(float(np.mean(runs)), 4), "sd": round(float(np.std(runs)), 4)}
            errors[arm][attack] = at
            broken = [float(share) for share, found in at.items() if found["mean"] > 1]
            breaks[arm][attack] = min(broken, default=None)
        print(f"{arm:18}" + "".join(f"  {name} {breaks[arm][name] or '> 0.6'}" for name in ATTACKS), flush=True)
    document = {
        "clients": CLIENTS,
        "assumed_bad": ASSUMED,
        "seeds": seeds,
        "seconds": round(time.perf_counter() - began, 1),
        "breaks_at_share": breaks,
        "relative_error": errors,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
