"""The best adapter of a smaller rank."""

from __future__ import annotations

import numpy as np

from converters.adapter import LowRank


def truncate(factors: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The best rank-`rank` approximation of ΔW = b @ a, with the energy ‖·‖² that it keeps and the energy there was.

    QR of both factors, then an SVD of the small core: O((out + in) r² + r³), never out × in.
    The singular values are shared evenly between the factors.
    Source: FlexLoRA, arXiv 2402.11505.
    """
    q_b, r_b = np.linalg.qr(factors.b.astype(np.float64))  # (out, k), (k, r)
    q_a, r_a = np.linalg.qr(factors.a.astype(np.float64).T)  # (in, k'), (k', r)
    left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(values[:rank])
    b = (q_b @ left[:, :rank]) * root
    a = root[:, None] * (right[:rank] @ q_a.T)
    energy = values**2
    return LowRank(a.astype(np.float32), b.astype(np.float32)), float(energy[:rank].sum()), float(energy.sum())
