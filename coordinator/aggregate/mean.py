"""Weighted means of updates. Weights are the clients' shares of all examples; K clients of rank rᵢ."""

from __future__ import annotations

import numpy as np

from converters.updates.low_rank import LowRank
from converters.updates.update import ModuleUpdate
from coordinator.aggregate.method import Cohort, Outcome, Weights


def exact(cohort: Cohort) -> Outcome:
    """Σ pᵢ ΔWᵢ exactly, without forming any ΔW: a (Σrᵢ, in), b (out, Σrᵢ). Ranks may differ.

    Cost: none; the clients' tensors are named with their weights, and read when something is written.
    Source: FLoRA's stacking, arXiv 2409.05976.
    """
    return weighted(cohort, cohort.by_examples)


def weighted(cohort: Cohort, weights: Weights) -> Outcome:
    """Σ wᵢ ΔWᵢ exactly, for any weights (K,); who has none takes no room. With a start, ΔW₀ + Σ wᵢ (ΔWᵢ − ΔW₀): where
    weights add up to 1, the start cancels."""
    counting = np.flatnonzero(weights)

    def update(module: str) -> ModuleUpdate:
        updates = cohort.of(module)
        total = updates[0].sum([updates[i] for i in counting], weights[counting].tolist())
        if cohort.start is None:
            return total
        return total.plus(cohort.start.modules[module], 1.0 - float(weights.sum()))

    return Outcome(weights, update)


def task_arithmetic(cohort: Cohort) -> Outcome:
    """λ Σ pᵢ ΔWᵢ, where λ is the server learning rate: `exact` under the name that merging has for it. Shapes and cost
    are those of `exact`. Source: arXiv 2212.04089, whose λ multiplies the sum of K task vectors and so is λ / K here;
    for one-shot federated learning arXiv 2411.18607.
    """
    return exact(cohort)


def svd(cohort: Cohort) -> Outcome:
    """The best approximation of Σ pᵢ ΔWᵢ of the clients' own rank r = max rᵢ: a (r, in), b (out, r).

    Cost: O((out + in)(Σr)² + (Σr)³) a module, never out × in (converters/updates/truncate.py). Source: FlexLoRA,
    arXiv 2402.11505.
    """
    weights = cohort.by_examples
    return Outcome(weights, exact(cohort).update, lambda module: max(update.rank for update in cohort.of(module)))


def fedavg(cohort: Cohort) -> Outcome:
    """Means of A and of B, each by itself: a (r, in), b (out, r). Not the mean of ΔW, and far from it unless all
    clients started from one A, as this product's do. One rank for all.

    Cost: O(K r (out + in)) a module, in the memory of one client's. Source: FedIT, arXiv 2305.05644.
    """
    weights = cohort.by_examples

    def update(module: str) -> ModuleUpdate:
        updates = cohort.of(module)
        return updates[0].by_tensor(updates, weights.tolist())

    return Outcome(weights, update)


def ffa(cohort: Cohort) -> Outcome:
    """A as it is in all of them, and the mean of B: a (r, in), b (out, r). The mean of ΔW exactly, since Σ pᵢBᵢA =
    (Σ pᵢBᵢ)A, and linear in what clients send. A has to be frozen.

    Cost: O(K r out) a module, in the memory of one client's. Source: FFA-LoRA, arXiv 2403.12313.
    """
    weights = cohort.by_examples

    def update(module: str) -> LowRank:
        factors = cohort.factors(module)
        return factors[0].with_mean_b(factors, weights.tolist())

    return Outcome(weights, update)


def fedex(cohort: Cohort) -> Outcome:
    """`fedavg`, and beside it what it misses: B̄Ā + (Σ pᵢBᵢAᵢ − B̄Ā). The mean of ΔW exactly; a (Σr + 2r, in), b
    (out, Σr + 2r), of which the first r are fedavg's adapter and the others the residual, which the paper adds to the
    base. One rank for all.

    Cost: fedavg's. Source: FedEx-LoRA, arXiv 2410.09432.
    """
    weights = cohort.by_examples

    def update(module: str) -> ModuleUpdate:
        updates = cohort.of(module)
        mean = updates[0].by_tensor(updates, weights.tolist())
        return mean.sum([mean, *updates, mean], [1.0, *weights.tolist(), -1.0])

    return Outcome(weights, update)
