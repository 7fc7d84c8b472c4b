"""LoRA on an MLX model, by mlx-lm's layer: put there, read back, kept in a snapshot and resumed from one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from numpy.typing import NDArray

from converters.adapter import Adapter, LowRank, Shape
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from oneround.errors import LayoutMismatch


def adapt(model: Any, initial: Adapter, recipe: Recipe) -> dict[str, Any]:
    """Put LoRA on exactly the modules of `initial`, with its factors; returns the layers by module name.

    Raises:
        LayoutMismatch: the model lacks a module of `initial`, or has it in another shape.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    layers = {}
    for name, factors in initial.modules.items():
        if name not in linears:
            raise LayoutMismatch(f"the model has no linear layer {name}")
        if (shape := _shape(linears[name])) != factors.shape:
            raise LayoutMismatch(f"{name} adapts {factors.shape}, the model's is {shape}")
        scaling = recipe.scaling(factors.rank)
        layer = LoRALinear.from_base(linears[name], r=factors.rank, dropout=recipe.dropout, scale=scaling)
        layer.lora_a, layer.lora_b = _transposed(factors.a), _transposed(factors.b / scaling)
        layer.linear.freeze()
        if recipe.freeze_a:
            layer.freeze(keys="lora_a", recurse=False)
        layers[name] = layer
    model.update_modules(tree_unflatten(list(layers.items())))
    return layers


def factors(layer: Any) -> LowRank:
    """The layer's factors in the common layout: scaling folded into B."""
    a, b = np.array(layer.lora_a.T, dtype=np.float32), np.array(layer.lora_b.T, dtype=np.float32)
    return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b * np.float32(layer.scale)))


def arrays(layers: dict[str, Any], optimizer: Any) -> dict[str, NDArray[np.float32]]:
    """What a snapshot keeps, copied: the weights that are trained, and AdamW's moments of each."""
    state, copies = dict(tree_flatten(optimizer.state)), {}
    for name, layer in layers.items():
        for part, key in _trained(layer):
            copies[f"{name}.{part}"] = np.array(layer[key].T)
            copies[f"{name}.{part}.first"] = np.array(state[f"{name}.{key}.m"].T)
            copies[f"{name}.{part}.second"] = np.array(state[f"{name}.{key}.v"].T)
    return {name: np.ascontiguousarray(array) for name, array in copies.items()}


def resume(model: Any, layers: dict[str, Any], optimizer: Any, snapshot: Snapshot) -> None:
    """Put weights and moments back as a snapshot has them."""
    optimizer.init(model.trainable_parameters())
    state = dict(tree_flatten(optimizer.state))
    for name, layer in layers.items():
        for part, key in _trained(layer):
            layer[key] = _transposed(snapshot.arrays[f"{name}.{part}"])
            state[f"{name}.{key}.m"] = _transposed(snapshot.arrays[f"{name}.{part}.first"])
            state[f"{name}.{key}.v"] = _transposed(snapshot.arrays[f"{name}.{part}.second"])
    state["step"] = mx.array(snapshot.step, mx.uint64)
    optimizer.state = tree_unflatten(list(state.items()))


def _trained(layer: Any) -> list[tuple[str, str]]:
    """Which factors of a layer are trained: a snapshot's name for each, and mlx-lm's."""
    return [(part, key) for part, key in (("a", "lora_a"), ("b", "lora_b")) if key in layer.trainable_parameters()]


def _transposed(array: NDArray[np.float32]) -> Any:
    """In mlx-lm's orientation, and so in memory: a matrix product rounds otherwise over a transposed view."""
    return mx.array(np.ascontiguousarray(array.T))


def _shape(linear: Any) -> Shape:
    out, into = linear.weight.shape
    return Shape(out, into * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else into)
