"""The report's pictures. A line is a mean over seeds, what is shaded one standard deviation to each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .results import Spread

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Line = Sequence[tuple[float, Spread]]  # (x, y)
COLOURS = ("#1f5fa8", "#d1622b", "#3a8f4d", "#8a4fa3", "#7a7a7a", "#b8961e", "#2a9d9d")


class Panel:
    """One diagram: lines by name, and how its axes are called."""

    def __init__(
        self,
        lines: Mapping[str, Line],
        title: str,
        x: str,
        y: str,
        *,
        log: bool = False,
        ticks: Sequence[tuple[float, str]] = (),
    ) -> None:
        self.lines = {name: [point for point in line if point[1] is not None] for name, line in lines.items()}
        self.title, self.x, self.y, self.log, self.ticks = title, x, y, log, ticks

    @property
    def there(self) -> bool:
        return any(self.lines.values())

    def draw(self, axes: Axes) -> None:
        for colour, (name, line) in zip(COLOURS, self.lines.items(), strict=False):
            if not line:
                continue
            xs = np.array([x for x, _ in line], float)
            mean, sd = (np.array([getattr(y, part) for _, y in line]) for part in ("mean", "sd"))
            axes.plot(xs, mean, "o-", color=colour, label=name, markersize=4, linewidth=1.4)
            axes.fill_between(xs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        if self.log:
            axes.set_xscale("log")
        if self.ticks:
            axes.set_xticks([at for at, _ in self.ticks], [said for _, said in self.ticks])
            axes.set_xticks([], minor=True)
        axes.set(xlabel=self.x, ylabel=self.y)
        axes.set_title(self.title, fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(fontsize=8, frameon=False)


def write(file: Path, panels: Sequence[Panel]) -> bool:
    """Side by side, those that have anything; whether there was one."""
    there = [panel for panel in panels if panel.there]
    if not there:
        return False
    across = 2 if len(there) == 4 else min(len(there), 3)
    down = -(-len(there) // across)
    figure, grid = plt.subplots(down, across, figsize=(4.6 * across, 3.6 * down), squeeze=False)
    for axes, panel in zip(grid.flat, there, strict=False):
        panel.draw(axes)
    for axes in list(grid.flat)[len(there) :]:
        axes.axis("off")
    figure.tight_layout()
    part = file.with_name(file.stem + ".part" + file.suffix)
    figure.savefig(part, dpi=110, metadata={"Software": None})
    plt.close(figure)
    part.replace(file)
    return True
