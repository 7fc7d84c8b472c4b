"""Training with PyTorch, transformers and PEFT: on CUDA, ROCm, MPS or the CPU."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from converters.adapter import Adapter
from edge_client.backends import EXACT, MemoryFigures, Progress, Setup, too_little_memory
from edge_client.data.batches import NEXT_TOKEN
from edge_client.training.plan import StepBatch, TrainingPlan
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot

name = "torch"
_missing: str | None = None
try:
    import torch

    from edge_client.backends import torch_lora, torch_model
    from edge_client.backends.torch_loss import LOGITS_AT_ONCE, TargetLoss
except ImportError as error:
    _missing = str(error)


def available() -> str | None:
    return _missing


def device() -> str:
    return torch_model.device()


def precision() -> str:
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        has = int(platform.mac_ver()[0].partition(".")[0] or 0) >= 14  # Metal has no bfloat16 before
    else:
        has = bool(torch.cpu.get_capabilities().get("avx512_bf16")) if hasattr(torch.cpu, "get_capabilities") else False
    return "bfloat16" if has else "float32"


def memory_figures() -> MemoryFigures:
    # On a CPU blocks are left to malloc, which fragments.
    return MemoryFigures(
        overhead=1.75,
        logits_at_once=LOGITS_AT_ONCE,
        in_main_memory=torch_model.device() != "cuda",
    )


def incompatible(base: Path, plan: TrainingPlan) -> str:
    # transformers is what the others are held to.
    return "" if plan.loss in _OBJECTIVES else f"PyTorch has no loss {plan.loss} here"


class _Objective(NamedTuple):
    """What a plan's loss takes: the model in a folder, and what makes the loss of a model."""

    load: Callable[[Path, Setup], Any]
    loss: Callable[[Any], Any]


_OBJECTIVES: dict[str, _Objective] = {} if _missing else {NEXT_TOKEN: _Objective(torch_model.load, TargetLoss)}


def train(
    base: Path,
    initial: Adapter,
    recipe: Recipe,
    plan: TrainingPlan,
    on_step: Callable[[Progress], None],
    snapshot: Snapshot | None = None,
    setup: Setup = EXACT,
) -> Adapter:
    objective = _OBJECTIVES[plan.loss]
    model = objective.load(base, setup)
    layers = torch_lora.adapt(model, initial, recipe)
    loss = objective.loss(model)
    torch_model.set_checkpointing(loss.body, setup.checkpointing)
    trained = [weight for _, weight in torch_lora.weights(layers)]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    if snapshot is not None:
        torch_lora.resume(layers, optimizer, snapshot)
    arrays = partial(torch_lora.arrays, layers, optimizer)
    for step in range(snapshot.step if snapshot else 0, plan.total_steps):
        began = time.perf_counter()
        batch = plan.batch(step)
        total, setup = _accumulate(loss, optimizer, batch, setup, recipe.dropout_seed(step))
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        mean = float(total)
        seconds = time.perf_counter() - began
        on_step(Progress(step + 1, plan.total_steps, mean, batch.num_targets, seconds, setup, arrays))
    return Adapter(
        {name: torch_lora.factors(layer, recipe.scaling(initial.modules[name].rank)) for name, layer in layers.items()}
    )


def _accumulate(
    loss: Any, optimizer: torch.optim.Optimizer, batch: StepBatch, setup: Setup, seed: int
) -> tuple[torch.Tensor, Setup]:
    """Add a batch's gradients to the parameters', part by part; returns its loss and the setup that it took, smaller
    than the given one if memory ran out."""
    while True:
        torch.manual_seed(seed)
        try:
            return sum(loss.backward(part, batch.num_targets) for part in batch.split(setup.parts)), setup
        except (RuntimeError, MemoryError) as error:
            optimizer.zero_grad()
            setup = _smaller(setup, batch.size, error)
            torch_model.set_checkpointing(loss.body, setup.checkpointing)


def _smaller(setup: Setup, batch_size: int, error: RuntimeError | MemoryError) -> Setup:
    """The next smaller setup, if it is memory that failed; raises the error if not."""
    # Only CUDA has a type of its own for it; MPS says "out of memory", the CPU's allocator "can't allocate memory".
    kinds = (torch.OutOfMemoryError, MemoryError)
    if not isinstance(error, kinds) and not any(words in str(error) for words in ("out of memory", "allocate memory")):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = setup.smaller(batch_size)
    if smaller is None:
        raise too_little_memory() from error
    return smaller
