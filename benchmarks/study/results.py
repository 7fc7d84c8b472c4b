"""Cells that are done, asked for by setting: losses by seed, and what share of a gap they close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .cells import CENTRALISED, FROZEN, ONE_SHOT, Cell

SEEDS = range(100)  # that are looked for


class Spread(NamedTuple):
    """Mean and standard deviation (of the sample) over seeds, and how many there were."""

    mean: float
    sd: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not len(values):
            return None
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values))


class Results:
    def __init__(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        self._found = found

    def of(self, cell: Cell) -> dict[int, Mapping[str, Any]]:
        """What was measured, by seed; the cell's own seed is not looked at."""
        named = {seed: replace(cell, seed=seed).name for seed in SEEDS}
        return {seed: self._found[name]["result"] for seed, name in named.items() if name in self._found}

    def losses(self, cell: Cell, arm: str = "", side: str = "test") -> dict[int, float]:
        """An arm's loss by seed. One-shot cells have many arms; `local` is the mean of the clients' own models, and
        `best local` the one that does best on the validation set."""
        arm = arm or {CENTRALISED: "centralised", ONE_SHOT: "exact", FROZEN: "ffa"}.get(cell.algorithm, "multi-round")
        if arm == "local":
            return {seed: float(np.mean([one[side] for one in r["local"]])) for seed, r in self.of(cell).items()}
        if arm == "best local":
            return {
                seed: min(r["local"], key=lambda one: float(one["valid"]))[side] for seed, r in self.of(cell).items()
            }
        return {seed: r["losses"][arm][side] for seed, r in self.of(cell).items() if arm in r["losses"]}

    def loss(self, cell: Cell, arm: str = "", side: str = "test") -> Spread | None:
        return Spread.of(list(self.losses(cell, arm, side).values()))

    def shares(self, cell: Cell, arm: str = "", reference: Cell | None = None) -> dict[int, float]:
        """(base − arm) / (base − centralised) by seed; centralised by the plain recipe, unless another is given."""
        pooled = reference or Cell(cell.base, cell.task, CENTRALISED, examples=cell.examples)
        base, ceiling = self.losses(pooled, "base"), self.losses(pooled, "centralised")
        return {
            seed: (base[seed] - loss) / (base[seed] - ceiling[seed])
            for seed, loss in self.losses(cell, arm).items()
            if seed in base and base[seed] > ceiling[seed]
        }

    def share(self, cell: Cell, arm: str = "", reference: Cell | None = None) -> Spread | None:
        return Spread.of(list(self.shares(cell, arm, reference).values()))

    def best(self, candidates: Iterable[tuple[Cell, str]]) -> tuple[Cell, str] | None:
        """The setting with the lowest mean loss on the validation set, of those with the most seeds."""
        scored = [(self.loss(cell, arm, "valid"), cell, arm) for cell, arm in candidates]
        there = [(loss, cell, arm) for loss, cell, arm in scored if loss]
        if not there:
            return None
        most = max(loss.seeds for loss, *_ in there)
        _, cell, arm = min((one for one in there if one[0].seeds == most), key=lambda one: one[0].mean)
        return cell, arm

    def arms(self, cell: Cell) -> list[str]:
        """Of a cell: all that it has losses for, in the order of their measuring."""
        return list(dict.fromkeys(arm for result in self.of(cell).values() for arm in result["losses"]))

    def mean(self, cell: Cell, take: Callable[[Mapping[str, Any]], float | None]) -> Spread | None:
        values = [take(result) for result in self.of(cell).values()]
        return Spread.of([value for value in values if value is not None])
