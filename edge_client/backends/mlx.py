"""Training with MLX and mlx-lm: on Apple silicon, on CUDA, or on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters import checkpoint, custom_code, settings
from converters.adapter import Adapter, LowRank, Shape
from converters.settings import Settings
from edge_client.backends import EXACT, Progress, Setup, too_little_memory
from edge_client.data.batches import Batch, Batches
from edge_client.training.recipe import Recipe
from edge_client.training.snapshot import Snapshot
from oneround.errors import BadModel, LayoutMismatch


def _open_fast_blas() -> bool:
    """Put a fast BLAS in front of the reference one that MLX's CPU wheel for Linux carries: 30 times faster.

    Symbols of a library that was opened globally come first, so this has to happen before mlx is imported. PyTorch's
    library carries one and opens without importing torch; else the system's OpenBLAS.
    """
    candidates = ["libopenblas.so.0"]
    torch = importlib.util.find_spec("torch")
    for place in (torch.submodule_search_locations or []) if torch else []:
        candidates.insert(0, str(Path(place) / "lib" / "libtorch_cpu.so"))
    for candidate in candidates:
        with contextlib.suppress(OSError):
            if hasattr(ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW), "sgemm_"):
                return True
    return False


def _on_reference_blas() -> bool:
    """Whether mlx is its CPU build for Linux; only there is the wheel `mlx-cpu` installed."""
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


_slow = _on_reference_blas() and not _open_fast_blas()
name = "mlx"
_missing: str | None = None
try:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import AdamW
    from mlx.utils import tree_flatten, tree_map, tree_unflatten
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.utils import load_model
except ImportError as error:
    _missing = str(error)

_GROUP = 64  # weights of a quantised row that share a scale


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


def train(
    base: Path,
    initial: Adapter,
    recipe: Recipe,
    plan: Batches,
    on_step: Callable[[Progress], None],
    snapshot: Snapshot | None = None,
    setup: Setup = EXACT,
) -> Adapter:
    model = _model(base, setup)
    layers = _adapt(model, initial, recipe)
    optimizer = AdamW(
        0.0,
        betas=list(recipe.betas),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        bias_correction=True,  # as torch always does
    )
    if snapshot is not None:
        _go_on(model, layers, optimizer, snapshot)
    arrays = partial(_arrays, layers, optimizer)
    if setup.checkpointing:
        _checkpoint(model)
    side_by_side = _SideBySide(model)
    for step in range(snapshot.step if snapshot else 0, plan.total_steps):
        began = time.perf_counter()
        batch = plan.batch(step)
        optimizer.learning_rate = recipe.learning_rate(step)
        while True:
            mx.random.seed(recipe.dropout_seed(step))
            try:
                loss: Any = 0.0
                gradients = None
                for part in batch.split(setup.parts):
                    for one, added in side_by_side(part, batch.num_targets):
                        gradients = added if gradients is None else tree_map(mx.add, gradients, added)
                        loss = loss + one
                    mx.eval(loss, gradients)  # so that the parts are taken one after the other
                break
            except (RuntimeError, MemoryError) as error:
                setup = _smaller(model, setup, len(batch.inputs), error)
        optimizer.update(model, _clipped(gradients, recipe.clip_norm))
        # Gradients may come transposed in memory, and so would what they update; a snapshot gives it back as here.
        model.update(tree_map(mx.contiguous, model.trainable_parameters()))
        mx.eval(model.trainable_parameters(), optimizer.state)
        seconds = time.perf_counter() - began
        on_step(Progress(step + 1, plan.total_steps, loss.item(), batch.num_targets, seconds, setup, arrays))
    return Adapter({name: _factors(layer) for name, layer in layers.items()})


class _SideBySide:
    """Loss and gradients of a batch: on a CPU two halves of it at once, in a thread each.

    There MLX takes one operation after the other, and all but matrix products on one core; of two threads one
    multiplies while the other adds (on two cores 1.4 times as fast as two streams of one thread, which waits until a
    graph is nearly through before it begins another). Graphs are made one at a time, since making one puts tracers into
    the model; what stayed there would tie the next to this one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._compute = nn.value_and_grad(model, _loss_at_targets(model))
        self._making = threading.Lock()
        self._count = 1 if mx.default_device() == mx.Device(mx.gpu) else min(2, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._count, "mlx")
        # What is still to be read or computed can only be in this thread: weights, and what is none, as rope's table.
        mx.eval([dict(module) for module in model.modules()])

    def __call__(self, batch: Batch, count: int) -> list[Any]:
        """Loss and gradients of each half, over the targets that the step has in all."""
        if self._count == 1:
            return [self._compute(*_arguments(batch, count))]
        pieces = batch.split(self._count)
        seeds = np.array(mx.random.randint(0, 1 << 30, (len(pieces),))).tolist()
        running = [self._threads.submit(self._one, *each, count) for each in zip(pieces, seeds, strict=True)]
        wait(running)
        return [each.result() for each in running]

    def _one(self, batch: Batch, seed: int, count: int) -> Any:
        with self._making:
            mx.random.seed(seed)
            weights = self._model.trainable_parameters()
            made = self._compute(*_arguments(batch, count))
            self._model.update(weights)
        mx.eval(made)
        return made


def _arguments(batch: Batch, count: int) -> tuple[Any, Any, Any, int]:
    """Of the loss: inputs (B, T), where targets are in them (targets,), the targets, and how many the step has."""
    return mx.array(batch.inputs), mx.array(batch.targets.astype(np.int32)), mx.array(batch.targeted), count


def _smaller(model: Any, setup: Setup, batch_size: int, error: RuntimeError | MemoryError) -> Setup:
    """The next smaller setup, if it is memory that failed; raises the error if not."""
    # Metal: "Attempting to allocate …", "Unable to allocate …", "Insufficient Memory".
    if not isinstance(error, MemoryError) and not any(
        word in str(error) for word in ("llocate", "Insufficient Memory")
    ):
        raise error
    mx.clear_cache()
    found = setup.smaller(batch_size)
    if found is None:
        raise too_little_memory() from error
    if found.checkpointing:
        _checkpoint(model)
    return found


def _model(base: Path, setup: Setup) -> Any:
    """The base, frozen. In evaluation mode: LoRA's dropout is the recipe's, the base's own would not be."""
    custom_code.check(base)
    rope = _rope(settings.read(base / "config.json", BadModel))
    try:
        checkpoint.weights(base)  # as MLX does not, this looks whether the headers are sound
        model, _ = load_model(base, lazy=True, model_config=rope)
    except MemoryError:
        raise
    except Exception as error:  # the settings are a stranger's, and over them the library raises anything
        raise BadModel(f"{base} holds no model that mlx-lm can load: {error}", hint=custom_code.hint(base)) from error
    model.set_dtype(getattr(mx, setup.precision))
    if setup.bits:
        nn.quantize(model, _GROUP, setup.bits, class_predicate=_can_be_rounded)
    model.freeze()
    return model.eval()


def _can_be_rounded(path: str, module: Any) -> bool:
    """As for PyTorch, embeddings and the output layer stay."""
    return isinstance(module, nn.Linear) and "lm_head" not in path and module.weight.shape[-1] % _GROUP == 0


def _checkpoint(model: Any) -> None:
    """Have decoder layers compute their activations again on the way back rather than keep them."""
    for layer in model.layers:
        forward = type(layer).__call__

        def again(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            here, after = (int(seed) for seed in np.array(mx.random.randint(0, 1 << 30, (2,))))

            def run(weights: Any, *args: Any, **kwargs: Any) -> Any:
                mx.random.seed(here)  # both times the same units drop out
                self.update(weights)
                return forward(self, *args, **kwargs)

            output = mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)
            mx.random.seed(after)
            return output

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": again})


def _rope(config: Settings) -> dict[str, Any]:
    """transformers 5 keeps what it knows of rope in `rope_parameters`; most models of mlx-lm look for it under the
    older keys, and fall back on their own defaults without a word."""
    ropes = config.table("rope_parameters")
    far = ropes.table("full_attention") if "full_attention" in ropes.values else ropes
    found = {key: far.values[key] for key in ("rope_theta", "partial_rotary_factor") if key in far.values}
    if (kind := far.text("rope_type", "default")) != "default":
        found["rope_scaling"] = {**far.values, "type": kind}
    if near := ropes.table("sliding_attention").values:
        found["rope_local_base_freq"] = near.get("rope_theta", 10000.0)
    return found


def _adapt(model: Any, initial: Adapter, recipe: Recipe) -> dict[str, Any]:
    """Put LoRA on exactly the modules of `initial`, with its factors; returns the layers by module name."""
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


def _transposed(array: NDArray[np.float32]) -> Any:
    """In mlx-lm's orientation, and so in memory: a matrix product rounds otherwise over a transposed view."""
    return mx.array(np.ascontiguousarray(array.T))


def _shape(linear: Any) -> Shape:
    out, into = linear.weight.shape
    return Shape(out, into * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else into)


def _arrays(layers: dict[str, Any], optimizer: Any) -> dict[str, NDArray[np.float32]]:
    state, found = dict(tree_flatten(optimizer.state)), {}
    for name, layer in layers.items():
        for part, key in _trained(layer):
            found[f"{name}.{part}"] = np.array(layer[key].T)
            found[f"{name}.{part}.first"] = np.array(state[f"{name}.{key}.m"].T)
            found[f"{name}.{part}.second"] = np.array(state[f"{name}.{key}.v"].T)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _trained(layer: Any) -> list[tuple[str, str]]:
    """Which factors of a layer are trained: a snapshot's name for each, and mlx-lm's."""
    return [(part, key) for part, key in (("a", "lora_a"), ("b", "lora_b")) if key in layer.trainable_parameters()]


def _go_on(model: Any, layers: dict[str, Any], optimizer: Any, snapshot: Snapshot) -> None:
    optimizer.init(model.trainable_parameters())
    state = dict(tree_flatten(optimizer.state))
    for name, layer in layers.items():
        for part, key in _trained(layer):
            layer[key] = _transposed(snapshot.arrays[f"{name}.{part}"])
            state[f"{name}.{key}.m"] = _transposed(snapshot.arrays[f"{name}.{part}.first"])
            state[f"{name}.{key}.v"] = _transposed(snapshot.arrays[f"{name}.{part}.second"])
    state["step"] = mx.array(snapshot.step, mx.uint64)
    optimizer.state = tree_unflatten(list(state.items()))


def _loss_at_targets(model: Any) -> Callable[[Any, Any, Any, int], Any]:
    """Cross-entropy over a batch's targets divided by their count in the step, the output layer run at targets only.

    Hidden states are picked where they leave the inner model, so that whatever the model does to make logits of them
    (tied weights, scaling, soft caps) stays its own business. A module has no hooks; it changes its class instead.
    """
    targets = None
    inner = getattr(model, "model", None)

    if isinstance(inner, nn.Module):
        forward = type(inner).__call__

        def pick(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = forward(self, *args, **kwargs)
            return hidden.reshape(-1, hidden.shape[-1])[targets][None]  # (1, targets, D)

        inner.__class__ = type(type(inner).__name__, (type(inner),), {"__call__": pick})

    def loss(inputs: Any, positions: Any, labels: Any, count: int) -> Any:
        nonlocal targets
        targets = positions
        logits = model(inputs)
        logits = logits.reshape(-1, logits.shape[-1])
        if logits.shape[0] != positions.size:
            logits = logits[positions]
        return nn.losses.cross_entropy(logits.astype(mx.float32), labels, reduction="sum") / count

    return loss


def _clipped(gradients: Any, most: float) -> Any:
    """Scaled down to a global norm of at most `most`, with torch's small print."""
    squares = [(gradient**2).sum() for _, gradient in tree_flatten(gradients)]
    scale = mx.minimum(most / (mx.sqrt(sum(squares)) + 1e-6), 1.0)
    return tree_map(lambda gradient: gradient * scale, gradients)


def _factors(layer: Any) -> LowRank:
    a, b = np.array(layer.lora_a.T, dtype=np.float32), np.array(layer.lora_b.T, dtype=np.float32)
    return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b * np.float32(layer.scale)))
