"""An adapter as Flower's arrays: factors A and B of every module, in float32."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord

from converters.adapter import Adapter, LowRank


def record(adapter: Adapter) -> ArrayRecord:
    """NAME.a (r, in) and NAME.b (out, r); scaling is folded into B, which an average of factors does not notice."""
    return ArrayRecord(
        {
            f"{name}.{part}": Array(factor)
            for name, update in adapter.modules.items()
            for part, factor in (("a", update.a), ("b", update.b))
        }
    )


def adapter(arrays: ArrayRecord) -> Adapter:
    """The way back."""
    names = sorted({key.rpartition(".")[0] for key in arrays})
    return Adapter({name: LowRank(arrays[f"{name}.a"].numpy(), arrays[f"{name}.b"].numpy()) for name in names})
