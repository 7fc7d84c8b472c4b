"""Training with MLX and mlx-lm: on Apple silicon, on CUDA, or on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from converters import checkpoint
from converters.adapter import Adapter
from edge_client.backends import EXACT, MemoryFigures, Progress, Setup, mlx_blas, mlx_compat, too_little_memory
from edge_client.data.batches import NEXT_TOKEN
from edge_client.training.plan import StepBatch, TrainingPlan
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot

_slow = mlx_blas.on_reference_blas() and not mlx_blas.open_fast_blas()  # before mlx is imported
name = "mlx"
_missing: str | None = None
try:
    import mlx.core as mx
    from mlx.optimizers import AdamW
    from mlx.utils import tree_flatten, tree_map

    from edge_client.backends import mlx_lora, mlx_model
    from edge_client.backends.mlx_loss import TargetGradients
except ImportError as error:
    _missing = str(error)


def available() -> str | None:
    return _missing


def device() -> str:
    """`metal`, `cuda` or `cpu`; a CPU without a fast BLAS says so."""
    if mx.default_device() == mx.Device(mx.gpu):
        return "metal" if mx.metal.is_available() else "cuda"
    return "cpu (slow: neither PyTorch nor libopenblas.so.0 is here to speed it up)" if _slow else "cpu"


def precision() -> str:
    # On a CPU MLX computes in bfloat16 many times slower than in float32.
    return "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"


def memory_figures() -> MemoryFigures:
    return MemoryFigures(
        overhead=1.25,  # blocks are pooled
        keeps_attention=True,  # by what was measured
        in_main_memory=mx.default_device() != mx.Device(mx.gpu) or mx.metal.is_available(),
    )


def incompatible(base: Path, plan: TrainingPlan) -> str:
    if plan.loss not in _OBJECTIVES:
        return f"MLX has no loss {plan.loss} here"
    difference = mlx_compat.gap(checkpoint.config(base), plan.lengths)
    return f"mlx-lm computes something else than this base model: {difference}" if difference else ""


class _Objective(NamedTuple):
    """What a plan's loss takes: the model in a folder, and what makes loss and gradients of a model."""

    load: Callable[[Path, Setup], Any]
    gradients: Callable[[Any], Any]


_OBJECTIVES: dict[str, _Objective] = {} if _missing else {NEXT_TOKEN: _Objective(mlx_model.load, TargetGradients)}


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
    layers = mlx_lora.adapt(model, initial, recipe)
    optimizer = _optimizer(recipe)
    if snapshot is not None:
        mlx_lora.resume(model, layers, optimizer, snapshot)
    arrays = partial(mlx_lora.arrays, layers, optimizer)
    if setup.checkpointing:
        mlx_model.checkpoint_layers(model)
    gradients_of = objective.gradients(model)
    for step in range(snapshot.step if snapshot else 0, plan.total_steps):
        began = time.perf_counter()
        batch = plan.batch(step)
        loss, gradients, setup = _accumulate(model, gradients_of, batch, setup, recipe.dropout_seed(step))
        optimizer.learning_rate = recipe.learning_rate(step)
        optimizer.update(model, _clipped(gradients, recipe.clip_norm))
        # Gradients may come transposed in memory, and so would what they update; a snapshot gives it back as here.
        model.update(tree_map(mx.contiguous, model.trainable_parameters()))
        mx.eval(model.trainable_parameters(), optimizer.state)
        seconds = time.perf_counter() - began
        on_step(Progress(step + 1, plan.total_steps, loss.item(), batch.num_targets, seconds, setup, arrays))
    return Adapter({name: mlx_lora.factors(layer) for name, layer in layers.items()})


def _optimizer(recipe: Recipe) -> Any:
    return AdamW(
        0.0,
        betas=list(recipe.betas),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        bias_correction=True,  # as torch always does
    )


def _accumulate(model: Any, gradients_of: Any, batch: StepBatch, setup: Setup, seed: int) -> tuple[Any, Any, Setup]:
    """A batch's loss and gradients, taken part by part; and the setup that it took, smaller than the given one if
    memory ran out."""
    while True:
        mx.random.seed(seed)
        try:
            loss: Any = 0.0
            gradients = None
            for part in batch.split(setup.parts):
                for part_loss, added in gradients_of(part, batch.num_targets):
                    gradients = added if gradients is None else tree_map(mx.add, gradients, added)
                    loss = loss + part_loss
                mx.eval(loss, gradients)  # so that the parts are taken one after the other
            return loss, gradients, setup
        except (RuntimeError, MemoryError) as error:
            setup = _smaller(model, setup, batch.size, error)


def _smaller(model: Any, setup: Setup, batch_size: int, error: RuntimeError | MemoryError) -> Setup:
    """The next smaller setup, if it is memory that failed; raises the error if not."""
    # Metal: "Attempting to allocate …", "Unable to allocate …", "Insufficient Memory".
    if not isinstance(error, MemoryError) and not any(
        word in str(error) for word in ("llocate", "Insufficient Memory")
    ):
        raise error
    mx.clear_cache()
    smaller = setup.smaller(batch_size)
    if smaller is None:
        raise too_little_memory() from error
    if smaller.checkpointing:
        mlx_model.checkpoint_layers(model)
    return smaller


def _clipped(gradients: Any, most: float) -> Any:
    """Scaled down to a global norm of at most `most`, with torch's small print."""
    squares = [(gradient**2).sum() for _, gradient in tree_flatten(gradients)]
    scale = mx.minimum(most / (mx.sqrt(sum(squares)) + 1e-6), 1.0)
    return tree_map(lambda gradient: gradient * scale, gradients)
