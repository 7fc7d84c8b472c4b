"""Base + adapter in one quantised file, which llama.cpp makes from the finest float file: `NAME-q8_0.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.gguf import quantize as gguf_quantize
from converters.gguf.types import QUANTISED
from coordinator.publication.exporters import merged_gguf
from coordinator.publication.parts import Exporter, Material, Part, Report

NAME = "quantised-gguf"


def _export(material: Material, folder: Path, earlier: Sequence[Part], report: Report) -> Sequence[Part]:
    """The quantised types that the job asks for, in the job's order."""
    finest = next(part for part in earlier if part.exporter == merged_gguf.NAME)
    parts = []
    for kind in dict.fromkeys(material.spec.publish.gguf):
        if kind in QUANTISED:
            report(f"quantising to {kind}")
            file = folder / f"{material.spec.name}-{kind}.gguf"
            quantised = gguf_quantize.quantize(finest.path, file, kind)
            parts.append(Part(NAME, file, merged_gguf.ABOUT, kind=kind, quantised=quantised))
    return parts


EXPORTER = Exporter(NAME, _export)
