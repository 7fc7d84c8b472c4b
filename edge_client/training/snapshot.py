"""Training stopped in the middle: what a backend needs to go on as if it had not been, and the file that keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters import tensors
from edge_client.training.plan import TrainingPlan
from edge_client.training.recipe import EXACT, Recipe, Setup
from oneround.errors import BadData

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Snapshot:
    """Where training stands. Which batch is next and which units drop out follow from the number of steps.

    `arrays` has for each module NAME the factors as they are trained, `NAME.a` (r, in) and `NAME.b` (out, r), the
    latter not scaled; and of each AdamW's moments, `….first` and `….second`.
    """

    losses: tuple[float, ...]  # of every step that is done
    arrays: Arrays
    setup: Setup = EXACT  # of the last one: in other parts a batch's sum would be rounded otherwise

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)


def run_digest(backend: str, initial: str, recipe: Recipe, plan: TrainingPlan, rounding: str = "") -> str:
    """SHA-256 of all that a training run follows from; `initial` is the digest of the adapter that it starts from,
    `rounding` says what the base is rounded to. A snapshot of another run is of no use."""
    settings = [backend, initial, asdict(recipe), *plan.settings, rounding]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for array in plan.content():
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def write(file: Path, snapshot: Snapshot, run: str) -> None:
    """Put a snapshot in place of the last one, whole and synced.

    Raises:
        OSError: there is no room; the last one stays.
    """
    losses = np.array(snapshot.losses, dtype=np.float64)
    tensors.write(
        file, {**snapshot.arrays, "losses": losses}, {"run": run, "setup": json.dumps(asdict(snapshot.setup))}
    )


def read(file: Path, run: str) -> Snapshot | None:
    """The snapshot of this run; None when there is none, or one of another run, or a damaged one."""
    if not file.exists():
        return None
    try:
        arrays, metadata = tensors.read(file)
        if metadata.get("run") != run:
            return None
        losses = tuple(arrays["losses"].tolist())
        weights = {name: np.asarray(array, np.float32) for name, array in arrays.items() if name != "losses"}
        return Snapshot(losses, weights, Setup(**json.loads(metadata["setup"])))
    except (BadData, KeyError, ValueError, TypeError):
        return None
