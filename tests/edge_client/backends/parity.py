"""The training backends that can be used here, and what they are compared by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters import adapter
from converters.adapter import Adapter
from edge_client import backends
from edge_client.backends import BACKENDS, Progress
from edge_client.data.batches import Batches
from edge_client.training.recipe import Recipe
from oneround.v1 import federation_pb2 as pb

usable = [name for name in BACKENDS if backends.load(name).available() is None]


both = pytest.mark.skipif(len(usable) < 2, reason="needs both torch and mlx")


each = pytest.mark.parametrize("name", usable)


def recipe_for(plan: Batches, dropout: float = 0.0, learning_rate: float = 3e-3) -> Recipe:
    train = pb.TrainSpec(learning_rate=learning_rate, schedule="cosine", warmup_ratio=0.1)
    return Recipe.from_spec(pb.JobSpec(lora=pb.LoraSpec(dropout=dropout), train=train), plan.total_steps)


def trained(
    name: str, base: Path, initial: Adapter, recipe: Recipe, plan: Batches
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], Adapter]:
    """Losses by step, and the adapter."""
    steps: list[Progress] = []
    result = backends.load(name).train(base, initial, recipe, plan, steps.append)
    assert [progress.step for progress in steps] == list(range(1, plan.total_steps + 1))
    assert all(p.seconds > 0 and p.total_steps == plan.total_steps for p in steps)
    assert [p.tokens for p in steps] == [plan.batch(step).num_targets for step in range(plan.total_steps)]
    adapter.check(result, {name: factors.shape for name, factors in initial.modules.items()})
    assert result.ranks == initial.ranks
    return np.array([progress.loss for progress in steps]), result


def difference(one: Adapter, other: Adapter) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules together."""
    deltas = [(one.modules[name].delta(), other.modules[name].delta()) for name in one.modules]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in deltas) / sum(np.sum(a**2) for a, _ in deltas)))
