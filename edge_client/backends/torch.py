"""Training with PyTorch, transformers and PEFT: on CUDA, ROCm, MPS or the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from converters.adapter import Adapter, LowRank, Shape
from converters.errors import BadModel, LayoutMismatch
from edge_client.backends import Progress
from edge_client.batches import Batch, Batches
from edge_client.recipe import Recipe
from edge_client.snapshot import Snapshot

name = "torch"
_missing: str | None = None
try:
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch.nn import functional
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
except ImportError as error:
    _missing = str(error)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def available() -> str | None:
    return _missing


def device() -> str:
    """`cuda` (ROCm goes by that name too), `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def train(
    base: Path,
    initial: Adapter,
    recipe: Recipe,
    plan: Batches,
    on_step: Callable[[Progress], None],
    snapshot: Snapshot | None = None,
) -> Adapter:
    model = _model(base).to(device())
    layers = _adapt(model, initial, recipe)
    loss_of = _loss_at_targets(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    if snapshot is not None:
        _go_on(layers, optimizer, snapshot)
    arrays = partial(_arrays, layers, optimizer)
    for step in range(snapshot.step if snapshot else 0, plan.total_steps):
        began = time.perf_counter()
        batch = plan.batch(step)
        torch.manual_seed(recipe.dropout_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        on_step(Progress(step + 1, plan.total_steps, loss.item(), batch.num_targets, seconds, arrays))
    return Adapter(
        {name: _factors(layer, recipe.scaling(initial.modules[name].rank)) for name, layer in layers.items()}
    )


def _model(base: Path) -> PreTrainedModel:
    """The base in float32. In evaluation mode: LoRA's dropout is the recipe's, the base's own would not be."""
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(base), dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadModel(f"{base} holds no model that transformers can load: {error}") from error
    model.config.use_cache = False
    return model.eval()


def _adapt(model: PreTrainedModel, initial: Adapter, recipe: Recipe) -> dict[str, Any]:
    """Put LoRA on exactly the modules of `initial`, with its factors; returns the layers by module name."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, factors in initial.modules.items():
        if name not in linears:
            raise LayoutMismatch(f"the model has no linear layer {name}")
        if Shape(*linears[name].weight.shape) != factors.shape:
            raise LayoutMismatch(f"{name} adapts {factors.shape}, the model's is {tuple(linears[name].weight.shape)}")
    ranks = initial.ranks
    common = next(iter(ranks.values()))
    config = LoraConfig(
        r=common,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != common},
    )
    inject_adapter_in_model(config, model)  # freezes everything else
    layers = {name: model.get_submodule(name) for name in ranks}
    for name, layer in layers.items():
        factors = initial.modules[name]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.tensor(factors.a))
            layer.lora_B["default"].weight.copy_(torch.tensor(factors.b / recipe.scaling(factors.rank)))
        layer.lora_dropout.train()
    return layers


def _weights(layers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is trained, by its name in a snapshot."""
    for name, layer in layers.items():
        yield f"{name}.a", layer.lora_A["default"].weight
        yield f"{name}.b", layer.lora_B["default"].weight


def _arrays(layers: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, NDArray[np.float32]]:
    found = {}
    for name, weight in _weights(layers):
        moments = optimizer.state[weight]
        for key, tensor in (
            (name, weight.detach()),
            (f"{name}.first", moments["exp_avg"]),
            (f"{name}.second", moments["exp_avg_sq"]),
        ):
            found[key] = tensor.to("cpu", copy=True).numpy()
    return found


def _go_on(layers: dict[str, Any], optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    for name, weight in _weights(layers):
        kept, first, second = (
            torch.tensor(snapshot.arrays[key], device=weight.device)
            for key in (name, f"{name}.first", f"{name}.second")
        )
        with torch.no_grad():
            weight.copy_(kept)
        optimizer.state[weight] = {
            "step": torch.tensor(float(snapshot.step)),
            "exp_avg": first,
            "exp_avg_sq": second,
        }


def _loss_at_targets(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    """Mean cross-entropy over a batch's targets, with the output layer run at the targets only.

    Hidden states are picked where they leave the inner model, so that whatever the model does to make logits of them
    (tied weights, scaling, soft caps) stays its own business.
    """
    targets = torch.empty(0)

    def pick(_module: torch.nn.Module, _args: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[targets][None]  # (1, targets, D)
        return output

    if model.base_model is not model:
        model.base_model.register_forward_hook(pick)

    def loss(batch: Batch) -> Tensor:
        nonlocal targets
        targets = torch.from_numpy(batch.targets).to(model.device)
        logits = model(torch.from_numpy(batch.inputs).to(model.device)).logits.flatten(0, 1)
        labels = torch.from_numpy(batch.labels.reshape(-1)).to(model.device)[targets].long()
        return functional.cross_entropy(
            logits.float() if len(logits) == len(targets) else logits[targets].float(), labels
        )

    return loss


def _factors(layer: Any, scaling: float) -> LowRank:
    a, b = (part["default"].weight.detach().float().cpu().numpy() for part in (layer.lora_A, layer.lora_B))
    return LowRank(a.copy(), (b * np.float32(scaling)).astype(np.float32))
