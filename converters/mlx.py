"""mlx-lm's LoRA folders: `adapters.safetensors` and `adapter_config.json`.

A linear layer has `NAME.lora_a` (in, r) and `NAME.lora_b` (r, out), and ΔW is scale · (lora_a @ lora_b)ᵀ. The scale is
20.0 when the settings say nothing, and there is one rank and one scale for the whole adapter.

Source: mlx-lm 0.32, tuner/utils.py (linear_to_lora_layers, load_adapters) and tuner/lora.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from converters import settings, tensors
from converters.adapter import Adapter, Factor, LowRank, pair
from converters.architectures import Base, check_fits, within_block
from converters.errors import BadAdapter

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"
_A, _B = ".lora_a", ".lora_b"
_FLOAT32 = np.dtype(np.float32)
_SCALE = 20.0  # mlx-lm's default


def read(folder: Path) -> Adapter:
    """Read an mlx-lm adapter, with its scale folded into B.

    Raises:
        BadAdapter: files missing or not sound, or something that the common layout cannot hold, by name.
    """
    config = settings.read(folder / _CONFIG, BadAdapter)
    if (kind := config.text("fine_tune_type", "lora")) != "lora":
        raise config.bad(f"fine_tune_type is {kind}; only lora can be converted")
    scale = config.table("lora_parameters").number("scale", _SCALE, positive=False)
    found, _ = tensors.read(folder / _WEIGHTS)
    a: dict[str, tensors.Array] = {}
    b: dict[str, tensors.Array] = {}
    for name, tensor in found.items():
        if name.endswith(_A) and tensor.ndim == 2:
            a[name.removesuffix(_A)] = tensor.T
        elif name.endswith(_B) and tensor.ndim == 2:
            b[name.removesuffix(_B)] = tensor.T
        else:
            shown = f"{name} {tensor.shape}"
            why = "is not a LoRA factor of a linear layer, and cannot be converted"
            raise BadAdapter(f"{folder / _WEIGHTS}: the tensor {shown} {why}")
    factors = pair(a, b, folder / _WEIGHTS)
    return Adapter({name: LowRank(a, b, scale) for name, (a, b) in factors.items()})


def write(adapter: Adapter, folder: Path, base: Base) -> None:
    """Write a folder that `mlx_lm.load(model, adapter_path=folder)` takes: float32, scale 1, all layers.

    mlx-lm has one rank for all modules and adapts the same modules in every block, so lower ranks are padded with
    zeros, and blocks that lack a module get zeros for it. Neither changes ΔW.

    Raises:
        LayoutMismatch: the adapter is not for this base.
    """
    shapes = adapter.shapes
    check_fits(base, shapes)
    rank = max(adapter.ranks.values())
    keys = sorted({within_block(base, name)[1] for name in shapes})
    found: dict[str, tensors.Later] = {}
    for name, (out, into) in base.linears.items():
        if within_block(base, name)[1] in keys:
            update = adapter.modules.get(name)
            found[name + _A] = tensors.Later(_FLOAT32, (into, rank), partial(_lora_a, update, into, rank))
            found[name + _B] = tensors.Later(_FLOAT32, (rank, out), partial(_lora_b, update, out, rank))
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors.write(folder / _WEIGHTS, found, {"format": "mlx"})
    tensors.replace(folder / _CONFIG, [json.dumps(config, indent=2).encode()])


def _lora_a(update: LowRank | None, into: int, rank: int) -> Factor:
    padded = np.zeros((into, rank), np.float32)
    if update is not None:
        padded[:, : update.rank] = update.a.T
    return padded


def _lora_b(update: LowRank | None, out: int, rank: int) -> Factor:
    padded = np.zeros((rank, out), np.float32)
    if update is not None:
        padded[: update.rank] = update.b.T
    return padded
