"""Training backends: a module each, chosen by name, imported only when chosen. A new one is a module, an entry in
BACKENDS and an extra of its name in pyproject.toml; tests/edge_client/backends/test_seam.py holds it to the contract.

A backend takes integer arrays and a recipe and gives an adapter in the common layout; in float32 all of them give
the same one within rounding. Importing this package imports no training framework.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from converters.adapter import Adapter
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import EXACT, Recipe, Setup
from edge_client.training.snapshot import Arrays, Snapshot
from oneround.errors import BadData, NotEnough, UsageError

# OpenMP threads that wait should sleep, not spin: on a machine that does other work as well, which is what a person's
# laptop does, spinning made training 10 to 30 times slower. Read when the first framework loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = [
    "BACKENDS",
    "EXACT",
    "Backend",
    "MemoryFigures",
    "Progress",
    "Registration",
    "Setup",
    "choose",
    "load",
    "others",
    "too_little_memory",
]


def _on_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


@dataclass(frozen=True)
class Registration:
    """A backend's module, and whether this is the kind of machine that it was made for; known without importing it."""

    module: str
    preferred: Callable[[], bool] = lambda: False


# By name, which is that of the extra that installs it, too. `auto` tries them in this order, preferred ones first.
BACKENDS = {
    "torch": Registration("edge_client.backends.torch"),
    "mlx": Registration("edge_client.backends.mlx", preferred=_on_apple_silicon),
}


@dataclass(frozen=True)
class Progress:
    """One optimizer step, done.

    Raises:
        BadData: the loss is not finite, so going on is of no use.
    """

    step: int  # steps done, from 1
    total_steps: int
    loss: float  # mean over the step's targets, before the step
    tokens: int  # targets of this step
    seconds: float  # wall time of this step
    setup: Setup  # what the step was done with: smaller than what was asked for when memory ran out
    arrays: Callable[[], Arrays]  # what a snapshot keeps at this step, copied when asked for

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss):
            raise BadData(f"training diverged: the loss of step {self.step} is {self.loss}", hint="lower learning_rate")


@dataclass(frozen=True)
class MemoryFigures:
    """What an estimate of memory needs to know of a backend on this machine's device."""

    overhead: float  # peak over what activations and logits alone would take: temporaries, blocks not given back; ≥ 1
    keeps_attention: bool = False  # (heads, T, T) of every layer until the backward pass
    logits_at_once: int = 0  # elements of a batch's logits that exist together; 0: all of them
    in_main_memory: bool = True  # the device shares the machine's memory; False: it has its own


class Backend(Protocol):
    """What a backend module offers. All but `name` and `available` may be asked only where it is available."""

    name: str  # its key in BACKENDS

    def available(self) -> str | None:
        """None if it can be used here, else why not."""

    def device(self) -> str:
        """Where it would train: `cuda`, `mps`, `metal` or `cpu`, perhaps with a remark on its speed."""

    def precision(self) -> str:
        """The fastest of PRECISIONS that the device has in hardware."""

    def memory_figures(self) -> MemoryFigures:
        """What its device and its allocator make of an estimate of memory."""

    def incompatible(self, base: Path, plan: TrainingPlan) -> str:
        """In a line why it would compute something else than the base's own config.json and the plan say, of which
        `lengths` and `loss` count; empty where it computes just that.

        Raises:
            BadModel: the folder `base` has no sound config.json.
        """

    def train(
        self,
        base: Path,
        initial: Adapter,
        recipe: Recipe,
        plan: TrainingPlan,
        on_step: Callable[[Progress], None],
        snapshot: Snapshot | None = None,
        setup: Setup = EXACT,
    ) -> Adapter:
        """Fine-tune `initial` over the model in folder `base`; ranks and modules are those of `initial`.

        `on_step` is called after every step, and may raise to interrupt. With a snapshot of the same run training goes
        on from there; on a CPU the result is the same to the bit. A step that memory is too short for is done again
        with a smaller setup.

        Raises:
            BadModel: the folder holds no model that the framework can load.
            LayoutMismatch: the model lacks a module of `initial`, or has it in another shape.
            NotEnough: memory is too short for the smallest setup.
            UsageError: the base cannot be quantised here.
        """


def too_little_memory() -> NotEnough:
    """What a backend raises when not even the smallest setup fits."""
    return NotEnough(
        "there is not enough memory to train on one example at a time",
        hint="close other programs and run it again, or round the base: edge-client join --bits 4",
    )


def load(name: str) -> Backend:
    """The backend module of a name in BACKENDS, whether or not it is available."""
    return cast(Backend, importlib.import_module(BACKENDS[name].module))


def others(name: str) -> list[str]:
    """The names of all other backends."""
    return [other for other in BACKENDS if other != name]


def choose(name: str = "auto") -> Backend:
    """A backend that can be used here; `auto` takes one that prefers this kind of machine, if it can be used.

    Raises:
        UsageError: there is none, or not the one that was asked for; says what to install.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"there is no backend {name!r}", hint=f"--backend auto, {' or '.join(BACKENDS)}")
    preferred_first = sorted(BACKENDS, key=lambda candidate: not BACKENDS[candidate].preferred())
    names = preferred_first if name == "auto" else [name]
    reasons = []
    for candidate in names:
        backend = load(candidate)
        reason = backend.available()
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise UsageError(f"no training backend: {'; '.join(reasons)}", hint=f"pip install 'oneround[{names[0]}]'")
