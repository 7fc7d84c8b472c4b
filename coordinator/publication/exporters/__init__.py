"""What a publication holds, in the order in which it is made.

An exporter is a module here, a line in the table, and its verifier's line in publication/verifiers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.publication.exporters import gguf_adapter, merged_gguf, mlx, peft, quantised_gguf
from coordinator.publication.parts import Exporter, Material, Part, Report

EXPORTERS: dict[str, Exporter] = {
    module.NAME: module.EXPORTER for module in (peft, mlx, gguf_adapter, merged_gguf, quantised_gguf)
}


def export(material: Material, folder: Path, report: Report) -> Sequence[Part]:
    """Make all parts of a publication in a folder.

    Raises:
        BadData: a format cannot hold the material.
        NotEnough: the disk is full.
    """
    parts: list[Part] = []
    for exporter in EXPORTERS.values():
        parts.extend(exporter.export(material, folder, tuple(parts), report))
    return parts
