"""Whether an adapter's file or folder holds the aggregated update: read again with the converters' reader, and held
against it factor by factor.

That proves that every module's factors are on the disk as they were meant. It does not prove that PEFT, mlx-lm or
llama.cpp compute the same from them: the reader and the writer are both ours, and a misunderstanding that they share
would not show. What those programs make of such files is held in tests/converters; what llama.cpp makes of
`adapter.gguf`, by every float file that is verified against base + adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from converters.adapter import Adapter, Factor, LowRank
from oneround.errors import BadModel
from oneround.manifest import ReadBack

BOUND = 1e-6  # ‖difference‖ / ‖factor‖; formats hold the factors in float32, so that nothing is rounded


def compare(written: Adapter, update: Adapter) -> ReadBack:
    """Hold what was read against the update, one module's factors in memory at a time.

    A format may hold more modules and higher ranks than the update, where these are zero.

    Raises:
        BadModel: a module is missing, is adapted that should not be, or is of another shape or rank.
    """
    if missing := sorted(update.modules.keys() - written.modules.keys()):
        raise BadModel(f"{missing[0]} is missing")
    differences = [_difference(name, written.modules[name], update.modules[name]) for name in update.modules]
    _check_zero({name: written.modules[name] for name in written.modules.keys() - update.modules.keys()})
    largest = float(np.max(differences))  # NaN where any is
    return ReadBack(modules=len(differences), largest_difference=largest, bound=BOUND, passed=bool(largest <= BOUND))


def _difference(name: str, written: LowRank, update: LowRank) -> float:
    """The larger of the two factors' differences."""
    if written.shape != update.shape or written.rank < (rank := update.rank):
        raise BadModel(
            f"{name} is {tuple(written.shape)} of rank {written.rank}, and should be {tuple(update.shape)} of rank"
            f" {update.rank}"
        )
    a, b = written.a, written.b
    if a[rank:].any() and b[:, rank:].any():
        raise BadModel(f"{name} has more than rank {rank}")
    difference = max(_relative(a[:rank], update.a), _relative(b[:, :rank], update.b), key=_or_nan)
    written.forget()
    update.forget()
    return difference


def _relative(actual: Factor, expected: Factor) -> float:
    """‖actual − expected‖ / ‖expected‖; 0.0 for two zeros."""
    if np.array_equal(actual, expected):
        return 0.0
    length = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / length if length else float("inf")


def _or_nan(difference: float) -> float:
    """NaN is larger than anything."""
    return float("inf") if np.isnan(difference) else difference


def _check_zero(others: Mapping[str, LowRank]) -> None:
    for name, other in sorted(others.items()):
        if other.a.any() and other.b.any():
            raise BadModel(f"{name} is adapted, and should not be")
        other.forget()
