"""Methods that hold against some bad clients by how much they let each whole contribution count.

They choose by ‖ΔW‖ and by distances over all modules together, from inner products that form no ΔW (gram.inner), and
give the sum with these weights, as `exact` does: low-rank updates stacked, a (Σrᵢ, in), b (out, Σrᵢ), any ranks. All
clients have the same say, since num_examples is only declared. All pairs of clients are compared: a hundred adapters of
rank 16 for a model of 1.1B parameters take minutes, a thousand hours. Distances are the same with a start in both
updates as without it in either.
"""

from __future__ import annotations

import numpy as np

from coordinator.aggregate import gram
from coordinator.aggregate.mean import weighted
from coordinator.aggregate.method import Cohort, Outcome, Weights
from oneround.v1 import federation_pb2 as pb

_ROUNDS = 1000  # of Weiszfeld; it converges linearly, and a round is K²
_CLOSE = 1e-6  # distances below this share of the mean one count as this, as in the smoothed algorithm
_STILL = 1e-9  # change of the weights at which it ends


def norm_clip(cohort: Cohort) -> Outcome:
    """The mean, each client's ΔW scaled down to at most `norm_bound` times the cohort's median ‖ΔW‖ over all modules.

    Where the round began with a start, ΔW is what was changed of it. Bounds what one client can do, by 1/K of that;
    does not undo it: the error grows with the share of bad clients.
    Cost: O(Σ rᵢ² (out + in)) a module. Source: arXiv 1911.07963, with a bound that follows the median instead of a
    fixed one.
    """
    norms = np.sqrt(np.square(gram.norms(cohort.changed)).sum(1))  # (K,)
    bound = cohort.how.norm_bound * np.median(norms)
    return weighted(cohort, cohort.alike * np.minimum(1.0, bound / np.maximum(norms, np.finfo(np.float64).tiny)))


def krum(cohort: Cohort) -> Outcome:
    """The mean of the `krum_keep` contributions that lie closest to others; all the others count nothing.

    With f = `byzantine_clients`, a contribution's score is the sum of its squared distances to its K − f − 2 nearest.
    `krum_keep` 1 is Krum; 0 is K − f − 2 (Multi-Krum). Holds against f of K ≥ 2f + 3. A single honest update that is
    unlike the others is left out as a bad one would be.
    Cost: O((Σr)² (out + in)) a module, and K² floats. Source: arXiv 1703.02757.
    """
    chosen = len(cohort.updates) - cohort.how.byzantine_clients - 2
    near = np.sort(_squared_distances(gram.products(cohort.updates)), axis=1)[:, 1 : chosen + 1]  # less its own
    best = np.argsort(near.sum(1), kind="stable")[: cohort.how.krum_keep or chosen]
    weights = np.zeros(len(cohort.updates))
    weights[best] = 1 / len(best)
    return weighted(cohort, weights)


def krum_needs(how: pb.AggregateSpec) -> int:
    """Contributions without which Krum's guarantee means nothing: 2f + 3, and as many as are kept."""
    return max(2 * how.byzantine_clients + 3, how.krum_keep + how.byzantine_clients + 2)


def geometric_median(cohort: Cohort) -> Outcome:
    """The point with the least sum of distances ‖ΔW − ΔWᵢ‖ over all modules together: a mean with weights ∝ 1/distance.

    Holds against fewer than half, whatever they send. By the smoothed Weiszfeld algorithm on inner products alone.
    Cost: O((Σr)² (out + in)) a module, and K² a round of at most a thousand. Source: RFA, arXiv 1912.13445.
    """
    products = gram.products(cohort.updates)
    return weighted(cohort, weiszfeld(products, cohort.alike))


def weiszfeld(products: Weights, start: Weights) -> Weights:
    """Weights (K,) of the geometric median of K points, from their inner products (K, K)."""
    typical = float(np.sqrt(_squared_distances(products)).mean())
    if typical == 0:
        return start
    weights = start
    for _ in range(_ROUNDS):
        to_mean = np.diag(products) - 2 * products @ weights + weights @ products @ weights
        distances = np.sqrt(np.maximum(to_mean, 0.0))
        inverse = 1 / np.maximum(distances, _CLOSE * typical)
        before, weights = weights, inverse / inverse.sum()
        if np.abs(weights - before).max() < _STILL:
            break
    return weights


def _squared_distances(products: Weights) -> Weights:
    own = np.diag(products)
    return np.maximum(own[:, None] + own - 2 * products, 0.0)
