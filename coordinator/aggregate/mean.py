"""Weighted means of low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from converters.adapter import LowRank
from converters.errors import LayoutMismatch


def exact(factors: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ exactly, without forming any ΔW: a (Σrᵢ, in), b (out, Σrᵢ). Ranks may differ.

    Source: FLoRA's stacking, arXiv 2409.05976.
    """
    return LowRank.sum(factors, weights)


def fedavg(factors: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Means of A and of B, each by itself: a (r, in), b (out, r). Not the mean of ΔW, and far from it unless all
    clients started from one A, as this product's do.

    Source: FedIT, arXiv 2305.05644.

    Raises:
        LayoutMismatch: the ranks differ.
    """
    if len({factor.rank for factor in factors}) > 1:
        raise LayoutMismatch("fedavg needs adapters of one rank", hint='use method = "exact", which takes any ranks')
    pairs = list(zip(factors, weights, strict=True))
    a = sum((np.float32(weight) * factor.a for factor, weight in pairs), np.zeros_like(factors[0].a))
    b = sum((np.float32(weight) * factor.b for factor, weight in pairs), np.zeros_like(factors[0].b))
    return LowRank(a, b)
