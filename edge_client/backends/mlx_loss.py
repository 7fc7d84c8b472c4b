"""Cross-entropy at the targets of a batch and its gradients; on a CPU by two threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from edge_client.data.batches import Batch


class TargetGradients:
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
        running = [self._threads.submit(self._half, *half, count) for half in zip(pieces, seeds, strict=True)]
        wait(running)
        return [future.result() for future in running]

    def _half(self, batch: Batch, seed: int, count: int) -> Any:
        with self._making:
            mx.random.seed(seed)
            weights = self._model.trainable_parameters()
            result = self._compute(*_arguments(batch, count))
            self._model.update(weights)
        mx.eval(result)
        return result


def _arguments(batch: Batch, count: int) -> tuple[Any, Any, Any, int]:
    """Of the loss: inputs (B, T), where targets are in them (targets,), the targets, and how many the step has."""
    return mx.array(batch.inputs), mx.array(batch.targets.astype(np.int32)), mx.array(batch.targeted), count


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
