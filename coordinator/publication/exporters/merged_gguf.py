"""Base + adapter in one file of a float type: `NAME-f16.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.gguf import merge as gguf_merge
from converters.gguf.types import FLOATS
from coordinator.publication.parts import Exporter, Material, Part, Report

NAME = "merged-gguf"
ABOUT = "base + adapter in one file"


def _export(material: Material, folder: Path, earlier: Sequence[Part], report: Report) -> Sequence[Part]:
    """The float types that the job asks for, from fine to coarse. Where it asks for none, one of the checkpoint's own
    precision is made for quantised files to be made from and held against."""
    spec, base = material.spec, material.base
    kinds = [kind for kind in FLOATS if kind in spec.publish.gguf]
    parts = [
        Part(NAME, folder / f"{spec.name}-{kind}.gguf", ABOUT, kind=kind, released=kind in kinds)
        for kind in kinds or [base.dtype]
    ]
    for part in parts:
        report(f"merging into {part.kind}")
        accept = spec.model.accept_quantised_gguf
        gguf_merge.merge(material.base_gguf, material.update, part.path, part.kind, base, accept_quantised=accept)
    return parts


EXPORTER = Exporter(NAME, _export)
