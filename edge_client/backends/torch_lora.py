"""LoRA on a PyTorch model: PEFT puts it there, and where it can be, its arithmetic is done in fewer and fused steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional

from converters.adapter import Adapter, LowRank, Shape
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from oneround.errors import LayoutMismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"  # of PEFT's adapters


def adapt(model: PreTrainedModel, initial: Adapter, recipe: Recipe) -> dict[str, Any]:
    """Put LoRA on exactly the modules of `initial`, with its factors in float32; returns the layers by module name.

    Everything else is frozen.

    Raises:
        LayoutMismatch: the model lacks a module of `initial`, or has it in another shape.
    """
    _require_modules(model, initial)
    inject_adapter_in_model(_config(initial.ranks, recipe), model)
    layers = {name: model.get_submodule(name) for name in initial.modules}
    for name, layer in layers.items():
        factors = initial.modules[name]
        scaling = recipe.scaling(factors.rank)
        a, b = layer.lora_A[NAME].float(), layer.lora_B[NAME].float()
        with torch.no_grad():
            a.weight.copy_(torch.tensor(factors.a))
            b.weight.copy_(torch.tensor(factors.b / scaling))
        a.weight.requires_grad_(not recipe.freeze_a)
        layer.lora_dropout.train()
        if not recipe.dropout and type(layer.get_base_layer()) is torch.nn.Linear:
            layer.forward = partial(_forward, layer, scaling)
    return layers


def _require_modules(model: PreTrainedModel, initial: Adapter) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, factors in initial.modules.items():
        if name not in linears:
            raise LayoutMismatch(f"the model has no linear layer {name}")
        shape = Shape(linears[name].out_features, linears[name].in_features)  # a quantised weight has another shape
        if shape != factors.shape:
            raise LayoutMismatch(f"{name} adapts {factors.shape}, the model's is {shape}")


def _config(ranks: dict[str, int], recipe: Recipe) -> LoraConfig:
    """PEFT's, for exactly these modules."""
    common = next(iter(ranks.values()))
    return LoraConfig(
        r=common,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != common},
    )


def weights(layers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is trained, by its name in a snapshot."""
    for name, layer in layers.items():
        for part, linear in (("a", layer.lora_A[NAME]), ("b", layer.lora_B[NAME])):
            if linear.weight.requires_grad:
                yield f"{name}.{part}", linear.weight


def factors(layer: Any, scaling: float) -> LowRank:
    """The layer's factors in the common layout: scaling folded into B."""
    a, b = (part[NAME].weight.detach().float().cpu().numpy() for part in (layer.lora_A, layer.lora_B))
    return LowRank(a.copy(), (b * scaling).astype(a.dtype))


def arrays(layers: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, NDArray[np.float32]]:
    """What a snapshot keeps, copied: the weights that are trained, and AdamW's moments of each."""
    copies = {}
    for name, weight in weights(layers):
        moments = optimizer.state[weight]
        for key, tensor in (
            (name, weight.detach()),
            (f"{name}.first", moments["exp_avg"]),
            (f"{name}.second", moments["exp_avg_sq"]),
        ):
            copies[key] = tensor.to("cpu", copy=True).numpy()
    return copies


def resume(layers: dict[str, Any], optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Put weights and moments back as a snapshot has them."""
    for name, weight in weights(layers):
        value, first, second = (
            torch.tensor(snapshot.arrays[key], device=weight.device)
            for key in (name, f"{name}.first", f"{name}.second")
        )
        with torch.no_grad():
            weight.copy_(value)
        optimizer.state[weight] = {
            "step": torch.tensor(float(snapshot.step)),
            "exp_avg": first,
            "exp_avg_sq": second,
        }


def _forward(layer: Any, scaling: float, x: Tensor) -> Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    y: Tensor = _Sum.apply(x, base.weight, base.bias, a.to(x.dtype), (scaling * b).to(x.dtype))  # type: ignore[no-untyped-call]
    return y


class _Sum(torch.autograd.Function):
    """x Wᵀ + bias + (x Aᵀ) Bᵀ, where W and bias are frozen.

    The second product is added to the first as it is made, and so it is on the way back: no pass over (N, out) or
    (N, in) that is not a matrix product, and of the activations only x and the narrow x Aᵀ are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        narrow = flat @ a.t()  # (N, r)
        y = functional.linear(flat, weight, bias).addmm_(narrow, b.t())  # (N, out)
        ctx.save_for_backward(flat if ctx.needs_input_grad[3] else None, weight, a, b, narrow)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor]:
        flat, weight, a, b, narrow = ctx.saved_tensors
        dy = gradients[0].reshape(-1, weight.shape[0])
        d_narrow = dy @ b
        dx = (dy @ weight).addmm_(d_narrow, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        da = d_narrow.t() @ flat if flat is not None else None  # A may be frozen
        return dx, None, None, da, dy.t() @ narrow
