"""An adapter that is looked at as it is written: every factor is held to be finite, and counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converters.adapter import WIRE_DTYPES, Adapter, Factor, LazyUpdates, LowRank
from oneround.errors import BadAdapter

_LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
assert _LARGEST.keys() == WIRE_DTYPES.keys()


def watched(update: Adapter, dtype: str, on_factor: Callable[[], None]) -> Adapter:
    """The same adapter; whoever takes a factor of it, to write it in `dtype`, calls `on_factor`.

    Raises, when a factor is taken:
        BadAdapter: it holds NaN or Inf, or more than `dtype` can hold, once the scaling is in B.
    """
    largest = _LARGEST[dtype]

    def look(factor: Factor, factor_name: str) -> None:
        if not np.isfinite(factor).all():
            raise BadAdapter(f"{factor_name} holds NaN or Inf; such an adapter is of no use")
        if (most := float(np.abs(factor).max())) > largest:
            raise BadAdapter(
                f"{factor_name} holds {most:.4g}, and {dtype} nothing beyond {largest:.4g}", hint="--dtype bfloat16"
            )
        on_factor()

    return Adapter(
        LazyUpdates(update.modules, lambda name: _Watched(name, update.modules[name], look)), update.metadata
    )


class _Watched(LowRank):
    """One module's update, looked at when its factors are taken."""

    def __init__(self, name: str, update: LowRank, look: Callable[[Factor, str], None]) -> None:
        self.terms = update.terms
        self._name, self._look = name, look

    # Taking a factor lets go of those before it, whose mapped pages would count as ours.
    @property
    def a(self) -> Factor:
        self.forget()
        with np.errstate(all="ignore"):
            factor = super().a
        self._look(factor, f"{self._name}: factor A")
        return factor

    @property
    def b(self) -> Factor:
        self.forget()
        with np.errstate(all="ignore"):  # scaling can go beyond float32; what comes of it is looked at
            factor = super().b
        self._look(factor, f"{self._name}: factor B")
        return factor
