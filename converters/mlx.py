"""mlx-lm's LoRA folders: `adapters.safetensors` and `adapter_config.json`.

A linear layer has `NAME.lora_a` (in, r) and `NAME.lora_b` (r, out), and ΔW is scale · (lora_a @ lora_b)ᵀ. A switch
layer of E experts is stored the other way round: `NAME.lora_a` (E, r, in), `NAME.lora_b` (E, out, r). The scale is 20.0
when the settings say nothing, and there is one rank and one scale for the whole adapter.

Source: mlx-lm 0.32, tuner/utils.py (linear_to_lora_layers, load_adapters) and tuner/lora.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from converters import experts, settings, tensors
from converters.adapter import Adapter, Factor, LowRank, pair
from converters.architectures import Base, check_fits, within_block
from oneround import files
from oneround.errors import BadAdapter

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"
_A, _B = ".lora_a", ".lora_b"
_FLOAT32 = np.dtype(np.float32)
_TENSORS = {
    ".m": "a DoRA magnitude",
    ".weight": "a weight of the base, of a full fine-tuning",
    ".bias": "a bias of the base",
    _A: "a factor of a layer that is neither linear nor a switch layer",
    _B: "a factor of a layer that is neither linear nor a switch layer",
}
_SCALE = 20.0  # mlx-lm's default


def read(folder: Path) -> Adapter:
    """Read an mlx-lm adapter, with its scale folded into B.

    Raises:
        BadAdapter: files missing or not sound, or something that the common layout cannot hold, by name.
    """
    config = settings.read(folder / _CONFIG, BadAdapter)
    if config.get("peft_type"):  # the two have one name for it; mlx-lm's default scale would be far off
        raise config.bad("these are the settings of a PEFT adapter, not of an mlx-lm one")
    if (kind := config.text("fine_tune_type", "lora")) != "lora":
        raise config.bad(f"fine_tune_type is {kind}; only lora can be converted")
    parameters = config.table("lora_parameters")
    scale = parameters.number("scale", _SCALE, positive=False)
    stored, _ = tensors.read(folder / _WEIGHTS)
    a: dict[str, tensors.Array] = {}
    b: dict[str, tensors.Array] = {}
    for name, tensor in stored.items():
        suffix = _A if name.endswith(_A) else _B if name.endswith(_B) else ""
        views = _views(name.removesuffix(suffix), tensor) if suffix else None
        if views is None:
            why = next((why for end, why in _TENSORS.items() if name.endswith(end)), "not a LoRA factor")
            raise BadAdapter(f"{folder / _WEIGHTS}: {name} {tensor.shape} is {why}, which cannot be converted")
        (a if suffix == _A else b).update(views)
    factors = pair(a, b, folder / _WEIGHTS)
    rank = parameters.integer("rank") if parameters.get("rank") is not None else None
    for name, (factor, _) in factors.items():
        if rank not in (None, factor.shape[0]):
            raise config.bad(f"{name} has rank {rank} by the settings, and {factor.shape[0]} in the file")
    return Adapter({name: LowRank(a, b, scale) for name, (a, b) in factors.items()})


def _views(module: str, tensor: tensors.Array) -> dict[str, tensors.Array] | None:
    """A factor by module, as A (r, in) or B (out, r): of a linear layer, or of each expert of a switch layer."""
    if tensor.ndim == 2:
        return {module: tensor.T}
    names = experts.of_switch(module, len(tensor)) if tensor.ndim == 3 else None
    return dict(zip(names, tensor, strict=True)) if names else None


def write(adapter: Adapter, folder: Path, base: Base) -> None:
    """Write a folder that `mlx_lm.load(model, adapter_path=folder)` takes: float32, scale 1, all layers.

    mlx-lm has one rank for all modules and adapts the same modules in every block, so lower ranks are padded with
    zeros, and blocks that lack a module get zeros for it. Neither changes ΔW.

    Raises:
        LayoutMismatch: the adapter is not for this base.
    """
    linears = {name: shape for name, shape in adapter.shapes.items() if not experts.is_expert(name)}
    check_fits(base, linears)
    rank = max(adapter.ranks.values())
    keys = {within_block(base, name)[1] for name in linears}
    factors: dict[str, tensors.Later] = {}
    for name, (out, into) in base.linears.items():
        if within_block(base, name)[1] in keys:
            update = adapter.modules.get(name)
            factors[name + _A] = tensors.Later(_FLOAT32, (into, rank), partial(_lora_a, update, into, rank))
            factors[name + _B] = tensors.Later(_FLOAT32, (rank, out), partial(_lora_b, update, out, rank))
    for stack in experts.stacks(adapter, base):
        switch, count, (out, into) = experts.in_mlx(base, stack), len(stack.updates), stack.shape
        keys.add(within_block(base, switch)[1])
        factors[switch + _A] = tensors.Later(_FLOAT32, (count, rank, into), partial(stack.a, rank))
        factors[switch + _B] = tensors.Later(_FLOAT32, (count, out, rank), partial(stack.b, rank))
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors.write(folder / _WEIGHTS, factors, {"format": "mlx"})
    files.replace(folder / _CONFIG, [json.dumps(config, indent=2).encode()])


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
