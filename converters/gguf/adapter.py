"""LoRA adapters as GGUF files, which llama.cpp applies when it loads a model (`--lora`).

Tensors are `blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), and for the experts of a layer
`blk.N.ffn_up_exps.weight.lora_a` (E, r, in) and `.lora_b` (E, out, r). There is no `adapter.lora.alpha`: llama.cpp
then scales by 1, and the scaling is in B; with the key it would divide by each tensor's own rank.

Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import gguf
import numpy as np

from converters import experts, tensors
from converters.adapter import Adapter, Factor, LazyUpdates, LowRank, pair
from converters.architectures import Base, check_fits, checkpoint_names, gguf_name, interleave, row_order
from converters.gguf import file as gguf_file
from converters.gguf import write as gguf_write
from converters.gguf.types import FLOATS
from oneround.errors import BadAdapter

_A, _B = ".lora_a", ".lora_b"
_ARCHITECTURE = gguf.Keys.General.ARCHITECTURE
_CONVERTED_KEYS = {
    gguf.Keys.Adapter.TYPE,
    gguf.Keys.Adapter.LORA_ALPHA,
    "adapter.lora.task_name",
    "adapter.lora.prompt_prefix",
}
_VOCABULARY = ("token_embd.", "output.")
_EXPERTS = "_exps.weight"


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
    for stack, modules in experts.from_gguf(base).items():
        names.update((_of_expert(stack, number), module) for number, module in enumerate(modules))
    if unknown := sorted(stored.modules.keys() - names.keys()):
        raise BadAdapter(f"{path}: the tensor {unknown[0]}{_A} is no factor for {base.name}, and cannot be converted")
    weights = {names[weight]: weight for weight in stored.modules}

    def update(module: str) -> LowRank:
        (term,), order = stored.modules[weights[module]].terms, row_order(base, module)
        return LowRank(term.a, term.b if order is None else term.b[np.argsort(order)], term.weight)

    shapes = {module: stored.modules[weight].shape for module, weight in weights.items()}
    check_fits(base, {module: shape for module, shape in shapes.items() if not experts.is_expert(module)})
    return Adapter(LazyUpdates(weights, update))


def read_as_named(path: Path) -> tuple[str, Adapter]:
    """The architecture, and updates by their weights' names in GGUF, rows in llama.cpp's order.

    llama.cpp scales by alpha/rank where the file has an alpha, each tensor by its own rank, and by 1 where it has none.

    Raises:
        BadModel: not a sound GGUF file.
        BadAdapter: not a LoRA adapter, or with tensors that cannot be converted, by name.
    """
    source = gguf_file.read(path)
    for key, expected in (("general.type", "adapter"), (gguf.Keys.Adapter.TYPE, "lora")):
        if (value := source.value(key)) != expected:
            raise BadAdapter(f"{path} has {key} = {value!r}; expected {expected!r}")
    for key in source.keys:
        if key.startswith("adapter.") and key not in _CONVERTED_KEYS:
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
        weight, values = name.removesuffix(suffix), _view(path, tensor)
        if values.ndim == 3 and weight.endswith(_EXPERTS):
            halves[suffix].update((_of_expert(weight, number), factor) for number, factor in enumerate(values))
        else:
            halves[suffix][weight] = values
    factors = pair(halves[_A], halves[_B], path)
    # To llama.cpp an alpha of 0 is none.
    updates = {name: LowRank(a, b, alpha / a.shape[0] if alpha else 1.0) for name, (a, b) in factors.items()}
    return str(source.value(_ARCHITECTURE)), Adapter(updates)


def _of_expert(weight: str, number: int) -> str:
    """A name for one expert's part of a tensor: `blk.0.experts.3.ffn_up_exps.weight`."""
    block, _, rest = weight.removesuffix(".weight").rpartition(".")
    return f"{block}.experts.{number}.{rest}.weight"


def _view(path: Path, tensor: gguf_file.Tensor) -> tensors.Array:
    if (values := floats(tensor)) is None:
        raise BadAdapter(f"{path}: the tensor {tensor.info.name} is {tensor.info.type.name}, not floats")
    return values


def floats(tensor: gguf_file.Tensor) -> tensors.Array | None:
    """A tensor's values as they lie in the file, (r, in) or (out, r); None when they are quantised or whole numbers."""
    for float_type in FLOATS.values():
        if float_type.type == tensor.info.type:
            return tensor.data.view(float_type.dtype).reshape(tensor.info.shape)
    return None


def write(adapter: Adapter, path: Path, base: Base) -> None:
    """Write an adapter for a base GGUF of the same model, in float32.

    llama.cpp has one tensor for all experts of a layer, and so one rank: lower ones are filled up with zeros.

    Raises:
        LayoutMismatch: the adapter is not for this base.
        BadModel: GGUF has no name for a module.
    """
    shapes = {name: shape for name, shape in adapter.shapes.items() if not experts.is_expert(name)}
    check_fits(base, shapes)
    writer = gguf.GGUFWriter(None, base.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks, infos = adapter.ranks, []
    for name, (out, into) in shapes.items():
        infos += _infos(gguf_name(base, f"{name}.weight"), (), out, into, ranks[name])
    stacks = [
        (stack, max(update.rank for update in stack.updates if update)) for stack in experts.stacks(adapter, base)
    ]
    for stack, rank in stacks:
        infos += _infos(experts.in_gguf(base, stack), (len(stack.updates),), *stack.shape, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_write.write(path, gguf_write.keys_of(writer), infos, _factors(adapter, shapes, stacks, base))


def _infos(weight: str, outer: tuple[int, ...], out: int, into: int, rank: int) -> list[gguf_file.Info]:
    kind = gguf.GGMLQuantizationType.F32
    return [
        gguf_file.Info(f"{weight}{_A}", (*outer, rank, into), kind),
        gguf_file.Info(f"{weight}{_B}", (*outer, out, rank), kind),
    ]


def _factors(
    adapter: Adapter, linears: Iterable[str], stacks: Iterable[tuple[experts.Stack, int]], base: Base
) -> Iterator[Factor]:
    for name in linears:
        factors = adapter.modules[name]
        yield factors.a
        yield interleave(base, name, factors.b)
    for stack, rank in stacks:
        yield stack.a(rank)
        yield stack.b(rank)
