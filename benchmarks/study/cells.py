"""A cell: one training of one cohort under one setting, and what was measured of it. The unit that is resumed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

ONE_SHOT, FROZEN, CENTRALISED = "one-shot", "one-shot, frozen A", "centralised"


@dataclass(frozen=True)
class Cell:
    """A setting. Two cells are the same if and only if their names are."""

    base: str
    task: str
    algorithm: str  # ONE_SHOT, FROZEN, CENTRALISED, or one of rounds.ALGORITHMS
    seed: int = 0
    rounds: int = 1
    clients: int = 10
    dealt: str = ""  # as the task says; "random", "groups", or Dirichlet's α
    rank: int = 16
    learning_rate: float = 0.0  # as the task says, as are the next two
    epochs: float = 0.0
    examples: int = 0
    server_learning_rate: float = 0.0  # as is usual for the algorithm
    continued: bool = False  # the schedule runs over all rounds

    @property
    def name(self) -> str:
        """All that differs from the defaults, in one line."""
        said = [self.base, self.task, self.algorithm]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default or field.name == "seed":
                said.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
        return " | ".join(said)


class Ledger:
    """Cells that are done, a JSON object a line, in a file that is only ever added to.

    A line that a crash cut short is not counted, and its cell is measured again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text("utf-8").splitlines():
                try:
                    one = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.found[one["cell"]] = one

    def add(self, cell: Cell, result: Mapping[str, Any], seconds: float) -> None:
        line = {"cell": cell.name, "setting": asdict(cell), "seconds": round(seconds, 1), "result": result}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a crash cut it short
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[cell.name] = json.loads(json.dumps(line))

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Each once, in their order."""
        return list({cell.name: cell for cell in cells if cell.name not in self.found}.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.found.values())


def machine() -> dict[str, Any]:
    """What the figures are from."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "transformers", "oneround")},
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
    }
