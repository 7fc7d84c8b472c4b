"""LoRA adapters as GGUF files, which llama.cpp applies when it loads a model (`--lora`).

Tensors are `blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r). There is no `adapter.lora.alpha`: llama.cpp
then scales by 1, and the scaling is in B; with the key it would divide by each tensor's own rank.

Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from converters import gguf_file, tensors
from converters.adapter import Adapter, Factor, LowRank, Made, pair
from converters.architectures import Base, check_fits, checkpoint_names, gguf_name, interleave, row_order
from converters.errors import BadAdapter

_A, _B = ".lora_a", ".lora_b"
_ARCHITECTURE = gguf.Keys.General.ARCHITECTURE
_KNOWN = {gguf.Keys.Adapter.TYPE, gguf.Keys.Adapter.LORA_ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix"}
_VOCABULARY = ("token_embd.", "output.")


def read(path: Path, base: Base) -> Adapter:
    """Read a GGUF adapter for a base model, with its scaling folded into B; factors stay on disk until they are used.

    Raises:
        BadModel: not a sound GGUF file.
        BadAdapter: not a LoRA adapter, for another architecture, or with tensors that cannot be converted, by name.
        LayoutMismatch: it does not fit the base.
    """
    arch, stored = read_as_named(path)
    if arch != base.arch:
        raise BadAdapter(f"{path} has {_ARCHITECTURE} = {arch!r}; expected {base.arch!r}, as the base is")
    names = checkpoint_names(base)
    if unknown := sorted(stored.modules.keys() - names.keys()):
        raise BadAdapter(f"{path}: the tensor {unknown[0]}{_A} is no factor for {base.name}, and cannot be converted")
    weights = {names[weight]: weight for weight in stored.modules}

    def update(module: str) -> LowRank:
        (term,), order = stored.modules[weights[module]].terms, row_order(base, module)
        return LowRank(term.a, term.b if order is None else term.b[np.argsort(order)], term.weight)

    check_fits(base, {module: stored.modules[weight].shape for module, weight in weights.items()})
    return Adapter(Made(weights, update))


def read_as_named(path: Path) -> tuple[str, Adapter]:
    """The architecture, and updates by their weights' names in GGUF, rows in llama.cpp's order.

    llama.cpp scales by alpha/rank where the file has an alpha, each tensor by its own rank, and by 1 where it has none.

    Raises:
        BadModel: not a sound GGUF file.
        BadAdapter: not a LoRA adapter, or with tensors that cannot be converted, by name.
    """
    source = gguf_file.read(path)
    for key, expected in (("general.type", "adapter"), (gguf.Keys.Adapter.TYPE, "lora")):
        if (found := source.value(key)) != expected:
            raise BadAdapter(f"{path} has {key} = {found!r}; expected {expected!r}")
    for key in source.keys:
        if key.startswith("adapter.") and key not in _KNOWN:
            raise BadAdapter(f"{path} has {key}, which may change what the adapter computes, and cannot be converted")
    alpha = source.value(gguf.Keys.Adapter.LORA_ALPHA)
    if alpha is not None and not (isinstance(alpha, float) and math.isfinite(alpha)):
        raise BadAdapter(f"{path} has {gguf.Keys.Adapter.LORA_ALPHA} = {alpha!r}; expected a number")

    halves: dict[str, dict[str, tensors.Array]] = {_A: {}, _B: {}}
    for name, tensor in source.tensors.items():
        suffix = next((end for end in halves if name.endswith(end)), "")
        if not suffix or name.startswith(_VOCABULARY):
            why = "LoRA on an embedding or output layer" if suffix else "no factor of a LoRA adapter"
            raise BadAdapter(f"{path}: the tensor {name} is {why}, which cannot be converted")
        halves[suffix][name.removesuffix(suffix)] = _view(path, tensor)
    factors = pair(halves[_A], halves[_B], path)
    # To llama.cpp an alpha of 0 is none.
    updates = {name: LowRank(a, b, alpha / a.shape[0] if alpha else 1.0) for name, (a, b) in factors.items()}
    return str(source.value(_ARCHITECTURE)), Adapter(updates)


def _view(path: Path, tensor: gguf_file.Tensor) -> tensors.Array:
    for known in gguf_file.FLOATS.values():
        if known.type == tensor.info.type:
            return tensor.data.view(known.dtype).reshape(tensor.info.shape)
    raise BadAdapter(f"{path}: the tensor {tensor.info.name} is {tensor.info.type.name}, not floats")


def write(adapter: Adapter, path: Path, base: Base) -> None:
    """Write an adapter for a base GGUF of the same model, in float32.

    Raises:
        LayoutMismatch: the adapter is not for this base.
    """
    shapes = adapter.shapes
    check_fits(base, shapes)
    writer = gguf.GGUFWriter(None, base.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    infos = []
    for name, rank in adapter.ranks.items():
        weight, (out, into) = gguf_name(base, f"{name}.weight"), shapes[name]
        infos.append(gguf_file.Info(f"{weight}{_A}", (rank, into), gguf.GGMLQuantizationType.F32))
        infos.append(gguf_file.Info(f"{weight}{_B}", (out, rank), gguf.GGMLQuantizationType.F32))
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_file.write(path, gguf_file.keys_of(writer), infos, _factors(adapter, base))


def _factors(adapter: Adapter, base: Base) -> Iterator[Factor]:
    for name, factors in adapter.modules.items():
        yield factors.a
        yield interleave(base, name, factors.b)
