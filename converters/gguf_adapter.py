"""LoRA adapters as GGUF files, which llama.cpp applies when it loads a model (`--lora`).

Tensors are `blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r). There is no `adapter.lora.alpha`: llama.cpp
then scales by 1, and the scaling is in B; with the key it would divide by each tensor's own rank.

Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf

from converters import gguf_file
from converters.adapter import Adapter, Factor
from converters.architectures import Base, check_fits, gguf_name, interleave


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
        infos.append(gguf_file.Info(f"{weight}.lora_a", (rank, into), gguf.GGMLQuantizationType.F32))
        infos.append(gguf_file.Info(f"{weight}.lora_b", (out, rank), gguf.GGMLQuantizationType.F32))
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_file.write(path, gguf_file.keys_of(writer), infos, _factors(adapter, base))


def _factors(adapter: Adapter, base: Base) -> Iterator[Factor]:
    for name, factors in adapter.modules.items():
        yield factors.a
        yield interleave(base, name, factors.b)
