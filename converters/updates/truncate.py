"""The best two factors of a smaller rank, of two factors or of a dense matrix. Plain arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.updates.update import Factor

_SPARE, _POWERS = 16, 4  # directions beside those that are wanted, and passes, of subspace iteration


class Factors(NamedTuple):
    """a (rank, in) and b (out, rank), and the energy ‖ΔW‖² that they have of what there was."""

    a: Factor
    b: Factor
    kept: float
    whole: float


def of_factors(a: Factor, b: Factor, rank: int) -> Factors:
    """The best rank-`rank` approximation of b @ a, for b (out, r) and a (r, in). The singular values are shared evenly.

    QR of both factors, then an SVD of the small core: O((out + in) r² + r³), never out × in.
    Source: FlexLoRA, arXiv 2402.11505.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))  # (out, r), (r, r)
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)  # (in, r), (r, r)
    left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _cut(q_b @ left[:, :rank], values, right[:rank] @ q_a.T, rank, float(np.square(values).sum()))


def of_dense(dense: Factor, rank: int) -> Factors:
    """The best rank-`rank` approximation of ΔW (out, in).

    Where the rank is far below out and in, by subspace iteration with a fixed seed: O(rank out in), and never more
    energy than the best has, which it came within 1 % of on flat spectra. Else by SVD. Source: arXiv 0909.4061.
    """
    whole = float(np.square(dense, dtype=np.float64).sum())
    if 4 * (rank + _SPARE) > min(dense.shape):
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        return _cut(left[:, :rank], values, right[:rank], rank, whole)
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((dense.shape[1], rank + _SPARE), np.float32)  # (in, k)
    for _ in range(_POWERS):
        left = np.linalg.qr(dense @ basis)[0]  # (out, k)
        basis = np.linalg.qr(dense.T @ left)[0]  # (in, k)
    core, values, right = np.linalg.svd(dense @ basis, full_matrices=False)
    return _cut(core[:, :rank], values, right[:rank] @ basis.T, rank, whole)


def _cut(
    left: NDArray[np.floating], values: NDArray[np.floating], right: NDArray[np.floating], rank: int, whole: float
) -> Factors:
    """From singular vectors (out, rank) and (rank, in), and all singular values that are known."""
    root = np.sqrt(values[:rank])
    b, a = left * root, root[:, None] * right
    kept = float(np.square(values[:rank], dtype=np.float64).sum())
    return Factors(a.astype(np.float32), b.astype(np.float32), kept, whole)
