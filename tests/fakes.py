"""Parts of a client that are not the real ones, and keep what the real ones promise."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapter import Adapter, LowRank
from edge_client.backends import MemoryFigures, Progress
from edge_client.connection.remote import OnBytes, Remote
from edge_client.data.batches import Batches
from edge_client.training.recipe import EXACT, Recipe, Setup
from edge_client.training.snapshot import Arrays, Snapshot
from edge_client.ui.events import Event
from edge_client.ui.screen import Screen
from oneround.v1 import federation_pb2 as pb
from tests.waiting import LONG


class FakeBackend:
    """A training backend that trains in no time: after as many steps as the plan has, it gives the initial adapter with
    all of B at one value. It goes on from a snapshot. `before_step` is called with the number of steps done so far."""

    name = "fake"

    def __init__(
        self,
        before_step: Callable[[int], object] = lambda done: None,
        *,
        seconds_a_step: float = 0.0,
        b: float = 1.0,
    ) -> None:
        self.began_at: list[int] = []  # of each run, the steps that were done before it
        self.setup, self.steps = EXACT, 0  # of the last run
        self._before_step, self._seconds_a_step, self._b = before_step, seconds_a_step, b

    @property
    def runs(self) -> int:
        return len(self.began_at)

    def available(self) -> str | None:
        return None

    def device(self) -> str:
        return "cpu"

    def precision(self) -> str:
        return "float32"

    def memory_figures(self) -> MemoryFigures:
        return MemoryFigures(overhead=1.75)

    def incompatible(self, base: Path, plan: Batches) -> str:
        return ""

    def train(
        self,
        base: Path,
        initial: Adapter,
        recipe: Recipe,
        plan: Batches,
        on_step: Callable[[Progress], None],
        snapshot: Snapshot | None = None,
        setup: Setup = EXACT,
    ) -> Adapter:
        assert (base / "model.safetensors").exists()
        self.began_at.append(snapshot.step if snapshot else 0)
        self.setup, self.steps = setup, plan.total_steps
        for step in range(self.began_at[-1], plan.total_steps):
            self._before_step(step)
            time.sleep(self._seconds_a_step)
            tokens = plan.batch(step).num_targets
            on_step(Progress(step + 1, plan.total_steps, 1.0, tokens, 0.01, setup, lambda: snapshot_arrays(initial)))
        return Adapter({name: LowRank(f.a, np.full_like(f.b, self._b)) for name, f in initial.modules.items()})


def snapshot_arrays(factors: Adapter) -> Arrays:
    """What a backend keeps in a snapshot: the factors and, of each, two moments."""
    kept: dict[str, np.ndarray] = {}
    for name, pair in factors.modules.items():
        for key, factor in ((f"{name}.a", pair.a), (f"{name}.b", pair.b)):
            kept |= {key: factor, f"{key}.first": np.zeros_like(factor), f"{key}.second": np.zeros_like(factor)}
    return kept


def fail_first_upload(remote: Remote, error: Exception) -> None:
    """Have the first upload over a connection meet this error, and the others go through."""
    upload, errors = remote.upload, [error]

    async def fail_once(lease: str, declaration: pb.Declaration, file: Path, on_bytes: OnBytes) -> pb.Receipt:
        if errors:
            raise errors.pop()
        return await upload(lease, declaration, file, on_bytes)

    remote.upload = fail_once  # type: ignore[method-assign]


class RecordingScreen(Screen):
    """Keeps what is said, and shows none of it."""

    def __init__(self) -> None:
        super().__init__(as_json=True)
        self.said: list[tuple[str, dict[str, Any]]] = []
        self._events = defaultdict[str, asyncio.Event](asyncio.Event)

    def say(self, event: Event) -> None:
        self.said.append((event.event, event.as_json()))
        self._events[event.event].set()

    def times(self, event: str) -> int:
        return sum(each == event for each, _ in self.said)

    async def until(self, event: str) -> None:
        async with asyncio.timeout(LONG):
            await self._events[event].wait()
