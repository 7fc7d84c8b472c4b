"""Of an adapter that is refused, what can be told all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from converters import tensors
from converters.adapter import WIRE_DTYPES, LowRank
from converters.formats import AdapterFile
from converters.gguf import adapter as gguf_adapter
from converters.gguf import file as gguf_file
from oneround.errors import BadData

_A, _B = (".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b")


def pairs(adapter_file: AdapterFile) -> tuple[dict[str, LowRank], list[str]]:
    """Updates by module without their scaling, and a line (name, type, shape) for every tensor that is part of none."""
    a: dict[str, tensors.Array] = {}
    b: dict[str, tensors.Array] = {}
    lines: list[tuple[str, str]] = []  # module, line
    for name, kind, shape, values in _all(adapter_file):
        suffix = next((end for end in (*_A, *_B) if name.endswith(end)), "")
        module = name.removesuffix(suffix).removeprefix("base_model.model.")
        lines.append((module if suffix else "", f"{name}  {kind} {shape}"))
        if suffix and values is not None and values.ndim == 2 and 0 not in values.shape:
            (a if suffix in _A else b)[module] = values.T if adapter_file.format == "mlx" else values
    whole = {name: LowRank(a[name], b[name]) for name in a if name in b and a[name].shape[0] == b[name].shape[1]}
    return whole, [line for module, line in lines if module not in whole]


def _all(adapter_file: AdapterFile) -> Iterator[tuple[str, str, tuple[int, ...], tensors.Array | None]]:
    """Every tensor of whatever files can be opened: name, type, shape, and the values where they are floats."""
    with suppress(BadData):  # that is what is wrong with it
        if adapter_file.format == "gguf":
            for name, stored in gguf_file.read(adapter_file.path).tensors.items():
                yield name, stored.info.type.name, stored.info.shape, gguf_adapter.floats(stored)
    for file in sorted(adapter_file.path.glob("*.safetensors")) if adapter_file.path.is_dir() else [adapter_file.path]:
        with suppress(BadData):
            for name, tensor in tensors.read(file)[0].items():
                yield name, tensor.dtype.name, tensor.shape, tensor if tensor.dtype in WIRE_DTYPES.values() else None
