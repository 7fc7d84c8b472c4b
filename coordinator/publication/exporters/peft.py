"""The adapter for PEFT and transformers: the folder `peft`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters import peft
from coordinator.publication.parts import Exporter, Material, Part, Report

NAME = "peft"


def _export(material: Material, folder: Path, earlier: Sequence[Part], report: Report) -> Sequence[Part]:
    report("writing the adapter for PEFT")
    part = Part(NAME, folder / "peft", "the adapter for PEFT and transformers")
    peft.write(material.update, part.path, base_model=material.spec.model.base)
    return [part]


EXPORTER = Exporter(NAME, _export)
