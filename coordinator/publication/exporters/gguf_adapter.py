"""The adapter for llama.cpp: the file `adapter.gguf`, to be loaded beside a GGUF of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.gguf import adapter as gguf_adapter
from coordinator.publication.parts import Exporter, Material, Part, Report

NAME = "gguf-adapter"


def _export(material: Material, folder: Path, earlier: Sequence[Part], report: Report) -> Sequence[Part]:
    report("writing the adapter for llama.cpp")
    about = "the adapter for llama.cpp, to be loaded beside a GGUF of the base"
    part = Part(NAME, folder / "adapter.gguf", about)
    gguf_adapter.write(material.update, part.path, material.base)
    return [part]


EXPORTER = Exporter(NAME, _export)
