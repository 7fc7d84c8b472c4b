"""The adapter for mlx-lm: the folder `mlx`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters import mlx
from coordinator.publication.parts import Exporter, Material, Part, Report

NAME = "mlx"


def _export(material: Material, folder: Path, earlier: Sequence[Part], report: Report) -> Sequence[Part]:
    report("writing the adapter for mlx-lm")
    part = Part(NAME, folder / "mlx", "the adapter for mlx-lm")
    mlx.write(material.update, part.path, material.base)
    return [part]


EXPORTER = Exporter(NAME, _export)
